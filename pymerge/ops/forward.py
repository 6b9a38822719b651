"""The calls of backend functions that do more than pass the arguments of an op on.

Two ops share a function that has two modes. The arguments of sparse merges are gathered in records.
A call that draws elements by a hash is split where the flat index crosses a multiple of 2^32,
because the hash uses only the low 32 bits of the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.arguments import Kept, SparseMerge
from pymerge.ops.array import Flat
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.masks import words_at

__all__ = ["chunk_sums", "sparse_merge", "task_arithmetic", "ties_signs", "weighted_sum"]

Counters = Any  # numpy arrays, or tensors


def weighted_sum(
    backend: Any,
    out: Flat,
    stats: Counters,
    models: Sequence[Flat],
    weights: Sequence[float],
    divisor: float,
    wide: bool,
) -> None:
    backend.weighted_sum(out, stats, None, models, weights, 1.0, divisor, wide)


def task_arithmetic(
    backend: Any,
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    wide: bool,
) -> None:
    backend.weighted_sum(out, stats, base, models, weights, scale, divisor, wide)


def ties_signs(
    backend: Any,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    weights: Sequence[float],
    weighting: str,
    elect: str,
    wide: bool,
) -> None:
    backend.ties(
        None, stats, base, models, thresholds, weights, weighting, "sum", elect, 1, 1.0, True, wide
    )


def sparse_merge(
    backend: Any,
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    factors: Sequence[float],
    weights: Sequence[float],
    elect: bool,
    divide: bool,
    divisor: float,
    scale: float,
    start: int,
    ranks: Any,
    chances: Sequence[float],
    per_element: bool,
    bare: bool,
    wide: bool,
) -> None:
    how = SparseMerge(factors, weights, elect, divide, divisor, scale, bare)
    parts = _halves(start, out.numel(), bool(seeds))
    for begin, end in parts:
        here = start + begin
        words = words_at(seeds, here)
        own = ranks if ranks is None or begin == 0 else ranks[:, begin:]
        kept = Kept(lo, last, words, limits, here, own, chances, per_element)
        if len(parts) == 1:
            backend.sparse_merge(out, stats, base, models, kept, how, wide)
            return
        backend.sparse_merge(
            out[begin:end],
            stats,
            base[begin:end],
            [model[begin:end] for model in models],
            kept,
            how,
            wide,
        )


def chunk_sums(
    backend: Any,
    partials: Counters,
    base: Flat | None,
    models: Sequence[Flat],
    kind: str,
    reals: Sequence[float],
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    start: int,
    ranks: Any,
    chances: Sequence[float],
    columns: int,
    wide: bool,
) -> None:
    parts = _halves(start, models[0].numel(), bool(seeds))
    for begin, end in parts:
        here = start + begin
        words = words_at(seeds, here)
        own = ranks if ranks is None or begin == 0 else ranks[:, begin:]
        kept = Kept(lo, last, words, limits, here, own, chances)
        if len(parts) == 1:
            backend.chunk_sums(partials, base, models, kind, reals, kept, columns, wide)
            return
        length = columns or SUM_CHUNK
        part = partials[:, begin // length : -(-end // length)] * 0.0
        backend.chunk_sums(
            part,
            None if base is None else base[begin:end],
            [model[begin:end] for model in models],
            kind,
            reals,
            kept,
            columns,
            wide,
        )
        partials[:, begin // length : -(-end // length)] = part


def _halves(start: int, numel: int, matters: bool) -> list[tuple[int, int]]:
    """Return parts of a call that cross no multiple of 2^32; one part unless it matters."""
    border = ((start >> 32) + 1 << 32) - start
    if not matters or border >= numel:
        return [(0, numel)]
    return [
        (0, border),
        *((b + border, e + border) for b, e in _halves(start + border, numel - border, True)),
    ]
