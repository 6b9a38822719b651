"""Methods of one pass that look at each element by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pymerge._calls import call
from pymerge.array import Flat
from pymerge.engine.work import Sink, Source, Work

if TYPE_CHECKING:
    from pymerge.engine.execute import Context

__all__ = ["run_pointwise"]


def run_pointwise(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Merge a tensor piece by piece."""
    base, models = source.load(work.name)
    assert base is not None
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        stats = np.zeros(3, np.int64)
        parts = [model[start:stop] for model in models]
        _call(work, out, stats, base[start:stop], parts, context)
        context.check_finite(int(stats[2]), source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))


def _call(
    work: Work, out: Flat, stats: np.ndarray, base: Flat, models: list[Flat], context: Context
) -> None:
    method, parameters = context.method, work.parameters
    how = {"wide": work.wide, "backend": context.backend}
    if method == "nearswap":
        call("nearswap_", out, stats, base, models[0], parameters["t"], **how)
    elif method == "ram":
        factors = [1.0] * len(models)
        call("ram_", out, stats, base, models, factors, parameters["epsilon"], **how)
    elif method == "magmax":
        call("magmax_", out, stats, base, models, parameters["scale"], **how)
    else:
        thresholds, need = parameters["threshold"], parameters["need"]
        call("consensus_", out, stats, base, models, thresholds, parameters["scale"], need, **how)
