"""Selection among numbers that are computed from the inputs: PCB's scores, SCE's variances.

They are computed tile by tile, anew in each pass: those of a whole model are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pymerge.engine.context import Context
from pymerge.engine.select import Cut, Part, order_statistics, sample_parts
from pymerge.engine.trim import TrimTarget
from pymerge.engine.work import slices
from pymerge.ops.arguments import padded
from pymerge.ops.array import Flat, as_array, as_flat
from pymerge.ops.call import Counters

__all__ = ["TILE", "Scores", "Tile", "tiles"]

_CACHED = 1 << 18  # elements whose scores stay in the caches of a processor until they are counted
TILE = 1 << 20  # elements scored at once; a multiple of the chunks of sums

Parts = Callable[[], Iterable[Part]]
Tile = tuple[int, int, Flat, Sequence[Flat]]  # number of the part, start in it, base, models
# (tile, room [rows, numel padded]) -> fills room[:, :numel]. Samples are tiles from anywhere.
Score = Callable[[Tile, Counters], None]


def tiles(parts: Iterable[Part], most: int = TILE) -> Iterator[Tile]:
    """Yield stretches of all parts, in order."""
    for number, base, models in parts:
        for start, stop in slices(base.numel(), most):
            yield number, start, base[start:stop], [model[start:stop] for model in models]


class Scores:
    """Rows of numbers, one for each element of a scope; only their magnitudes matter.

    Args:
        parts: called with the name of a phase for each pass; yields the tensors of the scope.
        total: elements of the scope.
        rows: how many numbers each element has.
        score: computes them.
        wide: whether they are in float64.
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
        self._rows = rows
        self._wide = wide
        self._tile = min(_CACHED if context.runner.on_host else TILE, total)
        # Numbers stay on the device that computes them.
        self._room = self._zeros_of(rows * padded(self._tile))
        self._zeros = self._zeros_of(self._tile)

    def _zeros_of(self, numel: int) -> Counters:
        return self._context.runner.zeros((numel,), "float64" if self._wide else "float32")

    def select(self, targets: Sequence[TrimTarget]) -> list[Cut]:
        """Return the threshold of each row. If exactly k are kept, positions refer to the only
        part."""
        context = self._context
        samples = []
        for base, models in sample_parts(
            lambda: self._parts("sample"), self._total, context.sample
        ):
            numel = base.numel()
            scored = self._rows_of((0, 0, base, models), self._zeros_of(self._rows * padded(numel)))
            samples.append((as_array(self._base(numel)), [as_array(row) for row in scored]))
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
        return [
            cut if cut.part >= Cut.END else Cut(cut.key, 0, cut.part * self._tile + cut.index)
            for cut in cuts
        ]

    def _scored(self) -> Iterator[Part]:
        for number, tile in enumerate(tiles(self._parts("thresholds"), self._tile)):
            numel = tile[2].numel()
            room = self._room
            if self._total <= len(room) // self._rows:  # few enough to hold all at once
                room = self._zeros_of(self._rows * padded(numel))
            yield number, self._base(numel), self._rows_of(tile, room)

    def _base(self, numel: int) -> Flat:
        """Return zeros; the numbers are their distance from these."""
        enough = numel <= len(self._zeros)
        return as_flat(self._zeros[:numel] if enough else self._zeros_of(numel))

    def _rows_of(self, tile: Tile, memory: Counters) -> list[Flat]:
        numel = tile[2].numel()
        room = memory[: self._rows * padded(numel)].reshape(self._rows, -1)
        self._score(tile, room)
        return [as_flat(row[:numel]) for row in room]
