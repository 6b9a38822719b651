"""The Triton backend's sparse merges, pointwise methods, PCB and sums: see
`pymerge.ops.triton.merges`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pymerge.ops.arguments import Kept, SparseMerge, padded, sums_shape
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.triton.library import check, check_counters, largest, loops_over, run

__all__ = [
    "chunk_sums",
    "pcb_merge",
    "pcb_scores",
    "pointwise",
    "row_weighted_sum",
    "sparse_merge",
]


def _check_ranks(ranks: torch.Tensor | None, count: int, numel: int) -> int:
    """Return how far rows of ranks are apart."""
    if ranks is None:
        return 0
    check_shape("ranks", ranks, torch.int32, count, numel)
    return ranks.stride(0)


def check_shape(
    name: str, table: torch.Tensor, dtype: torch.dtype, rows: int, columns: int
) -> None:
    """Refuse a table with other rows, or with rows of less than `columns`."""
    fits = table.dim() == 2 and table.shape[0] == rows and table.shape[1] >= columns
    if not fits or table.dtype != dtype or (columns > 1 and table.stride(1) != 1):
        raise ValueError(
            f"backend 'triton': {name}: expected {rows} rows of {columns} {dtype} or more, got "
            f"{tuple(table.shape)} of {table.dtype} with strides {tuple(table.stride())}"
        )


def _decides(kept: Kept, wide: bool) -> str:
    """Return what decides on an element: KEEP in triton_kernels/sparse.py."""
    if kept.ranks is not None:
        if not kept.chances:
            return "ranks"
        return "shares" if kept.per_element else "chances"
    band = any(lo > 0 for lo in kept.lo) or any(last < largest(wide) for last in kept.last)
    return {
        (False, False): "all",
        (True, False): "band",
        (False, True): "drawn",
        (True, True): "both",
    }[band, bool(kept.seeds)]


def _rules(kept: Kept, count: int, wide: bool) -> tuple[list[int], list[float]]:
    """Return the integers of the rule of each model, and its chances."""
    most = largest(wide and kept.ranks is None)
    rules: list[int] = []
    for k in range(count):
        lo, last = (kept.lo[k], kept.last[k]) if kept.lo else (0, most)
        # Where the least key is above the largest that can be, nothing is kept.
        band = (1, 0) if lo > most else (max(lo, 0), min(last, most))
        words = kept.seeds[2 * k : 2 * k + 2] or (0, 0)
        rules += [*band, *words, kept.limits[k] if kept.limits else 0]
    return rules, [float(chance) for chance in kept.chances] or [0.0] * (2 * count)


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    numel, count = base.numel(), len(models)
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    stride = _check_ranks(kept.ranks, count, numel)
    if numel == 0:
        return
    rules, chances = _rules(kept, count, wide)
    arguments = {
        "out": out,
        "stats": stats,
        "ranks": kept.ranks,
        "stride": stride,
        "KEEP": _decides(kept, wide),
        "ELECT": how.elect,
        "DIVIDE_WEIGHTS": how.divide,
        "DIVIDE": how.divisor != 1.0,
        "BARE": how.bare,
    }
    own = [number for pair in zip(how.factors, how.weights, strict=True) for number in pair]
    run(
        "sparse_merge",
        base,
        models,
        arguments,
        [0, kept.start, *rules],
        [how.scale, how.divisor, *own, *chances],
        wide,
        scratch=("stats",),
    )


_LONG = 1 << 14  # columns of a row that is longer than any block

# Numbers of a method beside those of each model, and whether there are those.
_REALS = {
    "nearswap": (2, False),
    "ram": (1, True),
    "magmax": (1, False),
    "consensus": (2, True),
    "tall": (3, False),
    "emr": (2, False),
    "variance": (0, False),
    "sce": (2, True),
}
# Where among them a method is told which model it is asked about, and the least of those numbers.
_ASKS = {"tall": (2, 0), "emr": (0, -1)}


def _check_reals(what: str, reals: Sequence[float], wanted: int, count: int) -> None:
    """Refuse numbers that a kernel would read past the end of."""
    if len(reals) != wanted:
        raise ValueError(
            f"backend 'triton': {what}: expected {wanted} numbers for {count} models, got "
            f"{len(reals)}"
        )


def _asked(what: str, number: float, least: int, count: int) -> int:
    """Return the model that a call is asked about."""
    if not least <= number < count:
        raise ValueError(
            f"backend 'triton': {what}: expected a model from {least} to {count - 1}, got {number}"
        )
    return int(number)


def pointwise(
    op: str,
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    wide: bool,
) -> None:
    numel, count = base.numel(), len(models)
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    own, of_each = _REALS[op]
    _check_reals(op, reals, own + (count if of_each else 0), count)
    asked = 0
    if op in _ASKS:
        at, least = _ASKS[op]
        asked = _asked(op, reals[at], least, count)
    if numel == 0:
        return
    method = "sce_everywhere" if op == "sce" and reals[0] != 0 else op
    run(
        "pointwise",
        base,
        models,
        {"out": out, "stats": stats, "METHOD": method},
        [0, asked],
        [float(count), *reals],
        wide,
        scratch=("stats",),
    )


def _pcb(
    out: torch.Tensor | None,
    scores: torch.Tensor | None,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    numel, count = base.numel(), len(models)
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    pairs = count * (count + 1) // 2
    wanted = 1 + (3 * pairs + 3 * count if variant == 0 else 7 * count)
    _check_reals("pcb", reals, wanted, count)
    if numel == 0:
        return
    run(
        "pcb",
        base,
        models,
        {
            "out": out,
            "scores": scores,
            "stats": stats,
            "stride": 0 if scores is None else scores.stride(0),
            "VARIANT": variant,
        },
        [0],
        [float(count), *reals],
        wide=False,
        scratch=("stats",),
    )


def pcb_scores(
    scores: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    check_shape("scores", scores, torch.float32, len(models), padded(base.numel()))
    _pcb(None, scores, stats, base, models, variant, reals)


def pcb_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    _pcb(out, None, stats, base, models, variant, reals)


# Rows of sums that belong together, and to what: each model, each pair, or all models.
_ROWS = {
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
    """Return the integers and the numbers of a kind of sums."""
    if kind == "sparse":
        rules, chances = _rules(kept, count, wide)
        return [kept.start, *rules], chances
    if kind == "sce":
        return [0, kept.lo[0]], [float(count)]
    if kind == "emr":
        return [_asked(kind, reals[0], 0, count)], [0.0]
    if kind == "pcb_exp":
        return [0], [float(count), *reals]
    return [0], list(reals) or [0.0]


def chunk_sums(
    kind: str,
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    numel, count = models[0].numel(), len(models)
    check(numel, base, *models)
    shape = sums_shape(kind, count, numel, columns)
    if tuple(partials.shape) != shape:
        raise ValueError(
            f"backend 'triton': expected partials of shape {shape}, got {tuple(partials.shape)}"
        )
    check_counters(partials, torch.float64)
    stride = _check_ranks(kept.ranks, count, numel)
    wanted = {"pcb_exp": count * (count + 1), "ram_counts": 1, "emr": 1}.get(kind, len(reals))
    _check_reals(kind, reals, wanted, count)
    if numel == 0 or shape[0] == 0:
        return
    integers, numbers = _tables_of(kind, count, reals, kept, wide)
    rows, units = shape[0], 1
    if loops_over("chunk_sums", models):
        rows, of = _ROWS[kind]
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
        "KEEP": _decides(kept, wide) if kind == "sparse" else "all",
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


def row_weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: torch.Tensor,
    columns: int,
    wide: bool,
) -> None:
    numel = out.numel()
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=1)
    shape = len(models), numel // columns
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"backend 'triton': expected weights of shape {shape}, got {tuple(weights.shape)}"
        )
    check_counters(weights, torch.float64)
    if numel == 0:
        return
    arguments = {
        "out": out,
        "stats": stats,
        "weights": weights,
        "columns": columns,
        "rows": shape[1],
        "LONG": columns >= _LONG,
    }
    run("row_weighted_sum", base, models, arguments, [0], [0.0], wide, scratch=("stats",))
