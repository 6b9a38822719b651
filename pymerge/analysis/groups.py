"""Computes the statistics of a group of tensors from sums and counts: docs/analysis.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pymerge.analysis.passes import Measured
from pymerge.analysis.records import Group, Histogram, Matrix, Quantiles, Trimmed
from pymerge.ops.comparison import BINS, LOWEST, PARTS, Comparison

__all__ = ["LEVELS", "Grouper", "magnitude_of"]

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)  # of quantiles
_JOINED = 2  # bins of the kernel in one bin of a record


def magnitude_of(key: int, wide: bool) -> float:
    """Return the number whose magnitude has these bits."""
    kind, number = (np.uint64, np.float64) if wide else (np.uint32, np.float32)
    return float(np.array([key], kind).view(number)[0])


class Grouper:
    """Builds the groups of one analysis.

    densities, thresholds: of each trim, and the smallest magnitude that it keeps of each model.
    """

    def __init__(
        self, models: int, densities: Sequence[float], thresholds: Sequence[Sequence[float]]
    ) -> None:
        self.shape = Comparison(models, len(densities))
        self.densities = densities
        self.thresholds = thresholds

    def group(self, name: str, own: Measured, whole: Measured) -> Group:
        """Return the statistics of some tensors, `own`, as a part of `whole`."""
        models = self.shape.models
        base, l1, distances, upper, kept_squares = np.split(
            own.sums, np.cumsum([1, models, len(self.shape.pairs), models * (models + 1) // 2])
        )
        gram = self._gram(upper)
        squares = [gram[k][k] for k in range(models)]
        whole_squares = self._gram(self._upper(whole))
        l2 = [_root(square) for square in squares]
        levels = own.counts[: (1 + len(self.densities)) * self.shape.width]
        levels = levels.reshape(1 + len(self.densities), self.shape.width)
        nonzero = levels[0][:models]
        equal = own.counts[levels.size :]
        return Group(
            name=name,
            parameters=own.numel,
            tensors=own.tensors,
            base_l2=_number(math.sqrt(base[0])) or 0.0,
            l1=tuple(_number(value) for value in l1),
            l2=tuple(l2),
            norm_share=tuple(_ratio(squares[k], whole_squares[k][k]) for k in range(models)),
            unchanged=tuple(_ratio(own.numel - int(count), own.numel) for count in nonzero),
            dot=tuple(tuple(_number(value) for value in row) for row in gram),
            cosine=self._matrix(
                1.0, [self._cosine(gram, i, j) for i, j in self.shape.pairs], squares
            ),
            l1_distance=self._matrix(0.0, [_number(value) for value in distances]),
            l2_distance=self._matrix(
                0.0,
                [
                    _root(max(0.0, gram[i][i] + gram[j][j] - 2.0 * gram[i][j]))
                    for i, j in self.shape.pairs
                ],
            ),
            equal=self._matrix(1.0, [_ratio(int(count), own.numel) for count in equal]),
            sign_conflict=self._conflict(levels[0]),
            sign_agreement=self._agreement(levels[0], own.numel),
            trimmed=tuple(
                self._trimmed(
                    d, levels[1 + d], kept_squares[d :: len(self.densities)], squares, own
                )
                for d in range(len(self.densities))
            ),
            quantiles=self._quantiles(own),
            histogram=_histogram(own),
        )

    def _upper(self, measured: Measured) -> np.ndarray:
        first = 1 + self.shape.models + len(self.shape.pairs)
        return measured.sums[first : first + self.shape.models * (self.shape.models + 1) // 2]

    def _gram(self, upper: np.ndarray) -> list[list[float]]:
        models, rows = self.shape.models, iter(upper.tolist())
        gram = [[0.0] * models for _ in range(models)]
        for i in range(models):
            for j in range(i, models):
                gram[i][j] = gram[j][i] = next(rows)
        return gram

    def _cosine(self, gram: list[list[float]], i: int, j: int) -> float | None:
        squares = gram[i][i] * gram[j][j]
        # For equal task vectors this is the root of a square, and exact.
        norms = math.sqrt(squares)
        if not 1e-300 < squares < 1e300:
            norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
        cosine = _ratio(gram[i][j], norms)
        return None if cosine is None else min(1.0, max(-1.0, cosine))

    def _matrix(
        self,
        diagonal: float,
        pairs: Sequence[float | None],
        present: Sequence[float] | None = None,
    ) -> Matrix:
        """Return a symmetric matrix; None on the diagonal if `present` is 0."""
        models = self.shape.models
        matrix: list[list[float | None]] = [[diagonal] * models for _ in range(models)]
        for k in range(models):
            if present is not None and not present[k]:
                matrix[k][k] = None
        for (i, j), value in zip(self.shape.pairs, pairs, strict=True):
            matrix[i][j] = matrix[j][i] = value
        return tuple(tuple(row) for row in matrix)

    def _pairs_of(self, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many elements are in both of each pair, and how many of these conflict."""
        models, pairs = self.shape.models, len(self.shape.pairs)
        return level[models : models + pairs], level[models + pairs : models + 2 * pairs]

    def _conflict(self, level: np.ndarray) -> Matrix:
        both, opposite = self._pairs_of(level)
        return self._matrix(
            0.0,
            [_ratio(int(o), int(b)) for o, b in zip(opposite, both, strict=True)],
            level.tolist(),
        )

    def _agreement(self, level: np.ndarray, numel: int) -> float:
        """Return the mean of |n - 2 m| / n over all elements; 1 where n = 0."""
        counts = level[self.shape.models + 2 * len(self.shape.pairs) :].tolist()
        if numel == 0:
            return 1.0
        splits = self.shape.splits
        agreeing = [c * (n - 2 * m) / n for c, (n, m) in zip(counts, splits, strict=True)]
        return math.fsum([numel - sum(counts), *agreeing]) / numel

    def _trimmed(
        self,
        number: int,
        level: np.ndarray,
        kept_squares: np.ndarray,
        squares: Sequence[float],
        own: Measured,
    ) -> Trimmed:
        models = self.shape.models
        kept = level[:models].tolist()
        both, _ = self._pairs_of(level)
        overlap = [
            _ratio(int(b), min(kept[i], kept[j]))
            for b, (i, j) in zip(both, self.shape.pairs, strict=True)
        ]
        shares = [_ratio(a, b) for a, b in zip(kept_squares.tolist(), squares, strict=True)]
        return Trimmed(
            density=self.densities[number],
            threshold=tuple(self.thresholds[number]),
            kept=tuple(_ratio(count, own.numel) for count in kept),
            kept_norm=tuple(None if s is None else min(1.0, s) for s in shares),
            sign_conflict=self._conflict(level),
            sign_agreement=self._agreement(level, own.numel),
            overlap=self._matrix(1.0, overlap, kept),
        )

    def _quantiles(self, own: Measured) -> Quantiles:
        values = tuple(_levels(own.magnitudes[k]) for k in range(self.shape.models))
        return Quantiles(LEVELS, values)


