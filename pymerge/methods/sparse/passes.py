"""The passes of merges of sparse task vectors: what is kept of each of them, then the merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.scores import Scores, Tile
from pymerge.engine.select import (
    KEEP_NONE,
    Cut,
    Part,
    Workspace,
    magnitude_below,
    order_statistics,
)
from pymerge.engine.sums import sparse_norms
from pymerge.engine.whole_model import WholeModel
from pymerge.engine.work import Sink, Source, Work, row_length
from pymerge.methods.pointwise.passes import merge_pointwise
from pymerge.methods.sparse.record import band_counts, largest
from pymerge.ops.arguments import Kept, SparseMerge, padded
from pymerge.ops.array import Flat, as_flat
from pymerge.ops.call import Counters, call
from pymerge.ops.masks import keep_limit, seed_words

__all__ = ["run_breadcrumbs", "run_dare", "run_della", "run_localize_and_stitch"]

_SMALL = 1e-7  # L1 norms below this are not rescaled, as in mergekit
_RANKED_AT_ONCE = 1 << 20  # ranks of all models together, or a row if that is longer

# Stretches of a tensor over which a single rule determines what is kept.
Stretches = list[tuple[int, int, Kept]]


def run_dare(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run DARE; a trim over the whole model comes first."""
    own = [work.parameters for work in works if not work.copied]
    if own and own[0].get("trim") is not None and own[0]["trim_scope"] == "global":
        _run_trimmed(works, source, sink, context)
    else:
        merge_each(works, source, sink, context, _dare)


