"""The passes of an analysis: thresholds of the trims, then everything else at once.

It proceeds tile by tile, by one op (`compare_`). This returns sums of segments of 65536 elements,
whose order is fixed, and integers: nothing depends on threads, shards or the backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pymerge.engine.select import Part, magnitude_keys, order_statistics, sample_parts
from pymerge.engine.trim import TrimTarget
from pymerge.engine.work import Progress, Source, Work, slices
from pymerge.memory import most_bins
from pymerge.methods.ties.record import SEMANTICS, trim_target
from pymerge.ops.array import Array, Flat, as_tensor, concatenate
from pymerge.ops.call import call
from pymerge.ops.comparison import BINS, EVERY, Comparison
from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.runner import Runner

__all__ = ["SAMPLE", "Measured", "Passes"]

SAMPLE = 1 << 17  # elements from which thresholds are taken
_EXACT = 1 << 24  # task vectors up to this length have exact thresholds; a sample would be small
_AT_ONCE = 1 << 26  # elements of a call, a multiple of HOT_CHUNK
_FEW_AT_ONCE = 1 << 20  # the same if torch makes temporaries of that length
_CHECKED = 1 << 22


@dataclass(frozen=True)
class Measured:
    """What `compare_` returned for some tensors together.

    sums: [rows] of `Comparison`. counts: its levels and pairs, integers. magnitudes: [K][bins + 1]
    numbers of elements, zeros last, scaled up if only some were counted; looked_at: how many were.
    """

    numel: int
    tensors: int
    sums: np.ndarray
    counts: np.ndarray
    magnitudes: np.ndarray
    looked_at: int

    @classmethod
    def together(cls, parts: Sequence[Measured]) -> Measured:
        """Return the sum of the parts, rounded once."""
        return cls(
            sum(part.numel for part in parts),
            sum(part.tensors for part in parts),
            np.array([math.fsum(row) for row in zip(*(part.sums for part in parts), strict=True)]),
            np.sum([part.counts for part in parts], axis=0),
            np.sum([part.magnitudes for part in parts], axis=0),
            sum(part.looked_at for part in parts),
        )


class Passes:
    """Reads a source, as often as necessary.

    Attributes:
        thresholds: keys of the magnitudes from which elements are kept, for each density and each
            model. bad: for each tensor with NaN or infinity, how many of each input.
        bytes_read, passes: so far.
    """

    def __init__(
        self, works: Sequence[Work], source: Source, runner: Runner, progress: Progress
    ) -> None:
        self.works = works
        self.source = source
        self.runner = runner
        self.progress = progress
        self.thresholds: list[list[int]] = []
        self.bad: dict[str, list[int]] = {}
        self.bytes_read = 0
        self.passes = 0
        # A single order needs a single arithmetic: keys of float32 and float64 are not comparable.
        self.wide = any(work.wide for work in works)

    def _parts(self, phase: str, *, read_ahead: bool = True) -> Iterator[tuple[Work, Part]]:
        names = [work.name for work in self.works]
        total = sum(self.source.nbytes(name) for name in names)
        self.progress.phase(phase, total)
        self.source.announce(names if read_ahead else [])
        for number, work in enumerate(self.works):
            base, models = self.source.load(work.name)
            assert base is not None
            yield work, (number, base, models)
            self.source.release(work.name)

    def select(self, densities: Sequence[float], models: int, exact: bool) -> str:
        """Find the thresholds; return "exact", "sampled" or "none".

        exact: by the order statistics that TIES uses (one or two more passes). Otherwise by those
        of a sample, if the model is large.
        """
        total = sum(work.numel for work in self.works)
        if not densities or total == 0:
            self.thresholds = [[1] * models for _ in densities]
            return "none"
        targets = [trim_target(SEMANTICS["official"], density, total) for density in densities]
        if exact or total <= _EXACT:
            self.thresholds = self._exact(targets, models, total)
            return "exact"
        self.thresholds = self._sampled(targets, models, total)
        return "sampled"

    def _samples(self, total: int) -> list[tuple[Array, list[Array]]]:
        def parts() -> Iterator[Part]:
            reads = sum(self.source.nbytes(work.name) for work in self.works)
            # Small reads all over a disk are slow; the next pass needs everything anyway.
            for _, part in self._parts("sample", read_ahead=self.source.can_hold(reads)):
                yield part

        return sample_parts(parts, total, SAMPLE)

    def _exact(self, targets: Sequence[TrimTarget], models: int, total: int) -> list[list[int]]:
        def parts() -> Iterator[Part]:
            self.passes += 1
            for _, (number, base, own) in self._parts("thresholds"):
                yield number, base, [model for _ in targets for model in own]
                self._read([base, *own])

        samples = [
            (base, [model for _ in targets for model in own]) for base, own in self._samples(total)
        ]
        cuts, _ = order_statistics(
            parts,
            [target for target in targets for _ in range(models)],
            total,
            bins=most_bins(models * len(targets)),
            sample=SAMPLE,
            wide=self.wide,
            backend=self.runner,
            samples=samples,
        )
        keys = [max(1, cut.key) for cut in cuts]
        return [keys[i : i + models] for i in range(0, len(keys), models)]

    def _sampled(self, targets: Sequence[TrimTarget], models: int, total: int) -> list[list[int]]:
        samples = self._samples(total)
        found = [[1] * models for _ in targets]
        for k in range(models):
            keys = concatenate([magnitude_keys(base, own[k], self.wide) for base, own in samples])
            keys.sort()
            for row, target in zip(found, targets, strict=True):
                if target.keep == "rank":  # else everything is kept
                    index = min(len(keys) - 1, int(target.rank / total * len(keys)))
                    row[k] = max(1, int(keys[index]))
        return found

    def _read(self, flats: Sequence[Flat]) -> None:
        read = sum(flat.nbytes for flat in flats)
        self.bytes_read += read
        self.progress.advance(read)

    def measure(self) -> dict[str, Measured]:
        """Compare the task vectors of each tensor; those in `bad` are left out."""
        self.passes += 1
        found = {}
        for work, (_, base, models) in self._parts("analyze"):
            one = self._tensor(work, base, models)
            if not np.isfinite(one.sums).all():
                counts = [_nonfinite(flat) for flat in (base, *models)]
                if any(counts):
                    self.bad[work.name] = counts
                    continue
            found[work.name] = one
        return found

    def _tensor(self, work: Work, base: Flat, models: Sequence[Flat]) -> Measured:
        shape = Comparison(len(models), len(self.thresholds))
        native = self.runner.backend_for("compare_") == "cpu"
        at_once = _AT_ONCE if native else _FEW_AT_ONCE
        every = EVERY if work.numel > HOT_CHUNK else 1
        keys = [key for level in self.thresholds for key in level]
        counts = np.zeros(shape.size, np.int64)
        partials: list[np.ndarray] = []
        for start, stop in slices(work.numel, at_once):
            own = base[start:stop], [model[start:stop] for model in models]
            sums = np.empty((shape.rows, shape.segments(stop - start)))
            how = {"wide": self.wide, "backend": self.runner}
            call("compare_", sums, counts, *own, keys, start, every, **how)
            partials.append(sums)
            self._read([own[0], *own[1]])
        if partials:
            every_segment = np.concatenate(partials, axis=1)
            with np.errstate(invalid="ignore"):
                totals = np.array([_added(row) for row in every_segment.tolist()])
        else:
            totals = np.zeros(shape.rows)
        split = shape.size - shape.models * (BINS + 1)
        magnitudes = counts[split:].reshape(shape.models, BINS + 1)
        looked_at = int(magnitudes[0].sum())
        scale = work.numel / looked_at if looked_at else 0.0
        return Measured(work.numel, 1, totals, counts[:split], magnitudes * scale, looked_at)


def _added(row: Sequence[float]) -> float:
    """Return the sum, rounded once; NaN if there is none."""
    try:
        return math.fsum(row)
    except (OverflowError, ValueError):  # infinities of both signs, or too large
        return math.nan


def _nonfinite(flat: Flat) -> int:
    """Return the number of NaN and infinite elements."""
    import torch

    tensor = as_tensor(flat) if isinstance(flat, Array) else flat
    parts = (tensor[start:stop] for start, stop in slices(tensor.numel(), _CHECKED))
    return sum(int((~torch.isfinite(part)).sum()) for part in parts)
