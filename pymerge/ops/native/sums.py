"""Marshals `chunk_sums_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.arguments import Kept
from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["chunk_sums"]


def chunk_sums(
    begin: type[Call],
    partials: Any,
    base: Flat | None,
    models: Sequence[Flat],
    kind: str,
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    call = begin(models[0])
    call.native.chunk_sums(
        call.common(base, models, wide),
        call.counters(partials, "float64"),
        tuple(partials.shape),
        kind,
        columns,
        *kept.numbers(),
        kept.start,
        call.rows("ranks", kept.ranks, len(models), "int32"),
        kept.chances,
        reals,
    )
