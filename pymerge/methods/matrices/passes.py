"""Methods that torch computes on whole tensors (`pymerge.ops.reference.matrices`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.engine.work import Sink, Source, Work
from pymerge.ops.array import as_tensor

if TYPE_CHECKING:
    from pymerge.engine.execute import Context

__all__ = ["METHODS", "run_whole"]

METHODS = ("arcee_fusion", "tsv_m")


def run_whole(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run a method tensor by tensor."""
    import torch

    threads = torch.get_num_threads()
    # torch's sums and decompositions depend on the number of threads; the output must not.
    torch.set_num_threads(1)
    try:
        _run_works(works, source, sink, context)
    finally:
        torch.set_num_threads(threads)


def _run_works(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    import torch

    from pymerge.engine.execute import copy_equal, total_bytes
    from pymerge.ops.reference.matrices import WHOLE

    context.progress.phase(context.method, total_bytes(works, source))
    source.announce([work.name for work in works])
    for work in works:
        if work.copied:
            copy_equal(work, source, sink, context)
            source.release(work.name)
            continue
        base, models = _widened(work, source)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in (base, *models))
        context.check_finite(int(not finite), source, work.name, 0, work.numel)
        result = WHOLE[context.method](base, models, work.parameters, work.name)
        flat = result.reshape(-1)
        for start, out in sink.pieces(work.name):
            piece = as_tensor(out)
            piece.copy_(flat[start : start + piece.numel()])
        context.progress.advance(source.nbytes(work.name))
        source.release(work.name)


def _widened(work: Work, source: Source) -> tuple[Any, list[Any]]:
    import torch

    base, models = source.load(work.name)
    assert base is not None
    dtype = torch.float64 if work.wide else torch.float32
    tensors = [as_tensor(flat).to(dtype).reshape(work.shape) for flat in (base, *models)]
    return tensors[0], tensors[1:]
