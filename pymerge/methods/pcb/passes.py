"""The passes of PCB-Merging: statistics of the scope, thresholds of the scores, the merge.

Scores are computed tile by tile, anew in each pass: those of a whole model are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.scores import Scores, Tile, tiles
from pymerge.engine.select import Part, order_statistics
from pymerge.engine.trim import TrimTarget
from pymerge.engine.work import Sink, Source, Work
from pymerge.methods.pcb.record import VARIANTS, PcbVariant
from pymerge.ops.array import Flat
from pymerge.ops.call import Counters, call
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.runner import fetched

__all__ = ["run"]


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run PCB over all works, with statistics over the whole model or of each tensor."""
    merged = [work for work in works if not work.copied]
    names = sorted(work.name for work in merged)
    by_name = {work.name: work for work in merged}
    reals: dict[str, list[float]] = {}
    if merged and merged[0].parameters["scope"] == "global":
        scope = _Scope([by_name[name] for name in names], source, context)
        shared = scope.statistics()
        reals = dict.fromkeys(names, shared)

    def merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
        numbers = reals.get(work.name) or _Scope([work], source, context).statistics()
        _merge(work, numbers, source, sink, context)

    merge_each(works, source, sink, context, merge)


def _merge(
    work: Work, reals: Sequence[float], source: Source, sink: Sink, context: Context
) -> None:
    base, models = source.load(work.name)
    assert base is not None
    variant = VARIANTS[work.parameters["variant"]]
    # The scale may differ between tensors.
    reals = [*reals[:-1], float(work.parameters["scale"])]
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        call(
            "pcb_merge_",
            out,
            context.stats,
            base[start:stop],
            [model[start:stop] for model in models],
            variant.code,
            reals,
            backend=context.backend,
        )
        context.check(2, source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))


