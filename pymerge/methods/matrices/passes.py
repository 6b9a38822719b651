"""Methods that torch computes on whole tensors (`pymerge.ops.reference.matrices`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.work import Sink, Source, Work
from pymerge.ops.array import as_tensor
from pymerge.ops.threads import torch_threads

__all__ = ["run"]


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run the function of `reference.matrices` that has the method's name, on each tensor."""
    with torch_threads(1):
        merge_each(works, source, sink, context, _merge)


def _merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
    import torch

    from pymerge.ops.reference import matrices

    base, models = _widened(work, source)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (base, *models))
    context.check_finite(int(not finite), source, work.name, 0, work.numel)
    method = getattr(matrices, context.method.name)
    flat = method(base, models, work.parameters, work.name).reshape(-1)
    for start, out in sink.pieces(work.name):
        piece = as_tensor(out)
        piece.copy_(flat[start : start + piece.numel()])
    context.progress.advance(source.nbytes(work.name))


def _widened(work: Work, source: Source) -> tuple[Any, list[Any]]:
    import torch

    base, models = source.load(work.name)
    assert base is not None
    dtype = torch.float64 if work.wide else torch.float32
    tensors = [as_tensor(flat).to(dtype).reshape(work.shape) for flat in (base, *models)]
    return tensors[0], tensors[1:]
