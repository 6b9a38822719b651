"""A source and a sink for a device: tensors that stay there, and results that come back in time.

They are placed between the engine and the host's source and sink. See
`pymerge.merging.gpu.stage`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymerge.byte_sizes import format_size
from pymerge.dtypes import DTYPES, torch_dtype
from pymerge.engine.work import Sink, Source, TensorStatistics, slices
from pymerge.errors import MergeError
from pymerge.memory import PIECES, device_sizes
from pymerge.merging.gpu.device import COMPUTE, OUT, Device, OutOfDeviceMemory
from pymerge.merging.gpu.stage import Stage
from pymerge.ops.array import Array, Flat
from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.runner import Runner

if TYPE_CHECKING:
    import torch

    from pymerge.plan import MergePlan

__all__ = ["StagedSink", "StagedSource", "run_staged"]


@dataclass
class _Kept:
    """The inputs of a tensor on the device, and the bytes that they take."""

    base: torch.Tensor | None
    models: list[torch.Tensor]
    room: int


class StagedSource:
    """A source that keeps tensors on the device until they are no longer needed, as far as there
    is room; the others stay in host memory and are copied tile by tile when an op needs them."""

    def __init__(self, source: Source, stage: Stage, again: Collection[str]) -> None:
        """
        Args:
            again: tensors that are loaded more than once before they are merged.
        """
        self._source = source
        self._stage = stage
        self._again = frozenset(again)
        self._kept: dict[str, _Kept] = {}
        self._done: set[str] = set()
        # A variable of the engine holds a merged tensor until the next one is loaded: bytes that
        # may still be held, and bytes that are free.
        self._leaving = self._left = 0

    @property
    def labels(self) -> Sequence[str]:
        return self._source.labels

    def describe(self, name: str) -> str:
        return self._source.describe(name)

    def nbytes(self, name: str) -> int:
        return self._source.nbytes(name)

    def statistics(self, name: str) -> TensorStatistics:
        return self._source.statistics(name)

    def announce(self, names: Sequence[str]) -> None:
        self._source.announce([name for name in names if name not in self._kept])

    def can_hold(self, nbytes: int) -> bool:
        return self._source.can_hold(nbytes)

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        if name in self._kept:
            kept = self._kept[name]
            return kept.base, list(kept.models)
        base, models = self._source.load(name)
        if name not in self._again or name in self._done:
            return base, models
        self._stage.room += self._left
        self._left, self._leaving = self._leaving, 0
        before = self._stage.room
        tensors = self._stage.keep([f for f in (base, *models) if isinstance(f, Array)])
        if tensors is None:
            return base, models
        own = None if base is None else tensors.pop(0)
        self._kept[name] = _Kept(own, tensors, before - self._stage.room)
        return self.load(name)

    def release(self, name: str) -> None:
        self._source.release(name)

    def forget(self, name: str) -> None:
        """Release a tensor that was merged: it is not needed again, unless the sink restarts."""
        self._done.add(name)
        if name in self._kept:
            self._leaving += self._kept.pop(name).room

    def restart(self) -> None:
        self._done.clear()


@dataclass
class _Buffer:
    """A piece of output: on the device, in page-locked memory, and the copy between them."""

    there: torch.Tensor
    here: torch.Tensor
    copied: Any = None


@dataclass
class _Result:
    """A part of a tensor that is being copied; `last` marks the end of the tensor."""

    name: str
    nbytes: int
    buffer: _Buffer
    first: bool
    last: bool


class StagedSink:
    """A sink of pieces in device memory. Each is copied back while the next are computed, and
    reaches the sink of the host when its buffer is needed again."""

    def __init__(
        self,
        sink: Sink,
        stage: Stage,
        source: StagedSource,
        tensors: Mapping[str, tuple[str, int]],
    ) -> None:
        """
        Args:
            tensors: (dtype's code, number of elements) of every computed result; the host's sink
                handles the others itself.
        """
        self._sink = sink
        self._source = source
        self._tensors = tensors
        self._device: Device = stage.memory
        self._size = size = stage.sizes.buffer_bytes
        self._free = deque(
            _Buffer(self._device.empty(size), self._device.pinned(size)) for _ in range(PIECES)
        )
        self._coming: deque[_Result] = deque()
        self._open: Iterator[tuple[int, Flat]] = iter(())
        self._place: torch.Tensor | None = None  # bytes of a host piece that is being filled

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        if self._tensors.get(name, ("", 0))[1] == 0:
            self.finish()
            return self._sink.pieces(name)
        return self._staged(name, *self._tensors[name])

    def _staged(self, name: str, code: str, numel: int) -> Iterator[tuple[int, Flat]]:
        itemsize = DTYPES[code]
        most = self._size // itemsize
        for start, stop in slices(numel, most):
            buffer, nbytes = self._free_buffer(), (stop - start) * itemsize
            yield start, buffer.there[:nbytes].view(torch_dtype(code))
            self._free.popleft()
            self._device.wait(OUT, self._device.record(COMPUTE))
            self._device.copy(buffer.here[:nbytes], buffer.there[:nbytes], OUT)
            buffer.copied = self._device.record(OUT)
            self._coming.append(_Result(name, nbytes, buffer, start == 0, stop == numel))
        self._source.forget(name)

    def _free_buffer(self) -> _Buffer:
        while not self._free:
            self._arrive()
        return self._free[0]

    def _arrive(self) -> None:
        """Pass the oldest result to the sink of the host."""
        result = self._coming.popleft()
        self._device.finish(result.buffer.copied)
        if result.first:
            self._open, self._place = iter(self._sink.pieces(result.name)), None
        done = 0
        while done < result.nbytes:
            if self._place is None or self._place.numel() == 0:
                piece = next(self._open)[1]
                assert isinstance(piece, Array)
                self._place = piece.bytes().tensor()
            count = min(self._place.numel(), result.nbytes - done)
            self._device.fill(self._place[:count], result.buffer.here[done : done + count])
            self._place = self._place[count:]
            done += count
        if result.last and next(self._open, None) is not None:
            raise AssertionError(f"{result.name!r}: the sink wants more than was computed")
        self._free.append(result.buffer)

    def finish(self) -> None:
        """Wait until everything has reached the sink of the host."""
        while self._coming:
            self._arrive()

    def restart(self) -> None:
        self.finish()
        self._source.restart()
        self._sink.restart()


def run_staged(
    device: Device,
    backend: str,
    plan: MergePlan,
    run: Callable[[Runner, Source, Sink], None],
    source: Source,
    sink: Sink,
) -> Runner:
    """Run a merge on a device, within the memory that the plan gives it; return the runner.

    If another process takes memory that was free at first, the merge restarts with less.

    Args:
        run: runs the method with the source, sink and runner that it is given.
        source, sink: the host's.

    Raises:
        MergeError: the device failed, or has less memory than the minimum.
    """
    computed = {n: t for n, t in plan.tensors.items() if t.compute is not None}
    results = {name: (tensor.dtype, tensor.numel) for name, tensor in computed.items()}
    # Small tensors are not worth keeping: the statistics of most are computed on the host.
    again = [n for n, t in computed.items() if t.passes > 1 and t.numel > HOT_CHUNK]
    budget = plan.device_memory or device.free() // 2
    sizes = device_sizes(budget, plan.memory.buffer_bytes)

    def attempt() -> Runner | str:
        try:
            stage = Stage(device, sizes, backend)
            inputs = StagedSource(source, stage, again)
            outputs = StagedSink(sink, stage, inputs, results)
            run(stage, inputs, outputs)
            outputs.finish()
            return stage
        except OutOfDeviceMemory as error:
            return str(error)  # the text only, so that nothing keeps memory alive

    with device.active():
        while isinstance(found := attempt(), str):
            smaller = sizes.halved()
            if smaller is None:
                raise MergeError(
                    f"{device.title}: too little memory: {found}; a merge takes "
                    f"{format_size(device_sizes(0).total)} at least, and "
                    f"{format_size(device.free())} are free"
                )
            sizes = smaller
            sink.restart()
    return found
