"""Sums over whole tensors, from chunk sums in a fixed order: the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pymerge.ops.arguments import Kept, sums_shape
from pymerge.ops.array import Flat
from pymerge.ops.call import call
from pymerge.ops.runner import Runner

__all__ = ["add_up", "gram_matrix", "row_sums", "sparse_norms", "square"]

_AT_ONCE = 1 << 26  # elements; a multiple of the chunk


def add_up(
    kind: str,
    base: Flat | None,
    models: Sequence[Flat],
    *,
    reals: Sequence[float] = (),
    kept: Kept | None = None,
    wide: bool,
    backend: str | Runner,
) -> list[float]:
    """Return the sums of a kind (`chunk_sums_`) over a tensor. `fsum` rounds once, so the order of
    chunks does not matter."""
    kept = kept or Kept()
    numel = models[0].numel()
    rows, _ = sums_shape(kind, len(models), numel, 0)
    sums: list[list[float]] = []
    for start in range(0, numel, _AT_ONCE):
        stop = min(start + _AT_ONCE, numel)
        partials = np.zeros(sums_shape(kind, len(models), stop - start, 0))
        call(
            "chunk_sums_",
            partials,
            None if base is None else base[start:stop],
            [model[start:stop] for model in models],
            kind,
            reals,
            *kept.numbers(),
            kept.start + start,
            kept.ranks,
            kept.chances,
            wide=wide,
            backend=backend,
        )
        sums.append([math.fsum(row) for row in partials])
    return [math.fsum(column) for column in zip(*sums, strict=True)] if sums else [0.0] * rows


def square(upper: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Return the symmetric matrices [count, count, ...] with the given upper halves, row by
    row."""
    upper = np.asarray(upper)
    matrix = np.zeros((count, count, *upper.shape[1:]))
    rows = iter(upper)
    for i in range(count):
        for j in range(i, count):
            matrix[i, j] = matrix[j, i] = next(rows)
    return matrix


def gram_matrix(
    base: Flat | None, models: Sequence[Flat], *, wide: bool, backend: str | Runner
) -> np.ndarray:
    """Return the dot products of all pairs of models, or of their deltas: [models, models]."""
    return square(add_up("gram", base, models, wide=wide, backend=backend), len(models))


def row_sums(
    kind: str,
    base: Flat | None,
    models: Sequence[Flat],
    columns: int,
    *,
    wide: bool,
    backend: str | Runner,
) -> np.ndarray:
    """Return the sums of a kind over each row: [sums, rows]."""
    partials = np.zeros(sums_shape(kind, len(models), models[0].numel(), columns))
    for first, last in _row_blocks(models[0].numel(), columns):
        part = np.zeros((len(partials), (last - first) // columns))
        own = None if base is None else base[first:last]
        parts = [model[first:last] for model in models]
        call("chunk_sums_", part, own, parts, kind, columns=columns, wide=wide, backend=backend)
        partials[:, first // columns : last // columns] = part
    return partials


def _row_blocks(numel: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _AT_ONCE // columns) * columns
    for first in range(0, numel, step):
        yield first, min(first + step, numel)


def sparse_norms(
    base: Flat, models: Sequence[Flat], kept: Kept, *, wide: bool, backend: str | Runner
) -> list[tuple[float, float]]:
    """Return the L1 norms of each task vector and of its kept part."""
    totals = add_up("sparse", base, models, kept=kept, wide=wide, backend=backend)
    return list(zip(totals[::2], totals[1::2], strict=True))
