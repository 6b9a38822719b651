"""Methods that torch computes on whole tensors (`pymerge.backends.whole`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.array import as_tensor
from pymerge.engine.work import Sink, Source, Work
from pymerge.errors import RequestError
from pymerge.masks import seed_words

if TYPE_CHECKING:
    from pymerge.engine.execute import Context

__all__ = ["METHODS", "run_whole"]

METHODS = (
    "della",
    "della_linear",
    "sce",
    "arcee_fusion",
    "ramplus_tl",
    "emr",
    "tall_masks",
    "tsv_m",
)


class _Situation:
    """What a method may want to know beside tensors and parameters."""

    def __init__(self, method: str, rescaler: float) -> None:
        self.method = method
        self.rescaler = rescaler
        self.name = ""
        self.seeds: list[int] = []


def run_whole(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run a method tensor by tensor."""
    import torch

    merged = [work for work in works if not work.copied]
    rescaler = 1.0
    for work in merged[:1]:
        _check_task(work, source)
    if context.method == "emr" and merged and merged[0].parameters["task"] is not None:
        rescaler = _rescaler(merged, source, context)
    situation = _Situation(context.method, rescaler)
    threads = torch.get_num_threads()
    # torch's sums and decompositions depend on the number of threads; the output must not.
    torch.set_num_threads(1)
    try:
        _run_works(works, source, sink, context, situation)
    finally:
        torch.set_num_threads(threads)


def _run_works(
    works: Sequence[Work], source: Source, sink: Sink, context: Context, situation: _Situation
) -> None:
    import torch

    from pymerge.backends.whole import WHOLE
    from pymerge.engine.execute import copy_equal, total_bytes

    context.progress.phase(context.method, total_bytes(works, source))
    source.announce([work.name for work in works])
    for work in works:
        if work.copied:
            copy_equal(work, source, sink, context)
            source.release(work.name)
            continue
        base, models = _widened(work, source)
        situation.name = work.name
        if "seed" in work.parameters:
            seed = work.parameters["seed"]
            seed = context.seed if seed is None else seed
            situation.seeds = seed_words(seed, work.name, len(models))
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in (base, *models))
        context.check_finite(int(not finite), source, work.name, 0, work.numel)
        result = WHOLE[context.method](base, models, work.parameters, situation)
        flat = result.reshape(-1)
        for start, out in sink.pieces(work.name):
            piece = as_tensor(out)
            piece.copy_(flat[start : start + piece.numel()])
        context.progress.advance(source.nbytes(work.name))
        source.release(work.name)


def _check_task(work: Work, source: Source) -> None:
    task = work.parameters.get("task")
    count = len(source.load(work.name)[1])
    if task is not None and task >= count:
        raise RequestError(f"task: expected the number of a model, 0 to {count - 1}; got {task}")


def _widened(work: Work, source: Source) -> tuple[Any, list[Any]]:
    import torch

    base, models = source.load(work.name)
    assert base is not None
    dtype = torch.float64 if work.wide else torch.float32
    tensors = [as_tensor(flat).to(dtype).reshape(work.shape) for flat in (base, *models)]
    return tensors[0], tensors[1:]


def _rescaler(works: Sequence[Work], source: Source, context: Context) -> float:
    """Return EMR's rescaler of a task: the sum of the tensors' mean |tau_k|, over that of the mean
    |masked unified vector|."""
    from pymerge.backends.whole import unified_vector

    task = works[0].parameters["task"]
    own = masked = 0.0
    context.progress.phase("rescaler", sum(source.nbytes(work.name) for work in works))
    source.announce([work.name for work in works])
    for work in works:
        base, models = _widened(work, source)
        if work.numel > 0:
            deltas = [model - base for model in models]
            unified = unified_vector(deltas)
            own += float(deltas[task].abs().double().mean())
            masked += float((unified.abs() * (deltas[task] * unified > 0)).double().mean())
        source.release(work.name)
    return own / masked if masked > 0 else 1.0
