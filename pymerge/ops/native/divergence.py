"""Marshals `divergence_sums_` and `row_importance_`."""

from __future__ import annotations

from typing import Any

from pymerge.ops.arguments import check_divergences, divergence_columns
from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["divergence_sums", "row_importance"]


def divergence_sums(
    begin: type[Call], table: Any, base: Flat, model: Flat, kind: str, columns: int, wide: bool
) -> None:
    call = begin(base)
    count = divergence_columns(kind, table, call.numel, columns, call.NAME)
    common, address = call.common(base, [model], wide), call.counters(table, "float64")
    call.native.divergence_sums(common, address, count, kind, columns)


def row_importance(
    begin: type[Call],
    out: Flat,
    stats: Any,
    base: Flat,
    model: Flat,
    divergences: Any,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    call = begin(out)
    check_divergences(divergences, call.numel, columns, call.NAME)
    call.native.row_importance(
        call.common(base, [model], wide),
        call.operand(out),
        call.counters(stats, least=3),
        call.counters(divergences, "float64"),
        threshold,
        columns,
    )
