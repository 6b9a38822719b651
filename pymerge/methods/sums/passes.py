"""Weighted sums of models or task vectors: one pass, one op a piece."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.work import Sink, Source, Work
from pymerge.ops.call import call

__all__ = ["add_task_vectors", "run_linear", "run_task_arithmetic"]


def run_linear(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Average the models."""
    merge_each(works, source, sink, context, _linear)


def run_task_arithmetic(
    works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> None:
    """Add scaled task vectors to the base."""
    merge_each(works, source, sink, context, add_task_vectors)


def _divisor(work: Work, weights: Sequence[float]) -> float:
    return float(sum(weights)) if work.parameters["normalize"] else 1.0


def _linear(work: Work, source: Source, sink: Sink, context: Context) -> None:
    weights = work.parameters["weight"]
    divisor = _divisor(work, weights)
    _, models = source.load(work.name)
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        call(
            "weighted_sum_",
            out,
            context.stats,
            [model[start:stop] for model in models],
            weights,
            divisor,
            wide=work.wide,
            backend=context.backend,
        )
        context.check(0, source, work.name, start, stop)
        context.progress.advance(sum(model[start:stop].nbytes for model in models))


def add_task_vectors(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Merge one tensor by task arithmetic."""
    weights = work.parameters["weight"]
    divisor = _divisor(work, weights)
    base, models = source.load(work.name)
    assert base is not None
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        call(
            "task_arithmetic_",
            out,
            context.stats,
            base[start:stop],
            [model[start:stop] for model in models],
            weights,
            work.parameters["scale"],
            divisor,
            wide=work.wide,
            backend=context.backend,
        )
        context.check(0, source, work.name, start, stop)
        context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))
