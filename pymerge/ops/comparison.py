"""The memory layout of the results of `compare_`, shared by all backends (ComparisonArgs in
csrc/kernel_table.h)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pymerge.ops.constants import HOT_CHUNK

__all__ = ["BINS", "EVERY", "LOWEST", "MOST_MODELS", "Comparison"]

EVERY = 16  # in a large tensor, one magnitude in this many is counted
LOWEST = -48  # log2 of the lower edge of the first bin
OCTAVES, PARTS = 64, 8
BINS = OCTAVES * PARTS
MOST_MODELS = 64


@dataclass(frozen=True)
class Comparison:
    """The shape of a comparison of K models at D levels, and of the `counts` and `sums` of a call.

    Attributes:
        models, levels: K and D. Level 0 comes before the D levels and keeps every nonzero element.
    """

    models: int
    levels: int

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs i < j, ordered by i, then j."""
        return [(i, j) for i in range(self.models) for j in range(i + 1, self.models)]

    @cached_property
    def splits(self) -> list[tuple[int, int]]:
        """(n, m): n models keep an element; m of them have one sign, n - m >= m the other."""
        return [(n, m) for n in range(1, self.models + 1) for m in range(n // 2 + 1)]

    @property
    def rows(self) -> int:
        """The number of sums in a segment."""
        return 1 + self.models * (self.models + 1) + self.models * self.levels

    @property
    def width(self) -> int:
        """The number of counts in a level."""
        return self.models + 2 * len(self.pairs) + len(self.splits)

    @property
    def size(self) -> int:
        """The total number of counts."""
        levels = (1 + self.levels) * self.width
        return levels + len(self.pairs) + self.models * (BINS + 1)

    @staticmethod
    def segments(numel: int) -> int:
        """Return the number of segments, each of which has sums of its own."""
        return -(-numel // HOT_CHUNK)

    def check(
        self,
        sums: Any,
        counts: Any,
        numel: int,
        thresholds: Sequence[int],
        start: int,
        every: int,
        backend: str,
    ) -> None:
        """Raise ValueError unless the arguments of `compare_` are consistent."""
        wanted = (self.rows, self.segments(numel)), (self.size,)
        got = tuple(sums.shape), tuple(counts.shape)
        if got != wanted:
            raise ValueError(
                f"backend {backend!r}: expected sums and counts of shapes {wanted}, got {got}"
            )
        if self.models > MOST_MODELS:
            raise ValueError(
                f"backend {backend!r}: expected at most {MOST_MODELS} models, got {self.models}"
            )
        if len(thresholds) != self.models * self.levels or min(thresholds, default=1) < 1:
            raise ValueError(
                f"backend {backend!r}: expected {self.models * self.levels} thresholds of 1 or "
                f"more, got {list(thresholds)}"
            )
        if start % HOT_CHUNK or every not in (1, EVERY):
            raise ValueError(
                f"backend {backend!r}: expected start to be a multiple of {HOT_CHUNK} and every "
                f"to be 1 or {EVERY}, got {start} and {every}"
            )
