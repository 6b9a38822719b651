"""Runs a method over a source and a sink, tile by tile.

It knows which passes a method takes, and no arithmetic. Both entry points end here: tensors in
memory (`pymerge.merge`) and checkpoints (`merge_checkpoints`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from pymerge.engine.work import Progress, Sink, Source, Work, no_progress, slices
from pymerge.errors import NonFiniteError, RequestError
from pymerge.methods.arcee.passes import run_arcee
from pymerge.methods.directions.passes import run_geometry
from pymerge.methods.matrices.passes import METHODS as WHOLE_METHODS
from pymerge.methods.matrices.passes import run_whole
from pymerge.methods.pcb.passes import run_pcb
from pymerge.methods.pointwise.passes import emr_rescaler, run_pointwise
from pymerge.methods.sce.passes import run_sce
from pymerge.methods.sparse.passes import run_breadcrumbs, run_dare, run_della, run_trimmed_dare
from pymerge.methods.statistics.passes import METHODS as DATA_METHODS
from pymerge.methods.statistics.passes import run_data_driven
from pymerge.methods.ties.passes import run_ties
from pymerge.ops.array import Array, Flat, as_tensor
from pymerge.ops.backends import BACKENDS
from pymerge.ops.call import Counters, call
from pymerge.ops.runner import Runner, fetched

__all__ = ["Context", "execute", "run_task_arithmetic"]

_CHECKED_AT_ONCE = 1 << 22
_UNSEEN = 256  # pieces whose flags a device has, before it is asked for them

T = TypeVar("T")


@dataclass
class Context:
    """How to run: backend, memory for selection, NaN, seed, method, whom to tell.

    solvers: linear systems that may be solved at once; 0 for as many as torch has threads.
    gathers: results may be computed later than the next piece is asked for.
    stats: what merging ops count and report; on a device they are looked at from time to time.
    memo: what was found of the same inputs before, and depends on nothing but them and its key.
    """

    backend: str | Runner = "auto"
    bins: int = 1 << 18
    sample: int = 1 << 17
    nan: str = "error"
    seed: int = 0
    method: str = ""
    solvers: int = 0
    gathers: bool = False
    rescaler: float = 1.0  # EMR's, of the task that is asked for
    progress: Progress = field(default_factory=lambda: no_progress)
    stats: Counters = field(default_factory=lambda: np.zeros(3, np.int64))
    memo: MutableMapping[Hashable, Any] | None = None
    _unseen: list[tuple[int, Source, str, int, int]] = field(default_factory=list)

    @property
    def runner(self) -> Runner:
        """What runs the ops, once `execute` has begun."""
        assert isinstance(self.backend, Runner)
        return self.backend

    def remembered(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what an earlier merge of the same inputs found under this key, or find it."""
        if self.memo is None:
            return compute()
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def phase(self) -> AbstractContextManager[None]:
        """Return what gathers calls that do not depend on each other, if they may be late."""
        return self.runner.phase() if self.gathers else nullcontext()

    def check(self, flag: int, source: Source, name: str, start: int, stop: int) -> None:
        """Raise NonFiniteError if `stats[flag]` says that [start, stop), just merged, or a piece
        before it holds NaN or infinity; where a device counts, some time later."""
        if self.nan == "keep":
            return
        self._unseen.append((flag, source, name, start, stop))
        waits = not isinstance(self.stats, np.ndarray)
        if not self.runner.gathering and (not waits or len(self._unseen) >= _UNSEEN):
            self.settle()

    def settle(self) -> None:
        """Look at the flags of all pieces so far."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        raised = fetched(self.stats)
        for flag, source, name, start, stop in unseen:
            self.check_finite(int(raised[flag]), source, name, start, stop)
        # What went over the range of its dtype although all inputs are finite raises a flag too.
        for flag in {flag for flag, *_ in unseen if raised[flag]}:
            self.stats[flag] = 0

    def check_finite(self, flag: int, source: Source, name: str, start: int, stop: int) -> None:
        """Raise NonFiniteError naming the culprit if a kernel saw NaN or infinity in [start,
        stop)."""
        if self.nan == "keep" or not flag:
            return
        import torch

        base, models = source.load(name)
        inputs = models if base is None else [base, *models]
        for label, flat in zip(source.labels, inputs, strict=True):
            tensor = as_tensor(flat)
            for begin, end in slices(stop - start, _CHECKED_AT_ONCE):
                part = tensor[start + begin : start + end]
                finite = torch.isfinite(part)
                if not bool(finite.all()):
                    index = int((~finite).nonzero()[0])
                    value = float(part[index])
                    raise NonFiniteError(
                        f"{label}: {source.describe(name)} holds {value} at flat index "
                        f"{start + begin + index}; nan='keep' lets NaN and infinity through"
                    )


def execute(
    method: str, works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> dict[str, int]:
    """Compute every work and give it to the sink; return the method's statistics.

    Raises NonFiniteError for NaN or infinity in an input (unless told to keep them), RequestError
    where integer tensors differ between models.
    """
    # An unavailable backend is refused before anything is read.
    if isinstance(context.backend, str):
        name = context.backend
        if name != "auto" and (reason := BACKENDS[name].reason()) is not None:
            raise RequestError(f"backend: {name!r} is not available: {reason}")
        context.backend = Runner(name)
    context.stats = context.runner.zeros((3,), "int64")
    context.method = method
    statistics: dict[str, int] = {}
    trims = any("weighting" in work.parameters for work in works)
    if method == "ties" or (method == "adamerging" and trims):
        statistics = run_ties(works, source, sink, context)
    elif method == "pcb":
        run_pcb(works, source, sink, context)
    elif method in DATA_METHODS:
        run_data_driven(works, source, sink, context)
    elif method in WHOLE_METHODS and not _is_streamed(works):
        run_whole(works, source, sink, context)
    else:
        _run_each(method, works, source, sink, context)
    context.settle()
    return statistics


def _run_each(
    method: str, works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> None:
    """Run a method that takes one tensor after the other."""
    merged = [work for work in works if not work.copied]
    first = merged[0].parameters if merged else {}
    if method == "dare_ties" and first.get("trim") is not None and first["trim_scope"] == "global":
        run_trimmed_dare(works, source, sink, context)
        return
    if method == "emr" and first.get("task") is not None:
        context.rescaler = emr_rescaler(merged, source, context)
    run = _RUNNERS[method]
    context.progress.phase(method, total_bytes(works, source))
    source.announce([work.name for work in works])
    with context.phase() if _is_one_op(method, works) else nullcontext():
        for work in works:
            if work.copied:
                copy_equal(work, source, sink, context)
            else:
                run(work, source, sink, context)
            source.release(work.name)


def _is_streamed(works: Sequence[Work]) -> bool:
    """Tell whether the dialect of a method that torch computes has kernels."""
    return any(work.parameters.get("semantics") == "exact" for work in works if not work.copied)


def _is_one_op(method: str, works: Sequence[Work]) -> bool:
    """Tell whether all that a method does are ops that merge, of which none needs another."""
    if method.startswith("dare"):
        own = [work.parameters for work in works if not work.copied]
        return all(p["rescale"] != "l1" and p.get("trim") is None for p in own)
    return method in ("linear", "task_arithmetic", "passthrough", *_POINTWISE)


def total_bytes(works: Sequence[Work], source: Source) -> int:
    """Return the bytes that one pass over the works reads."""
    return sum(source.nbytes(work.name) for work in works)


def _divisor(work: Work, weights: Sequence[float]) -> float:
    return float(sum(weights)) if work.parameters["normalize"] else 1.0


def _run_linear(work: Work, source: Source, sink: Sink, context: Context) -> None:
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


def run_task_arithmetic(work: Work, source: Source, sink: Sink, context: Context) -> None:
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


_POINTWISE = ("nearswap", "ram", "magmax", "consensus_ta", "tall_masks", "emr")
_RUNNERS = {
    "linear": _run_linear,
    "task_arithmetic": run_task_arithmetic,
    "adamerging": run_task_arithmetic,
    "dare_linear": run_dare,
    "dare_ties": run_dare,
    "breadcrumbs": run_breadcrumbs,
    "breadcrumbs_ties": run_breadcrumbs,
    **dict.fromkeys(
        ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough"), run_geometry
    ),
    "della": run_della,
    "della_linear": run_della,
    "sce": run_sce,
    "arcee_fusion": run_arcee,
    "ramplus_tl": run_pointwise,
    **dict.fromkeys(_POINTWISE, run_pointwise),
}


def copy_equal(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Copy an integer or boolean tensor, which must be the same in all inputs."""
    base, models = source.load(work.name)
    inputs = models if base is None else [base, *models]
    first = inputs[0]
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        for label, flat in zip(source.labels[1:], inputs[1:], strict=True):
            if not _same(flat[start:stop], first[start:stop]):
                part, wanted = as_tensor(flat[start:stop]), as_tensor(first[start:stop])
                index = int((part != wanted).nonzero()[0])
                raise RequestError(
                    f"{label}: {source.describe(work.name)} is of dtype {part.dtype} and must "
                    f"equal that of {source.labels[0]}, but at flat index {start + index} it has "
                    f"{part[index].item()} where that has {wanted[index].item()}"
                )
        if isinstance(out, Array) and isinstance(first, Array):
            out.numpy()[:] = first[start:stop].numpy()
        else:
            as_tensor(out).copy_(as_tensor(first[start:stop]))
        context.progress.advance(sum(t[start:stop].nbytes for t in inputs))


def _same(a: Flat, b: Flat) -> bool:
    if isinstance(a, Array) and isinstance(b, Array) and np.array_equal(a.numpy(), b.numpy()):
        return True
    import torch

    return torch.equal(as_tensor(a), as_tensor(b))
