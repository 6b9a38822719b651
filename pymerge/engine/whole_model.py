"""A whole model as the scope of one selection: its tensors in flat order, read pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pymerge.engine.context import Context, total_bytes
from pymerge.engine.select import Cut, Part, order_statistics, sample_parts
from pymerge.engine.trim import TrimTarget
from pymerge.engine.work import Source, Work
from pymerge.ops.array import Array

__all__ = ["Samples", "WholeModel"]

Samples = Sequence[tuple[Array, Sequence[Array]]]


class WholeModel:
    """The merged tensors of a model in flat order: names sorted as strings, as the authors of TIES
    do. The order decides between equal magnitudes.

    Attributes:
        wide: whether any tensor is computed in float64. A single order needs a single arithmetic:
            keys of float32 and float64 are not comparable.
        works: the works in flat order, with this arithmetic.
        numbers: the number of each tensor in flat order, by name.
        total: the number of elements.
    """

    def __init__(self, works: Sequence[Work], source: Source, context: Context) -> None:
        self.wide = any(work.wide for work in works)
        ordered = sorted(works, key=lambda work: work.name)
        self.works = [replace(work, wide=self.wide) for work in ordered]
        self.numbers = {work.name: number for number, work in enumerate(self.works)}
        self.total = sum(work.numel for work in self.works)
        self._source, self._context = source, context

    def work(self, name: str) -> Work:
        return self.works[self.numbers[name]]

    def parts(self, step: str) -> Iterator[Part]:
        """Yield every tensor in a pass of its own, which is one of the record's steps."""
        source, context = self._source, self._context
        context.begin(step, self.works, source)
        # A sample touches lines all over the files. If they are not in memory yet, reading them
        # through, which the next pass needs anyway, is faster than that many small reads; unless
        # they would be evicted again by then.
        if step == "sample" and not source.can_hold(total_bytes(self.works, source)):
            source.announce([])
        for number, work in enumerate(self.works):
            base, models = source.load(work.name)
            assert base is not None
            yield number, base, models
            context.progress.advance(base.nbytes + sum(model.nbytes for model in models))
            source.release(work.name)

    def samples(self) -> Samples:
        """Return a sample of all tensors, which is the same for all weights and scales."""
        context = self._context
        return context.remembered(
            ("sample", self.wide),
            lambda: sample_parts(lambda: self.parts("sample"), self.total, context.sample),
        )

    def cuts(self, targets: Sequence[TrimTarget], samples: Samples) -> tuple[list[Cut], int]:
        """Return the thresholds of |delta| over the whole model, and the number of counting
        passes.

        targets: what to keep of each model. samples: of `samples`; empty if nothing is ranked.
        """
        context = self._context
        return context.remembered(
            ("cuts", "", self.wide, *targets),
            lambda: order_statistics(
                lambda: self.parts("thresholds"),
                targets,
                self.total,
                bins=context.bins,
                sample=context.sample,
                wide=self.wide,
                backend=context.backend,
                samples=samples,
            ),
        )