# Magnitudes at which bins begin, and at which the last one ends.
_BORDERS = np.array(
    [math.ldexp(1 + j % PARTS / PARTS, LOWEST + j // PARTS) for j in range(BINS + 1)]
)


def _levels(magnitudes: np.ndarray) -> tuple[float | None, ...]:
    """Return the quantiles of one model; within a bin, entries count as evenly spread."""
    sums = np.cumsum(magnitudes[:BINS])
    total = sums[-1] + magnitudes[BINS]
    if total == 0:
        return (None,) * len(LEVELS)
    wanted = np.array(LEVELS) * total - magnitudes[BINS]  # zeros come first
    found = np.minimum(np.searchsorted(sums, wanted), BINS - 1)
    inside = magnitudes[found]
    share = (wanted - (sums[found] - inside)) / np.where(inside > 0, inside, 1.0)
    values = _BORDERS[found] + share.clip(0, 1) * (_BORDERS[found + 1] - _BORDERS[found])
    return tuple(np.where(wanted <= 0, 0.0, values).tolist())


def _histogram(own: Measured) -> Histogram:
    """Return the bins that are in use, joining a few of the kernel's into one."""
    joined = own.magnitudes[:, :BINS].reshape(len(own.magnitudes), -1, _JOINED).sum(axis=2)
    zeros = tuple(round(float(value)) for value in own.magnitudes[:, BINS])
    used = np.flatnonzero(joined.any(axis=0))
    if not len(used):
        return Histogram((), tuple(() for _ in joined), zeros, own.looked_at)
    first, last = int(used[0]), int(used[-1]) + 1
    edges = tuple(np.log2(_BORDERS[_JOINED * first : _JOINED * last + 1 : _JOINED]).tolist())
    counts = tuple(tuple(round(float(c)) for c in row[first:last]) for row in joined)
    return Histogram(edges, counts, zeros, own.looked_at)


def _number(value: float) -> float | None:
    """Return a float, or None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def _root(value: float) -> float | None:
    return _number(math.sqrt(value)) if value >= 0 else None


def _ratio(part: float, whole: float) -> float | None:
    return _number(part / whole) if whole else None
