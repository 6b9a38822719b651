"""The interface of a GPU to the engine: memory, page-locked memory, three streams, events.

`Cuda` contains every use of torch.cuda in merges of files. The tests have another `Device`, which
runs on the CPU and checks that accesses to the same memory are ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pymerge.errors import MergeError, RequestError
from pymerge.ops.backends import BACKENDS, choose

if TYPE_CHECKING:
    import torch

__all__ = ["COMPUTE", "IN", "OUT", "Cuda", "Device", "OutOfDeviceMemory", "open_device"]

# The streams: copies to the device, kernels, copies back. Each runs its work in order; only events
# order the work of different streams.
IN, COMPUTE, OUT = "in", "compute", "out"


class OutOfDeviceMemory(Exception):
    """The device cannot allocate memory of the requested size."""


class Device(Protocol):
    """A device that computes tiles. Memory is returned as tensors of bytes (uint8)."""

    name: str  # "cuda:0"
    title: str  # its name for people

    def active(self) -> AbstractContextManager[None]:
        """Make it the current device of this thread."""
        ...

    def missing(self) -> dict[str, str | None]:
        """Return the backends for this device, each with why it cannot be used, or None."""
        ...

    def backend_for(self, op: str, wanted: str, without: Collection[str] = ()) -> str | None:
        """Return the backend that runs an op here, or None.

        wanted: a name of `BACKENDS`, or "auto". without: backends that have refused it.
        """
        ...

    def free(self) -> int:
        """Return how many bytes of memory are free."""
        ...

    def peak(self) -> int:
        """Return the peak memory of this process in bytes."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return memory on the device; COMPUTE may still be using it for an earlier tensor.

        Raises:
            OutOfDeviceMemory: the allocation fails.
        """
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return zeros on the device, of a dtype by its name in torch, for COMPUTE."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return page-locked memory of the host, which copies need to go on beside the host."""
        ...

    def fill(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy within the host's memory, now."""
        ...

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        """Copy between page-locked memory and the device when IN or OUT comes to it."""
        ...

    def launch(self, function: Callable[[], Any], tensors: Sequence[torch.Tensor]) -> Any:
        """Run a function that uses these device tensors on COMPUTE; return its result."""
        ...

    def record(self, stream: str) -> Any:
        """Return an event that marks the completion of all work submitted to the stream so far."""
        ...

    def wait(self, stream: str, event: Any) -> None:
        """Make a stream wait for an event before it does any more work."""
        ...

    def finish(self, event: Any) -> None:
        """Wait here for an event."""
        ...

    def put(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return a copy of a few numbers on the device, for COMPUTE."""
        ...

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the host of what COMPUTE has made of a tensor; waits for it."""
        ...


class Cuda:
    """A CUDA device by its number. COMPUTE is torch's current stream there."""

    def __init__(self, index: int) -> None:
        import torch

        self.name = f"cuda:{index}"
        self.title = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        self._torch = torch
        self._device = torch.device("cuda", index)
        self._streams = {
            IN: torch.cuda.Stream(self._device),
            COMPUTE: torch.cuda.current_stream(self._device),
            OUT: torch.cuda.Stream(self._device),
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        with self._torch.cuda.device(self._device):
            yield

    def missing(self) -> dict[str, str | None]:
        found = {name: BACKENDS[name].reason() for name in ("cuda", "triton")}
        if BACKENDS["triton"].device() != "cuda":
            found["triton"] = "with TRITON_INTERPRET=1 its kernels run on the CPU"
        return found

    def backend_for(self, op: str, wanted: str, without: Collection[str] = ()) -> str | None:
        chosen = choose(op, wanted, self._device, without)
        return None if chosen == "reference" and wanted == "auto" else chosen

    def free(self) -> int:
        with self._errors():
            return int(self._torch.cuda.mem_get_info(self._device)[0])

    def peak(self) -> int:
        return int(self._torch.cuda.max_memory_reserved(self._device))

    def empty(self, nbytes: int) -> torch.Tensor:
        return self._allocate((nbytes,), "uint8")

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return self._allocate(shape, dtype).zero_()

    def _allocate(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        kind = getattr(self._torch, dtype)
        with self._errors():
            return self._torch.empty(shape, dtype=kind, device=self._device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        with self._errors():
            return self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True)

    def fill(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        with self._errors(), self._torch.cuda.stream(self._streams[stream]):
            to.copy_(source, non_blocking=True)

    def launch(self, function: Callable[[], Any], tensors: Sequence[torch.Tensor]) -> Any:
        with self._errors():
            return function()

    def record(self, stream: str) -> Any:
        # Waiting must not keep a core busy: the copies on the host need it.
        event = self._torch.cuda.Event(blocking=True)
        event.record(self._streams[stream])
        return event

    def wait(self, stream: str, event: Any) -> None:
        self._streams[stream].wait_event(event)

    def finish(self, event: Any) -> None:
        with self._errors():
            event.synchronize()

    def put(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        tensor = self._torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        with self._errors():
            return tensor.to(self._device).contiguous()

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._errors():
            return tensor.cpu()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate the device's error into a message of our own."""
        try:
            yield
        except (self._torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise OutOfDeviceMemory(str(error).split(". ", 1)[0]) from error
        except MergeError:
            raise
        except RuntimeError as error:
            raise MergeError(f"{self.title}: {error}") from error


def open_device(name: str) -> Device:
    """Return a device by its name, "cuda" (the first) or "cuda:N".

    Raises:
        RequestError: there is no such device, or no backend can use it.
    """
    unusable = f"device: {name!r} is not available"
    try:
        import torch
    except (ImportError, OSError) as error:
        raise RequestError(f"{unusable}: torch cannot be imported: {error}") from error
    if torch.version.cuda is None:
        raise RequestError(f"{unusable}: torch {torch.__version__} was built without CUDA")
    count = torch.cuda.device_count()
    if count == 0:
        raise RequestError(f"{unusable}: torch finds no CUDA device")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        last = "" if count == 1 else f" to cuda:{count - 1}"
        raise RequestError(f"{unusable}: there is cuda:0{last}")
    try:
        with torch.cuda.device(index):
            torch.cuda.current_stream(index).synchronize()
            return Cuda(index)
    except RuntimeError as error:
        raise RequestError(f"{unusable}: {error}") from error
