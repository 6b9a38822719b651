"""Methods of one pass that treat each element by itself, and what they need beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.sums import add_up
from pymerge.engine.work import Sink, Source, Work
from pymerge.methods.pointwise.record import Operation, task_of
from pymerge.ops.call import call

__all__ = ["merge_pointwise", "run", "run_emr", "run_ramplus_tl"]


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Merge by the record's operation."""
    operation: Operation = context.method.details

    def merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
        base, models = source.load(work.name)
        reals = operation.reals if base is not None else operation.bare
        assert reals is not None
        numbers = reals(work.parameters, len(models))
        stretches = [(0, work.numel, numbers)]
        merge_pointwise(operation.kind, work, stretches, source, sink, context)

    merge_each(works, source, sink, context, merge)


def run_ramplus_tl(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Merge by RAM, with factors from counts of the elements that the models changed."""
    merge_each(works, source, sink, context, _ramplus_tl)


def _ramplus_tl(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Merge a tensor; changes of one model alone are multiplied by 1 + r clip(shared / unique, 0,
    alpha)."""
    base, models = source.load(work.name)
    parameters = work.parameters
    epsilon = parameters["epsilon"]
    how = {"wide": work.wide, "backend": context.backend}
    counts = add_up("ram_counts", base, models, reals=[epsilon], **how)
    factors = []
    for unique, shared in zip(counts[::2], counts[1::2], strict=True):
        ratio = shared / max(unique, epsilon)
        factors.append(1.0 + parameters["r"] * min(max(ratio, 0.0), parameters["alpha"]))
    merge_pointwise(
        "ram", work, [(0, work.numel, [epsilon] * len(factors) + factors)], source, sink, context
    )


def run_emr(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Merge by EMR: the unified model, or that of a task, whose rescaler is computed first."""
    merged = [work for work in works if not work.copied]
    task = merged[0].parameters["task"] if merged else None
    rescaler = 1.0 if task is None else _rescaler(merged, source, context)
    numbers = [-1.0 if task is None else task, rescaler]

    def merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
        merge_pointwise("emr", work, [(0, work.numel, numbers)], source, sink, context)

    merge_each(works, source, sink, context, merge)


def _rescaler(works: Sequence[Work], source: Source, context: Context) -> float:
    """Return EMR's rescaler of a task: the sum of the tensors' mean |tau_k|, over that of the mean
    |masked unified vector|."""
    own = masked = 0.0
    context.begin("rescaler", works, source)
    for work in works:
        base, models = source.load(work.name)
        task = task_of(work.parameters, len(models))
        if work.numel > 0:
            how = {"wide": work.wide, "backend": context.backend}
            found = add_up("emr", base, models, reals=[task], **how)
            own += found[0] / work.numel
            masked += found[1] / work.numel
        context.progress.advance(source.nbytes(work.name))
        source.release(work.name)
    return own / masked if masked > 0 else 1.0


def merge_pointwise(
    operation: str,
    work: Work,
    stretches: Sequence[tuple[int, int, Sequence[float]]],
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    """Merge a tensor; each stretch (begin, end, reals) has its own numbers."""
    base, models = source.load(work.name)
    inputs = models if base is None else [base, *models]
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
                inputs[0][begin:end],
                [model[begin:end] for model in models],
                operation,
                reals,
                wide=work.wide,
                backend=context.backend,
            )
        context.check(2, source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in inputs))