def run_breadcrumbs(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run Breadcrumbs tensor by tensor."""
    merge_each(works, source, sink, context, _breadcrumbs)


def run_della(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run DELLA tensor by tensor."""
    merge_each(works, source, sink, context, _della)


def run_localize_and_stitch(
    works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> dict[str, int]:
    """Run Localize-and-Stitch: thresholds over the whole model, then tensor by tensor."""
    merged = [work for work in works if not work.copied]
    model = WholeModel(merged, source, context)
    densities = merged[0].parameters["density"] if merged else []
    targets = [largest(model.total, int(density * model.total)) for density in densities]
    samples = model.samples() if any(target.keep == "rank" for target in targets) else []
    cuts, passes = model.cuts(targets, samples)

    def merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
        number = model.numbers[work.name]
        tables = [cut.thresholds(number, work.numel) for cut in cuts]
        # The kind keeps what is above a number; RAM's factors are 1.
        stretches = [
            (begin, end, [magnitude_below(key, model.wide) for key in keys] + [1.0] * len(keys))
            for begin, end, keys in _stretches(tables, work.numel)
        ]
        merge_pointwise("ram", model.works[number], stretches, source, sink, context)

    merge_each(works, source, sink, context, merge)
    return {"selection_passes": passes}


def _dare(
    work: Work,
    source: Source,
    sink: Sink,
    context: Context,
    cuts: Sequence[Cut] | None = None,
    part: int = 0,
) -> None:
    """Drop at random, rescale, merge. cuts: of a trim over the whole model; part: this tensor's
    number in it."""
    base, models = source.load(work.name)
    assert base is not None
    parameters = work.parameters
    kept, factors = _drawn(work, len(models), context)
    if parameters["rescale"] == "l1":
        how = {"wide": work.wide, "backend": context.backend}
        factors = _ratios(sparse_norms(base, models, kept, **how))
    tables = None if cuts is None else [cut.thresholds(part, work.numel) for cut in cuts]
    if parameters.get("trim") is not None and cuts is None and work.numel > 0:

        def parts(_phase: str) -> Iterator[Part]:
            yield 0, base, models

        found = _trim_cuts([work], parts, context, exact=True)
        tables = [cut.thresholds(0, work.numel) for cut in found]
    stretches = [(0, work.numel, kept)]
    if tables is not None:
        stretches = [
            (begin, end, replace(kept, lo=[max(a, b) for a, b in zip(kept.lo, keys, strict=True)]))
            for begin, end, keys in _stretches(tables, work.numel)
        ]
    _merge(work, base, models, stretches, _how(work, context, factors), source, sink, context)


def _drawn(work: Work, count: int, context: Context) -> tuple[Kept, list[float]]:
    """Return what is drawn of each task vector of a tensor, and the factors of kept elements."""
    densities = work.parameters["density"]
    limits = [keep_limit(density) for density in densities]
    kept = Kept(
        lo=[KEEP_NONE if limit < 0 else 0 for limit in limits],
        last=[KEEP_NONE] * count,
        seeds=_seeds(work, count, context),
        limits=[max(limit, 0) for limit in limits],
    )
    factors = [1.0] * count
    if work.parameters["rescale"] == "inv_keep":
        factors = [1.0 / density if density > 0 else 1.0 for density in densities]
    return kept, factors


def _seeds(work: Work, count: int, context: Context) -> list[int]:
    seed = work.parameters["seed"]
    return seed_words(context.seed if seed is None else seed, work.name, count)


def _run_trimmed(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run DARE with a trim over the whole model: thresholds first, then tensor by tensor."""
    model = WholeModel([work for work in works if not work.copied], source, context)
    # Over the whole model, all elements that equal the threshold are kept.
    cuts = _trim_cuts(model.works, model.parts, context, exact=False) if model.total else None

    def merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
        number = model.numbers[work.name]
        _dare(model.works[number], source, sink, context, cuts, number)

    merge_each(works, source, sink, context, merge)


def _trim_cuts(
    works: Sequence[Work],
    parts: Callable[[str], Iterator[Part]],
    context: Context,
    *,
    exact: bool,
) -> list[Cut]:
    """Return the thresholds of a trim of the drawn elements, over the tensors `works` together.

    exact: keep exactly this many, else all that equal the threshold.
    """
    total = sum(work.numel for work in works)
    wide, count = works[0].wide, len(works[0].parameters["density"])
    drawn = [_drawn(work, count, context)[0] for work in works]

    def score(tile: Tile, room: Counters) -> None:
        number, start, base, models = tile
        kept = drawn[number]
        for k, model in enumerate(models):
            call(
                "sparse_merge_",
                as_flat(room[k, : base.numel()]),
                context.runner.zeros((3,), "int64"),
                base,
                [model],
                [kept.lo[k]],
                [kept.last[k]],
                kept.seeds[2 * k : 2 * k + 2],
                [kept.limits[k]],
                [1.0],
                [1.0],
                False,
                False,
                1.0,
                1.0,
                start,
                bare=True,
                wide=wide,
                backend=context.backend,
            )

    share = works[0].parameters["trim"]
    targets = [largest(total, int(share * total), exact)] * count
    return Scores(parts, total, count, score, context, wide).select(targets)


def _ratios(norms: Sequence[tuple[float, float]]) -> list[float]:
    return [
        before / after if before >= _SMALL and after >= _SMALL else 1.0 for before, after in norms
    ]


def _breadcrumbs(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Find the band of magnitudes that is kept, and merge."""
    base, models = source.load(work.name)
    assert base is not None
    columns = row_length(work)
    rows = work.parameters["scope"] == "row"
    counts = [
        band_counts(columns if rows else work.numel, density, gamma)
        for density, gamma in zip(work.parameters["density"], work.parameters["gamma"], strict=True)
    ]
    how = _how(work, context, [1.0] * len(models))
    if rows:
        if not work.shape:  # a number has no row: it is kept, as in the authors' code
            counts = [(0, 0)] * len(models)
        kept = Kept(
            lo=[bottom for bottom, _ in counts], last=[columns - top - 1 for _, top in counts]
        )
        _merge_ranked(work, base, models, columns, kept, how, source, sink, context)
        return
    # For each model, the largest: all except the dropped smallest, and the dropped largest.
    targets = [largest(work.numel, work.numel - bottom) for bottom, _ in counts]
    targets += [largest(work.numel, top) for _, top in counts]
    part: Part = (0, base, [*models, *models])
    cuts, _ = context.remembered(
        ("cuts", work.name, work.wide, *targets),
        lambda: order_statistics(
            lambda: iter((part,)),
            targets,
            work.numel,
            bins=max(1, context.bins // 2),
            sample=context.sample,
            wide=work.wide,
            backend=context.backend,
            workspace=Workspace(),
        ),
    )
    stretches = []
    for begin, end, keys in _stretches([cut.thresholds(0, work.numel) for cut in cuts], work.numel):
        lo, first_dropped = keys[: len(models)], keys[len(models) :]
        # Elements that the upper cut keeps are dropped: keys from its threshold on.
        last = [key if key == KEEP_NONE else key - 1 for key in first_dropped]
        stretches.append((begin, end, Kept(lo=lo, last=last)))
    _merge(work, base, models, stretches, how, source, sink, context)


def _stretches(
    tables: Sequence[Sequence[tuple[int, int]]], numel: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (begin, end, keys) of the stretches within which no threshold changes."""
    borders = sorted({end for table in tables for end, _ in table} | {numel})
    begin = 0
    for end in borders:
        if end <= begin:
            continue
        yield begin, end, [next(key for until, key in table if begin < until) for table in tables]
        begin = end


def _della(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Draw with probabilities by ranks within rows, rescale, merge."""
    base, models = source.load(work.name)
    assert base is not None
    parameters = work.parameters
    columns, count = row_length(work), len(models)
    chances: list[float] = []
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if density >= 1.0 or columns <= 1:
            chances += [density, 0.0]
        else:
            chances += [density - epsilon, 2.0 * epsilon / (columns - 1)]
    kept = Kept(
        lo=[0] * count,
        last=[KEEP_NONE] * count,
        seeds=_seeds(work, count, context),
        limits=[0] * count,
        chances=chances,
        per_element=parameters["rescale"] == "per_element",
    )
    factors = [1.0] * count
    if parameters["rescale"] == "l1":
        factors = _ratios(_ranked_norms(work, base, models, columns, kept, context))
    how = _how(work, context, factors)
    _merge_ranked(work, base, models, columns, kept, how, source, sink, context)


def _ranked_norms(
    work: Work, base: Flat, models: Sequence[Flat], columns: int, kept: Kept, context: Context
) -> list[tuple[float, float]]:
    """Return the L1 norms of each task vector and of its kept part."""
    blocks = _Ranks(work, base, models, columns, context)
    parts = []
    for begin, end in blocks.borders():
        own = replace(kept, ranks=blocks.of(begin)[1], start=begin)
        how = {"wide": work.wide, "backend": context.backend}
        parts.append(sparse_norms(base[begin:end], [m[begin:end] for m in models], own, **how))
    return [
        (math.fsum(norms[k][0] for norms in parts), math.fsum(norms[k][1] for norms in parts))
        for k in range(len(models))
    ]


class _Ranks:
    """Ranks within the rows of a tensor, a block of whole rows at a time."""

    def __init__(
        self, work: Work, base: Flat, models: Sequence[Flat], columns: int, context: Context
    ) -> None:
        self._work, self._base, self._models = work, base, models
        self._columns, self._context = max(columns, 1), context
        rows = max(1, _RANKED_AT_ONCE // len(models) // self._columns)
        self._step = rows * self._columns
        self._begin = -1
        self._room: Counters = np.empty(0, np.int32)

    def borders(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self._work.numel, self._step):
            yield begin, min(begin + self._step, self._work.numel)

    def of(self, index: int) -> tuple[int, Counters, int]:
        """Return (begin, ranks, end) of the block that contains an element."""
        begin = index // self._step * self._step
        end = min(begin + self._step, self._work.numel)
        room = len(self._models), padded(end - begin) + padded(1)
        if begin != self._begin:
            if self._room.shape != room:
                self._room = self._context.runner.zeros(room, "int32")
            call(
                "row_ranks_",
                self._room,
                self._base[begin:end],
                [model[begin:end] for model in self._models],
                self._columns,
                wide=self._work.wide,
                backend=self._context.backend,
            )
            self._begin = begin
        return begin, self._room, end


def _merge_ranked(
    work: Work,
    base: Flat,
    models: Sequence[Flat],
    columns: int,
    kept: Kept,
    how: SparseMerge,
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    blocks = _Ranks(work, base, models, columns, context)
    for start, out in sink.pieces(work.name):
        stop, at = start + out.numel(), start
        while at < stop:
            begin, ranks, end = blocks.of(at)
            end = min(end, stop)
            part, own = out[at - start : end - start], replace(kept, ranks=ranks[:, at - begin :])
            _call(work, part, base, models, at, end, own, how, context)
            at = end
        context.check(2, source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))


def _how(work: Work, context: Context, factors: Sequence[float]) -> SparseMerge:
    parameters = work.parameters
    weights = [float(weight) for weight in parameters["weight"]]
    elect = context.method.details.elects
    normalize = parameters["normalize"]
    divisor = sum(weights) if normalize and not elect else 1.0
    return SparseMerge(factors, weights, elect, elect and normalize, divisor, parameters["scale"])


def _merge(
    work: Work,
    base: Flat,
    models: Sequence[Flat],
    stretches: Stretches,
    how: SparseMerge,
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        for begin, end, kept in stretches:
            begin, end = max(begin, start), min(end, stop)
            if begin >= end:
                continue
            part = out[begin - start : end - start]
            _call(work, part, base, models, begin, end, kept, how, context)
        context.check(2, source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))


def _call(
    work: Work,
    out: Flat,
    base: Flat,
    models: Sequence[Flat],
    begin: int,
    end: int,
    kept: Kept,
    how: SparseMerge,
    context: Context,
) -> None:
    call(
        "sparse_merge_",
        out,
        context.stats,
        base[begin:end],
        [model[begin:end] for model in models],
        *kept.numbers(),
        how.factors,
        how.weights,
        how.elect,
        how.divide,
        how.divisor,
        how.scale,
        begin,
        kept.ranks,
        kept.chances,
        kept.per_element,
        wide=work.wide,
        backend=context.backend,
    )
