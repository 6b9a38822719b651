"""Sums over whole tensors, from chunk sums in a fixed order: the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pymerge._calls import call
from pymerge.array import Flat
from pymerge.backends.sizes import SUM_CHUNK

__all__ = ["gram_matrix", "sparse_norms"]

_AT_ONCE = 1 << 26  # elements; a multiple of the chunk


def _stretches(numel: int) -> Iterator[tuple[int, int, int]]:
    for start in range(0, numel, _AT_ONCE):
        stop = min(start + _AT_ONCE, numel)
        yield start, stop, -(-(stop - start) // SUM_CHUNK)


def _add_up(rows: Sequence[Sequence[float]]) -> list[float]:
    """Add the sums of stretches; `fsum` rounds once, so that order does not matter."""
    return [math.fsum(row) for row in zip(*rows, strict=True)]


def gram_matrix(
    base: Flat | None, models: Sequence[Flat], *, wide: bool, backend: str
) -> np.ndarray:
    """Return the dot products of all pairs of models, or of their deltas: [models, models]."""
    count = len(models)
    sums: list[list[float]] = []
    for start, stop, chunks in _stretches(models[0].numel()):
        partials = np.zeros((count * (count + 1) // 2, chunks))
        own = None if base is None else base[start:stop]
        call(
            "gram_",
            partials,
            own,
            [model[start:stop] for model in models],
            wide=wide,
            backend=backend,
        )
        sums.append([math.fsum(row) for row in partials])
    upper = iter(_add_up(sums) if sums else [0.0] * (count * (count + 1) // 2))
    matrix = np.zeros((count, count))
    for i in range(count):
        for j in range(i, count):
            matrix[i, j] = matrix[j, i] = next(upper)
    return matrix


def sparse_norms(
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    *,
    wide: bool,
    backend: str,
) -> list[tuple[float, float]]:
    """Return the L1 norms of each task vector and of what is kept of it."""
    sums: list[list[float]] = []
    for start, stop, chunks in _stretches(base.numel()):
        partials = np.zeros((2 * len(models), chunks))
        call(
            "sparse_sums_",
            partials,
            base[start:stop],
            [model[start:stop] for model in models],
            lo,
            last,
            seeds,
            limits,
            start,
            wide=wide,
            backend=backend,
        )
        sums.append([math.fsum(row) for row in partials])
    totals = _add_up(sums) if sums else [0.0] * (2 * len(models))
    return list(zip(totals[::2], totals[1::2], strict=True))
