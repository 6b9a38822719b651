"""The passes of DARE and Breadcrumbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pymerge._calls import call
from pymerge.array import Flat
from pymerge.engine.sums import sparse_norms
from pymerge.engine.work import Sink, Source, Work
from pymerge.masks import keep_limit, seed_words
from pymerge.methods.sparse import band_counts
from pymerge.methods.ties import TrimTarget
from pymerge.select import KEEP_NONE, Cut, Part, Workspace, order_statistics

if TYPE_CHECKING:
    from pymerge.engine.execute import Context

__all__ = ["run_breadcrumbs", "run_dare"]

_SMALL = 1e-7  # L1 norms below this are not rescaled, as in mergekit


def run_dare(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Drop at random, rescale, merge."""
    base, models = source.load(work.name)
    assert base is not None
    parameters = work.parameters
    densities = parameters["density"]
    seed = context.seed if parameters["seed"] is None else parameters["seed"]
    seeds = seed_words(seed, work.name, len(models))
    limits = [keep_limit(density) for density in densities]
    lo = [KEEP_NONE if limit < 0 else 0 for limit in limits]
    limits = [max(limit, 0) for limit in limits]
    last = [KEEP_NONE] * len(models)
    factors = [1.0] * len(models)
    if parameters["rescale"] == "inv_keep":
        factors = [1.0 / density if density > 0 else 1.0 for density in densities]
    elif parameters["rescale"] == "l1":
        norms = sparse_norms(
            base,
            models,
            lo,
            last,
            seeds,
            limits,
            wide=work.wide,
            backend=context.backend,
        )
        factors = [
            before / after if before >= _SMALL and after >= _SMALL else 1.0
            for before, after in norms
        ]
    kept = _Kept(seeds, limits, factors)
    bands = [(0, work.numel, lo, last)]
    _merge(work, base, models, bands, kept, source, sink, context)


class _Kept:
    def __init__(self, seeds: list[int], limits: list[int], factors: list[float]) -> None:
        self.seeds = seeds
        self.limits = limits
        self.factors = factors


def run_breadcrumbs(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Find the band of magnitudes that is kept, merge."""
    base, models = source.load(work.name)
    assert base is not None
    counts = [
        band_counts(work.numel, density, gamma)
        for density, gamma in zip(work.parameters["density"], work.parameters["gamma"], strict=True)
    ]
    # Of each model the largest: all but the dropped smallest, and the dropped largest.
    targets = [_largest(work.numel, work.numel - bottom) for bottom, _ in counts]
    targets += [_largest(work.numel, top) for _, top in counts]
    part: Part = (0, base, [*models, *models])
    cuts, _ = order_statistics(
        lambda: iter((part,)),
        targets,
        work.numel,
        bins=max(1, context.bins // 2),
        sample=context.sample,
        wide=work.wide,
        backend=context.backend,
        workspace=Workspace(),
    )
    bands = _bands(cuts[: len(models)], cuts[len(models) :], work.numel)
    kept = _Kept([], [], [1.0] * len(models))
    _merge(work, base, models, bands, kept, source, sink, context)


def _largest(total: int, count: int) -> TrimTarget:
    if count == 0:
        return TrimTarget("none")
    if count == total:
        return TrimTarget("all")
    return TrimTarget("rank", total - count + 1, exact=True)


def _bands(
    lower: Sequence[Cut], upper: Sequence[Cut], numel: int
) -> list[tuple[int, int, list[int], list[int]]]:
    """Return (begin, end, lo, last) of the stretches over which no limit changes."""
    tables = [cut.thresholds(0, numel) for cut in (*lower, *upper)]
    borders = sorted({end for table in tables for end, _ in table} | {numel})
    bands, begin = [], 0
    for end in borders:
        if end <= begin:
            continue
        keys = [next(key for until, key in table if begin < until) for table in tables]
        lo, first_dropped = keys[: len(lower)], keys[len(lower) :]
        # What the upper cut keeps is dropped: keys from its threshold on.
        last = [key if key == KEEP_NONE else key - 1 for key in first_dropped]
        bands.append((begin, end, lo, last))
        begin = end
    return bands


def _merge(
    work: Work,
    base: Flat,
    models: Sequence[Flat],
    bands: Sequence[tuple[int, int, list[int], list[int]]],
    kept: _Kept,
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    elect = context.method in ("dare_ties", "breadcrumbs_ties")
    parameters = work.parameters
    weights = [float(weight) for weight in parameters["weight"]]
    normalize = parameters["normalize"]
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        stats = np.zeros(3, np.int64)
        for begin, end, lo, last in bands:
            begin, end = max(begin, start), min(end, stop)
            if begin >= end:
                continue
            call(
                "sparse_merge_",
                out[begin - start : end - start],
                stats,
                base[begin:end],
                [model[begin:end] for model in models],
                lo,
                last,
                kept.seeds,
                kept.limits,
                kept.factors,
                weights,
                elect,
                elect and normalize,
                sum(weights) if normalize and not elect else 1.0,
                parameters["scale"],
                begin,
                wide=work.wide,
                backend=context.backend,
            )
        context.check_finite(int(stats[2]), source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))
