"""The Triton backend's divergences of rows: triton_kernels/divergence.py."""

from __future__ import annotations

import torch

from pymerge.ops.arguments import DIVERGENCE_STEPS, check_divergences, divergence_columns
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.triton.library import check, check_counters, run

__all__ = ["divergence_sums", "row_importance"]

_LONG = 1 << 14  # rows with this many columns or more are longer than any block


def divergence_sums(
    table: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    kind: str,
    columns: int,
    wide: bool,
) -> None:
    numel = base.numel()
    check(numel, base, model)
    lines = divergence_columns(kind, table, numel, columns, "triton")
    check_counters(table, torch.float64)
    if numel == 0:
        return
    for step in DIVERGENCE_STEPS if kind == "all" else (kind,):
        arguments = {
            "table": table,
            "lines": lines,
            "length": columns or SUM_CHUNK,
            "KIND": step,
            "LONG": columns > SUM_CHUNK,
        }
        span = lines * SUM_CHUNK
        run("divergence_sums", base, [model], arguments, [0], [0.0], wide, span=span)


def row_importance(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    divergences: torch.Tensor,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    numel = base.numel()
    check(numel, out, base, model)
    check_counters(stats, torch.int64, least=3)
    check_divergences(divergences, numel, columns, "triton")
    check_counters(divergences, torch.float64)
    if numel == 0:
        return
    arguments = {
        "out": out,
        "stats": stats,
        "divergences": divergences,
        "columns": columns,
        "MERGE": threshold is not None,
        "LONG": columns >= _LONG,
    }
    numbers = [0.0 if threshold is None else threshold]
    run("row_importance", base, [model], arguments, [0], numbers, wide, scratch=("stats",))
