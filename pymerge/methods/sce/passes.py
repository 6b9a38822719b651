"""SCE: the selection by variance, the weights, the merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.scores import TILE, Scores, Tile, tiles
from pymerge.engine.select import KEEP_NONE, Part
from pymerge.engine.sums import add_up
from pymerge.engine.trim import TrimTarget
from pymerge.engine.work import Sink, Source, Work
from pymerge.methods.pointwise.passes import merge_pointwise
from pymerge.ops.arguments import Kept
from pymerge.ops.array import Flat, as_flat
from pymerge.ops.call import Counters, call

__all__ = ["run"]

_SMALL = 1e-6  # in mergekit, sums of mean squares below this give all models the same weight


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Select, calculate, erase, tensor by tensor."""
    merge_each(works, source, sink, context, _merge)


def _merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
    base, models = source.load(work.name)
    assert base is not None
    parameters = work.parameters
    stretches = [(0, work.numel, 0)]
    if parameters["select_topk"] < 1.0 and work.numel > 0:
        stretches = _selected(work, base, models, context)
    everywhere = parameters["mask"] == "everywhere"
    energies = np.zeros(len(models))
    for begin, end, key in stretches:
        energies += add_up(
            "sce",
            base[begin:end],
            [model[begin:end] for model in models],
            kept=Kept(lo=[key]),
            wide=work.wide,
            backend=context.backend,
        )
    weights = _weights(energies / max(work.numel, 1), everywhere)
    merge_pointwise(
        "sce",
        work,
        [
            (begin, end, [float(everywhere), _variance(key, work.wide), *weights])
            for begin, end, key in stretches
        ],
        source,
        sink,
        context,
    )


def _weights(energies: np.ndarray, everywhere: bool) -> list[float]:
    total = math.fsum(energies)
    # NaN in an input is an error that the merge reports; with nan='keep' it spreads.
    if total < _SMALL if everywhere else total == 0.0:
        return [1.0 / len(energies)] * len(energies)
    return [float(energy) / total for energy in energies]


def _selected(
    work: Work, base: Flat, models: Sequence[Flat], context: Context
) -> list[tuple[int, int, int]]:
    """Return (begin, end, smallest key) of the selected variances: exactly this many, of equal ones
    those with the lowest index."""
    dtype = "float64" if work.wide else "float32"
    runner = context.runner

    def variance(tile: Tile, room: Counters) -> None:
        _, _, base, models = tile
        out = as_flat(room.reshape(-1)[: base.numel()])
        stats = runner.zeros((3,), "int64")
        how = {"wide": work.wide, "backend": context.backend}
        call("pointwise_", out, stats, base, models, "variance", [], **how)

    def parts(_phase: str) -> Iterator[Part]:
        yield 0, base, models

    nonzero = 0
    room = runner.zeros((min(TILE, work.numel),), dtype)
    for tile in tiles(parts("count")):
        numel = tile[2].numel()
        variance(tile, room)
        nonzero += int((room[:numel] != 0).sum())
    count = int(nonzero * work.parameters["select_topk"])
    if count == 0:
        return [(0, work.numel, KEEP_NONE)]
    target = TrimTarget("rank", work.numel - count + 1, exact=True)
    (cut,) = Scores(parts, work.numel, 1, variance, context, work.wide).select([target])
    begin, stretches = 0, []
    for end, key in cut.thresholds(0, work.numel):
        if end > begin:
            stretches.append((begin, end, key))
        begin = end
    return stretches


def _variance(key: int, wide: bool) -> float:
    """Return the number with this key; NaN, which nothing reaches, for KEEP_NONE."""
    if key == KEEP_NONE:
        return math.nan
    bits = np.array([key], np.int64 if wide else np.int32)
    return float(bits.view(np.float64 if wide else np.float32)[0])