class _Scope:
    """The tensors over which statistics are computed."""

    def __init__(self, works: Sequence[Work], source: Source, context: Context) -> None:
        self.works = works
        self.source = source
        self.context = context
        self.total = sum(work.numel for work in works)
        parameters = works[0].parameters
        self.variant: PcbVariant = VARIANTS[parameters["variant"]]
        ratio = parameters["ratio"]
        self.ratio = self.variant.ratio if ratio is None else ratio
        self.weights = [
            self.variant.coefficient if weight is None else float(weight)
            for weight in parameters["weight"]
        ]
        self.count = len(self.weights)

    def statistics(self) -> list[float]:
        """Return the numbers that the merge needs (PcbArgs.reals in csrc/kernel_table.h)."""
        if self.total == 0:
            return _Numbers(self.variant, self.count, self.weights).reals()
        # Scores do not depend on weights, and their statistics do not depend on the ratio.
        scope = self.works[0].name, self.total, self.variant
        numbers = self.context.remembered(("pcb", *scope, self.ratio), self._numbers)
        return numbers.reals(self.weights)

    def _numbers(self) -> _Numbers:
        scope = self.works[0].name, self.total, self.variant
        numbers = copy(self.context.remembered(("pcb statistics", *scope), self._statistics))
        self._thresholds(numbers)
        return numbers

    def _statistics(self) -> _Numbers:
        numbers = _Numbers(self.variant, self.count, self.weights)
        if self.variant.code == 0:
            self._products(numbers)
        else:
            self._quantiles(numbers)
        return numbers

    def parts(self, step: str) -> Iterator[Part]:
        """Yield the tensors of the scope in flat order."""
        if len(self.works) > 1:
            self.context.begin(step, self.works, self.source)
        for number, work in enumerate(self.works):
            base, models = self.source.load(work.name)
            assert base is not None
            yield number, base, models
            if len(self.works) > 1:
                read = base.nbytes + sum(model.nbytes for model in models)
                self.context.progress.advance(read)
                self.source.release(work.name)

    def _products(self, numbers: _Numbers) -> None:
        """Compute, for the paper, extreme products of pairs and the sums of exp."""
        pairs = self.count * (self.count + 1) // 2
        least, most = np.full(pairs, math.inf), np.full(pairs, -math.inf)
        for _, _, base, models in tiles(self.parts("extremes")):
            partials = np.zeros((2 * pairs, -(-base.numel() // SUM_CHUNK)))
            call(
                "chunk_sums_", partials, base, models, "pcb_extremes", backend=self.context.backend
            )
            least = np.minimum(least, partials[::2].min(axis=1))
            most = np.maximum(most, partials[1::2].max(axis=1))
        numbers.pair_min = [float(value) if math.isfinite(value) else 0.0 for value in least]
        spread = np.where(np.isfinite(most), most, 0.0) - np.array(numbers.pair_min)
        numbers.pair_inv = [_single(1.0 / value) if value > 0 else 0.0 for value in spread]
        reals = [*numbers.pair_min, *numbers.pair_inv]
        rows: list[list[float]] = []
        for _, _, base, models in tiles(self.parts("softmax")):
            partials = np.zeros((pairs + self.count, -(-base.numel() // SUM_CHUNK)))
            backend = self.context.backend
            call("chunk_sums_", partials, base, models, "pcb_exp", reals, backend=backend)
            rows.append([math.fsum(row) for row in partials])
        sums = [math.fsum(row) for row in zip(*rows, strict=True)]
        norms = [self.total / v if math.isfinite(v) and v > 0 else 1.0 for v in sums]
        numbers.pair_norm, numbers.norm = norms[:pairs], norms[pairs:]

    def _quantiles(self, numbers: _Numbers) -> None:
        """Compute, for the authors' codes, the magnitudes to which task vectors are clipped."""
        clip, total = self.variant.clip, self.total
        low = int(total * clip)
        high = max(0, int(total * (1.0 - clip) - 1.0))
        targets = [TrimTarget("rank", low + 1)] * self.count
        targets += [TrimTarget("rank", high + 1)] * self.count

        def twice() -> Iterator[Part]:
            for number, base, models in self.parts("quantiles"):
                yield number, base, [*models, *models]

        cuts, _ = order_statistics(
            twice,
            targets,
            total,
            bins=max(1, self.context.bins // 2),
            sample=self.context.sample,
            backend=self.context.backend,
        )
        values = [_magnitude(cut.key) for cut in cuts]
        numbers.lo, numbers.hi = values[: self.count], values[self.count :]
        numbers.inv = [
            _single(1.0 / (hi - lo)) if hi > lo and math.isfinite(hi) else 0.0
            for lo, hi in zip(numbers.lo, numbers.hi, strict=True)
        ]

    def _thresholds(self, numbers: _Numbers) -> None:
        """Find, for each model, the score from which elements are kept, and the largest score."""
        index = min(int(self.total * (1.0 - self.ratio)), self.total - 1)
        targets = [TrimTarget("rank", index + 1)] * self.count
        finder = _Finder(self, numbers)
        positive = finder.select(targets, 1.0)
        # A threshold of 0 or less is among the scores that are not positive: search from below.
        q = positive
        if any(value <= 0 for value in positive) and self.variant.code != 0:
            below = [TrimTarget("rank", self.total - index)] * self.count
            negative = finder.select(below, -1.0)
            q = [a if a > 0 else -b for a, b in zip(positive, negative, strict=True)]
        numbers.q = q
        numbers.top = [float(value) for value in finder.largest]
        numbers.top_inv = [
            _single(1.0 / (top - low)) if top > low and math.isfinite(top) else 0.0
            for top, low in zip(numbers.top, q, strict=True)
        ]


class _Finder:
    """Finds order statistics of the scores, and their maxima along the way."""

    def __init__(self, scope: _Scope, numbers: _Numbers) -> None:
        self.scope = scope
        self.reals = numbers.reals()
        # On the device of the scores: the largest, and the least nonpositive one, negated.
        self._largest = scope.context.runner.zeros((scope.count,), "float32")
        self._least = scope.context.runner.zeros((scope.count,), "float32")
        self._least[:] = math.inf

    @property
    def largest(self) -> np.ndarray:
        """Return the largest score of each model."""
        largest, least = fetched(self._largest), fetched(self._least)
        below = np.where(np.isfinite(least), -least, 0.0)
        return np.where(largest > 0, largest, below)

    def select(self, targets: Sequence[TrimTarget], sign: float) -> list[float]:
        """Return an order statistic of max(sign * score, 0) for each model."""
        scope = self.scope

        def score(tile: Tile, room: Counters) -> None:
            self._score(*tile[2:], room, sign)

        scores = Scores(scope.parts, scope.total, scope.count, score, scope.context)
        return [_magnitude(cut.key) for cut in scores.select(targets)]

    def _score(self, base: Flat, models: Sequence[Flat], room: Counters, sign: float) -> None:
        call(
            "pcb_scores_",
            room,
            self.scope.context.runner.zeros((3,), "int64"),
            base,
            models,
            self.scope.variant.code,
            [*self.reals[:-1], sign],
            backend=self.scope.context.backend,
        )
        scores = room[:, : base.numel()]
        if base.numel() == 0:
            return
        if sign > 0:
            self._largest = _maximum(self._largest, scores)
        else:
            self._least = -_maximum(-self._least, -scores)


def _maximum(so_far: Counters, scores: Counters) -> Counters:
    if isinstance(scores, np.ndarray):
        return np.maximum(so_far, scores.max(axis=1))
    return so_far.maximum(scores.amax(1))


class _Numbers:
    """The numbers of a scope, and their order in a call."""

    def __init__(self, variant: PcbVariant, count: int, weights: Sequence[float]) -> None:
        pairs = count * (count + 1) // 2
        self.variant = variant
        self.weights = list(weights)
        self.pair_min, self.pair_inv, self.pair_norm = [0.0] * pairs, [0.0] * pairs, [1.0] * pairs
        self.norm, self.q = [1.0] * count, [0.0] * count
        self.lo, self.hi, self.inv = [0.0] * count, [0.0] * count, [0.0] * count
        self.top, self.top_inv = [0.0] * count, [0.0] * count

    def reals(self, weights: Sequence[float] | None = None) -> list[float]:
        if self.variant.code == 0:
            first = [*self.pair_min, *self.pair_inv, *self.pair_norm, *self.norm, *self.q]
        else:
            first = [*self.lo, *self.hi, *self.inv, *self.q, *self.top, *self.top_inv]
        return [*first, *(self.weights if weights is None else weights), 1.0]


def _magnitude(key: int) -> float:
    """Return the number whose magnitude has this key."""
    return float(np.array([min(key, 0x7FFFFFFF)], np.uint32).view(np.float32)[0])


def _single(value: float) -> float:
    """Return a number rounded to single precision, staying finite."""
    return float(np.float32(min(max(value, -3e38), 3e38)))
