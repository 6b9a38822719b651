"""Runs a method over a source and a sink: looks up what runs it, and drives it tensor by tensor.

It knows neither methods nor arithmetic. Tensors in memory (`pymerge.merge`) and checkpoints
(`merge_checkpoints`) both end up here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from pymerge.engine.context import Context, copy_equal, total_bytes
from pymerge.engine.steps import Method
from pymerge.engine.work import Sink, Source, Work
from pymerge.errors import RequestError
from pymerge.ops.backends import BACKENDS
from pymerge.ops.runner import Runner

__all__ = ["execute", "merge_each"]


def execute(
    method: Method, works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> Mapping[str, int]:
    """Compute every work and pass it to the sink; return the method's statistics.

    Raises:
        NonFiniteError: an input contains NaN or infinity (unless they are to be kept).
        RequestError: integer tensors differ between models, or the backend is not available.
    """
    # An unavailable backend is refused before anything is read.
    if isinstance(context.backend, str):
        name = context.backend
        if name != "auto" and (reason := BACKENDS[name].reason()) is not None:
            raise RequestError(f"backend: {name!r} is not available: {reason}")
        context.backend = Runner(name)
    context.stats = context.runner.zeros((3,), "int64")
    context.method = method
    statistics = method.runner()(works, source, sink, context)
    context.settle()
    return statistics or {}


def merge_each(
    works: Sequence[Work],
    source: Source,
    sink: Sink,
    context: Context,
    merge: Callable[[Work, Source, Sink, Context], None],
) -> None:
    """Merge one tensor after the other, in one pass over the files; integers are copied."""
    method = context.method
    context.progress.phase(method.name, total_bytes(works, source))
    source.announce([work.name for work in works])
    gathers = all(method.gathers(work.parameters) for work in works if not work.copied)
    with context.phase() if gathers else nullcontext():
        for work in works:
            if work.copied:
                copy_equal(work, source, sink, context)
            else:
                merge(work, source, sink, context)
            source.release(work.name)
