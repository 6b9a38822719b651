"""The context in which a method runs: how to compute, what was counted, and copying."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from pymerge.engine.steps import Method
from pymerge.engine.work import Progress, Sink, Source, Work, no_progress, slices
from pymerge.errors import NonFiniteError, RequestError
from pymerge.ops.array import Array, Flat, as_tensor
from pymerge.ops.call import Counters
from pymerge.ops.runner import Runner, fetched

__all__ = ["Context", "copy_equal", "total_bytes"]

_CHECKED_AT_ONCE = 1 << 22
_UNSEEN = 256  # pieces whose flags stay on a device before they are read

T = TypeVar("T")


@dataclass
class Context:
    """How to run: backend, memory for selection, NaN, seed, method, progress.

    solvers: linear systems that may be solved at once; 0 for as many as torch has threads.
    gathers: results may be computed later than the next piece is requested.
    stats: counts and flags of the merging ops; on a device they are read from time to time.
    memo: earlier findings about the same inputs, which depend only on these and on the key.
    """

    backend: str | Runner = "auto"
    bins: int = 1 << 18
    sample: int = 1 << 17
    nan: str = "error"
    seed: int = 0
    method: Method = field(default=None)  # type: ignore[assignment]  # set by `execute`
    solvers: int = 0
    gathers: bool = False
    progress: Progress = field(default_factory=lambda: no_progress)
    stats: Counters = field(default_factory=lambda: np.zeros(3, np.int64))
    memo: MutableMapping[Hashable, Any] | None = None
    _unseen: list[tuple[int, Source, str, int, int]] = field(default_factory=list)

    @property
    def runner(self) -> Runner:
        """Return what runs the ops, once `execute` has begun."""
        assert isinstance(self.backend, Runner)
        return self.backend

    def begin(self, step: str, works: Sequence[Work], source: Source) -> None:
        """Begin a pass over the inputs of these works: one of the steps that the method's record
        names, in the order in which it gives them."""
        first, total = works[0], sum(work.numel for work in works)
        known = [one.name for one in self.method.steps(first.parameters, first.numel, total)]
        assert step in known, f"{self.method.name} reads {step!r}, its record has {known}"
        self.progress.phase(step, total_bytes(works, source))
        source.announce([work.name for work in works])

    def remembered(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what an earlier merge of the same inputs found under this key, or compute it."""
        if self.memo is None:
            return compute()
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def phase(self) -> AbstractContextManager[None]:
        """Return a context that gathers independent calls, if they may be computed later."""
        return self.runner.phase() if self.gathers else nullcontext()

    def check(self, flag: int, source: Source, name: str, start: int, stop: int) -> None:
        """Raise NonFiniteError if `stats[flag]` shows that [start, stop), just merged, or an
        earlier piece contains NaN or infinity; if a device counts, some time later."""
        if self.nan == "keep":
            return
        self._unseen.append((flag, source, name, start, stop))
        waits = not isinstance(self.stats, np.ndarray)
        if not self.runner.gathering and (not waits or len(self._unseen) >= _UNSEEN):
            self.settle()

    def settle(self) -> None:
        """Read the flags of all pieces so far."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return
        raised = fetched(self.stats)
        for flag, source, name, start, stop in unseen:
            self.check_finite(int(raised[flag]), source, name, start, stop)
        # Finite inputs whose result exceeds the range of its dtype raise a flag too.
        for flag in {flag for flag, *_ in unseen if raised[flag]}:
            self.stats[flag] = 0

    def check_finite(self, flag: int, source: Source, name: str, start: int, stop: int) -> None:
        """Raise NonFiniteError, naming the culprit, if a kernel saw NaN or infinity in [start,
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


def total_bytes(works: Sequence[Work], source: Source) -> int:
    """Return the bytes that one pass over the works reads."""
    return sum(source.nbytes(work.name) for work in works)


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
