"""The CUDA library as Python sees it: loading it, phases, and the arguments of calls.

All calls are asynchronous, on torch's current stream of the tensors' device; counters are device
tensors, too, and nothing waits for them. The library is looked for at first use. If it is missing
or cannot run here, `reason()` says why and what to do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pymerge.ops.arguments import padded

if TYPE_CHECKING:
    import torch

__all__ = ["LIBRARY", "NOTHING", "Call", "load", "native", "phase", "reason"]

LIBRARY = Path(__file__).resolve().parents[2] / "_cuda.so"

# The device type whose tensors are taken; the tests of the kernels on the processor change it.
_KIND = "cuda"
_DTYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}
# An operand that is not there.
NOTHING = (0, 0)

# Tensors of a phase that is open in this thread: they must live until it ends.
_phase = threading.local()


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return `pymerge._C` with the CUDA library loaded, or why it cannot be used."""
    if not LIBRARY.is_file():
        return None, (
            "this installation has no CUDA library; it is built where nvcc is found: "
            "PYMERGE_CUDA=1 pip install --force-reinstall --no-deps pymerge-kernels"
        )
    try:
        from pymerge import _C
    except ImportError as error:
        return None, f"the native library could not be loaded ({error})"
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return None, f"torch was built for CUDA {torch.version.cuda}, but finds no device"
    try:
        _C.load_cuda(str(LIBRARY))
        _C.check(torch.cuda.current_device(), 0)
    except (RuntimeError, ValueError) as error:
        return None, f"the CUDA library cannot be used: {error}"
    return _C, None


def native() -> Any:
    """Return `pymerge._C`; raise RuntimeError where the CUDA library cannot be used."""
    module, error = load()
    if module is None:
        raise RuntimeError(f"backend 'cuda' is not available: {error}")
    return module


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return load()[1]


def _place(device: torch.device) -> tuple[int, int]:
    """Return the number of a device, and torch's current stream there."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


@contextmanager
def phase(device: torch.device) -> Iterator[None]:
    """Gather the calls of this thread on a device's current stream; launch them at the end.

    Calls that one kernel can do become one launch over many tensors. They must not depend on each
    other: no tensor is an output of one and an input of another.
    """
    library, place = native(), _place(device)
    library.begin(*place)
    _phase.kept = []
    try:
        yield
    finally:
        try:
            library.end(*place)
        finally:
            _phase.kept = None


class Call:
    """One call: checks that all tensors are on one device, and keeps them for an open phase."""

    def __init__(self, first: torch.Tensor) -> None:
        self.native = native()
        self.device = first.device
        self.numel = first.numel()

    def address(self, tensor: torch.Tensor | None, elements: int | None = None) -> tuple[int, int]:
        """Return address and dtype of an operand; (0, 0) where there is none.

        elements: how many it has, where that is not what the first tensor of the call has.
        """
        if tensor is None:
            return NOTHING
        self._keep(tensor)
        expected = self.numel if elements is None else elements
        if tensor.numel() != expected or not tensor.is_contiguous():
            raise ValueError(
                f"backend 'cuda': expected contiguous tensors of {expected} elements, got "
                f"{tensor.numel()} with strides {tuple(tensor.stride())}"
            )
        if str(tensor.dtype) not in _DTYPES:
            raise ValueError(f"backend 'cuda': dtype {tensor.dtype} is not supported")
        # An empty tensor has no address, but a base that is there must not look like none.
        return tensor.data_ptr() or 64, _DTYPES[str(tensor.dtype)]

    def addresses(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        return [self.address(tensor) for tensor in tensors]

    def counters(self, tensor: Any, dtype: str = "int64", least: int = 0) -> int:
        """Return the address of counters on the device."""
        self._keep(tensor)
        if tensor.numel() < least:
            raise ValueError(f"backend 'cuda': expected {least} counters, got {tensor.numel()}")
        if str(tensor.dtype) != f"torch.{dtype}" or not tensor.is_contiguous():
            raise ValueError(f"backend 'cuda': counters must be contiguous {dtype} tensors")
        return tensor.data_ptr()

    def _keep(self, tensor: Any) -> None:
        device = getattr(tensor, "device", None)
        if device != self.device or self.device.type != _KIND:
            raise ValueError(
                f"backend 'cuda': expected all tensors and counters on one CUDA device, got "
                f"{self.device} and {device or type(tensor).__name__}"
            )
        kept = getattr(_phase, "kept", None)
        if kept is not None:
            kept.append(tensor)

    def rows(self, tensor: Any, count: int, dtype: str) -> tuple[int, int]:
        """Return address and stride of scores or ranks: [count, numel and room]."""
        if tensor.shape[0] != count or tensor.shape[1] < padded(self.numel):
            raise ValueError(
                f"backend 'cuda': expected {count} rows of {padded(self.numel)} numbers, got "
                f"{tuple(tensor.shape)}"
            )
        return self.counters(tensor, dtype), tensor.shape[1]

    def table(self, tensor: Any, shape: tuple[int, int]) -> int:
        """Return the address of a table of doubles."""
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"backend 'cuda': expected a table of shape {shape}, got {tuple(tensor.shape)}"
            )
        return self.counters(tensor, "float64")

    def common(
        self, base: torch.Tensor | None, models: Sequence[torch.Tensor], wide: bool
    ) -> tuple[Any, ...]:
        """Return what every call begins with: operands, numel, compute, threads, device, stream."""
        return self.address(base), self.addresses(models), *self.end(wide)

    def end(self, wide: bool) -> tuple[int, int, int, int, int]:
        """Return the last arguments of every call: numel, compute, threads, device, stream."""
        return self.numel, 3 if wide else 0, 0, *_place(self.device)
