"""The Triton backend's sums in a fixed order: triton_kernels/sums.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pymerge.ops.arguments import Kept, check_kind, sums_shape
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.triton.library import (
    asked,
    check,
    check_counters,
    check_ranks,
    check_reals,
    loops_over,
    run,
)
from pymerge.ops.triton.sparse import decides, rules_of

__all__ = ["ROWS", "chunk_sums"]

# For each kind, the rows that belong together, and what they belong to: a model, a pair, or all.
ROWS = {
    "sparse": (2, "model"),
    "gram": (1, "pair"),
    "dots": (1, "pair"),
    "statistics": (4, "model"),
    "ram_counts": (2, "model"),
    "emr": (2, "all"),
    "sce": (1, "model"),
    "pcb_extremes": (2, "pair"),
    "pcb_exp": (2, "pair"),
}


def _pairs(kind: str, count: int) -> list[tuple[int, int]]:
    if kind == "dots":
        return [(k, count - 1) for k in range(count - 1)]
    return [(i, j) for i in range(count) for j in range(i, count)]


def _tables_of(kind: str, count: int, reals: Sequence[float], kept: Kept, wide: bool) -> Any:
    """Return the integer and the float table of a kind of sums."""
    if kind == "sparse":
        rules, chances = rules_of(kept, count, wide)
        return [kept.start, *rules], chances
    if kind == "sce":
        return [0, kept.lo[0]], [float(count)]
    if kind == "emr":
        return [asked(kind, reals[0], 0, count)], [0.0]
    if kind == "pcb_exp":
        return [0], [float(count), *reals]
    return [0], list(reals) or [0.0]


def chunk_sums(
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    kind: str,
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    numel, count = models[0].numel(), len(models)
    check_kind("chunk_sums_", kind, ROWS, "triton")
    check(numel, base, *models)
    shape = sums_shape(kind, count, numel, columns)
    if tuple(partials.shape) != shape:
        raise ValueError(
            f"backend 'triton': expected partials of shape {shape}, got {tuple(partials.shape)}"
        )
    check_counters(partials, torch.float64)
    stride = check_ranks(kept.ranks, count, numel)
    wanted = {"pcb_exp": count * (count + 1), "ram_counts": 1, "emr": 1}.get(kind, len(reals))
    check_reals(kind, reals, wanted, count)
    if numel == 0 or shape[0] == 0:
        return
    integers, numbers = _tables_of(kind, count, reals, kept, wide)
    rows, units = shape[0], 1
    if loops_over("chunk_sums", models):
        rows, of = ROWS[kind]
        if of == "pair":
            pairs = _pairs(kind, count)
            units = len(pairs)
            integers = [*integers, *(model for pair in pairs for model in pair)]
        elif of == "model":
            units = count
    arguments = {
        "partials": partials,
        "ranks": kept.ranks,
        "lines": shape[1],
        "length": columns or SUM_CHUNK,
        "stride": stride,
        "units": units,
        "KIND": kind,
        "KEEP": decides(kept, wide) if kind == "sparse" else "all",
        "ROWS": rows,
        "LONG": columns > SUM_CHUNK,
    }
    run(
        "chunk_sums",
        base,
        models,
        arguments,
        integers,
        numbers,
        wide and not kind.startswith("pcb"),
        units=units,
        span=shape[1] * SUM_CHUNK,
    )
