"""Selection among numbers that are computed from the inputs: PCB's scores, SCE's variances.

They are computed tile by tile, anew in each pass: those of a whole model are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pymerge.array import Array, Flat
from pymerge.backends.arguments import padded
from pymerge.engine.work import slices
from pymerge.methods.ties import TrimTarget
from pymerge.select import Cut, Part, order_statistics, sample_parts

if TYPE_CHECKING:
    from pymerge.engine.execute import Context

__all__ = ["TILE", "Scores", "Tile", "flat_index", "tiles"]

TILE = 1 << 20  # elements scored at once; a multiple of the chunks of sums

Parts = Callable[[], Iterable[Part]]
Tile = tuple[int, int, Flat, Sequence[Flat]]  # number of the part, start there, base, models
# (tile, room [rows, numel padded]) -> fills room[:, :numel]. Samples are tiles from anywhere.
Score = Callable[[Tile, np.ndarray], None]


def tiles(parts: Iterable[Part]) -> Iterator[Tile]:
    """Yield stretches of all parts, in order."""
    for number, base, models in parts:
        for start, stop in slices(base.numel(), TILE):
            yield number, start, base[start:stop], [model[start:stop] for model in models]


class Scores:
    """Rows of numbers, one for each element of a scope; only their magnitudes are looked at.

    Args:
        parts: called with the name of a phase for each pass; yields the tensors of the scope.
        total: elements of the scope.
        rows: how many numbers each element has.
        score: computes them.
        wide: in float64.
    """

    def __init__(
        self,
        parts: Callable[[str], Iterable[Part]],
        total: int,
        rows: int,
        score: Score,
        context: Context,
        wide: bool = False,
    ) -> None:
        self._parts = parts
        self._total = total
        self._score = score
        self._context = context
        self._dtype = np.float64 if wide else np.float32
        self._rows = rows
        self._wide = wide
        self._code = "F64" if wide else "F32"
        self._room = np.empty(rows * padded(min(TILE, total)), self._dtype)
        self._zeros = Array.of(np.zeros(min(TILE, total), self._dtype), self._code)

    def select(self, targets: Sequence[TrimTarget]) -> list[Cut]:
        """Return the threshold of each row. Where exactly k are kept, positions count tiles: see
        `flat_index`."""
        context = self._context
        samples = []
        for base, models in sample_parts(
            lambda: self._parts("sample"), self._total, context.sample
        ):
            numel = base.numel()
            room = np.empty(self._rows * padded(numel), self._dtype)
            zeros = Array.of(np.zeros(numel, self._dtype), self._code)
            samples.append((zeros, self._rows_of((0, 0, base, models), room)))
        cuts, _ = order_statistics(
            self._scored,
            targets,
            self._total,
            bins=context.bins,
            sample=context.sample,
            wide=self._wide,
            backend=context.backend,
            samples=samples,
        )
        return cuts

    def _scored(self) -> Iterator[Part]:
        for number, tile in enumerate(tiles(self._parts("thresholds"))):
            numel = tile[2].numel()
            room = self._room
            if self._total <= len(room) // self._rows:  # so few may be held all at once
                room = np.empty(self._rows * padded(numel), self._dtype)
            yield number, self._zeros[:numel], self._rows_of(tile, room)

    def _rows_of(self, tile: Tile, memory: np.ndarray) -> list[Array]:
        numel = tile[2].numel()
        room = memory[: self._rows * padded(numel)].reshape(self._rows, -1)
        self._score(tile, room)
        return [Array.of(row[:numel], self._code) for row in room]


def flat_index(cut: Cut) -> Cut:
    """Return a cut whose position counts tiles of one tensor as one that counts its elements."""
    return cut if cut.part >= Cut.END else Cut(cut.key, 0, cut.part * TILE + cut.index)
