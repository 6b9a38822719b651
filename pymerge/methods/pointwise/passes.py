"""Methods of one pass that look at each element by itself, and what they want to know before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pymerge.engine.sums import add_up
from pymerge.engine.work import Sink, Source, Work
from pymerge.errors import RequestError
from pymerge.ops.array import Flat
from pymerge.ops.call import call

if TYPE_CHECKING:
    from pymerge.engine.execute import Context

__all__ = ["emr_rescaler", "merge_pointwise", "run_pointwise"]


def run_pointwise(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Merge a tensor piece by piece."""
    base, models = source.load(work.name)
    assert base is not None
    operation, reals = _OPERATIONS[context.method](work, base, models, context)
    stretches = [(0, work.numel, reals)]
    merge_pointwise(operation, work, stretches, source, sink, context)


def merge_pointwise(
    operation: str,
    work: Work,
    stretches: Sequence[tuple[int, int, Sequence[float]]],
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    """Merge a tensor; each stretch (begin, end, reals) has numbers of its own."""
    base, models = source.load(work.name)
    assert base is not None
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        for begin, end, reals in stretches:
            begin, end = max(begin, start), min(end, stop)
            if begin >= end:
                continue
            call(
                "pointwise_",
                out[begin - start : end - start],
                context.stats,
                base[begin:end],
                [model[begin:end] for model in models],
                operation,
                reals,
                wide=work.wide,
                backend=context.backend,
            )
        context.check(2, source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))


# What a method calls, and with which numbers (csrc/math/pointwise.h).
Operation = tuple[str, list[float]]


def _nearswap(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    return "nearswap", [work.parameters["t"], 1e-6]


def _ram(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    return "ram", [work.parameters["epsilon"], *[1.0] * len(models)]


def _ramplus_tl(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    """What one model alone changed is multiplied by 1 + r clip(shared / unique, 0, alpha)."""
    parameters = work.parameters
    epsilon = parameters["epsilon"]
    wide, backend = work.wide, context.backend
    counts = add_up("ram_counts", base, models, reals=[epsilon], wide=wide, backend=backend)
    factors = []
    for unique, shared in zip(counts[::2], counts[1::2], strict=True):
        ratio = shared / max(unique, epsilon)
        factors.append(1.0 + parameters["r"] * min(max(ratio, 0.0), parameters["alpha"]))
    return "ram", [epsilon, *factors]


def _magmax(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    return "magmax", [work.parameters["scale"]]


def _consensus(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    parameters = work.parameters
    return "consensus", [parameters["scale"], parameters["need"], *parameters["threshold"]]


def _tall(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    parameters = work.parameters
    task = checked_task(parameters, len(models))
    return "tall", [parameters["scale"], parameters["threshold"], task]


def _emr(work: Work, base: Flat, models: Sequence[Flat], context: Context) -> Operation:
    task = work.parameters["task"]
    return "emr", [-1.0 if task is None else task, context.rescaler]


_OPERATIONS: dict[str, Callable[[Work, Flat, Sequence[Flat], Any], Operation]] = {
    "nearswap": _nearswap,
    "ram": _ram,
    "ramplus_tl": _ramplus_tl,
    "magmax": _magmax,
    "consensus_ta": _consensus,
    "tall_masks": _tall,
    "emr": _emr,
}


def checked_task(parameters: Any, count: int) -> int:
    task = parameters["task"]
    if task >= count:
        raise RequestError(f"task: expected the number of a model, 0 to {count - 1}; got {task}")
    return task


def emr_rescaler(works: Sequence[Work], source: Source, context: Context) -> float:
    """Return EMR's rescaler of a task: the sum of the tensors' mean |tau_k|, over that of the mean
    |masked unified vector|."""
    own = masked = 0.0
    context.progress.phase("rescaler", sum(source.nbytes(work.name) for work in works))
    source.announce([work.name for work in works])
    for work in works:
        base, models = source.load(work.name)
        task = checked_task(work.parameters, len(models))
        if work.numel > 0:
            found = add_up(
                "emr", base, models, reals=[task], wide=work.wide, backend=context.backend
            )
            own += found[0] / work.numel
            masked += found[1] / work.numel
        context.progress.advance(source.nbytes(work.name))
        source.release(work.name)
    return own / masked if masked > 0 else 1.0
