"""The CUDA library, as used from Python: loading it, phases, and calls on device tensors.

All calls are asynchronous, on torch's current stream of the tensors' device. Counters are device
tensors, too, and nothing waits for them. The library is looked up at first use. If it is missing or
cannot run here, `reason()` returns why and what to do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pymerge.ops.native.call import NOTHING, Call, Operand

if TYPE_CHECKING:
    import torch

__all__ = ["LIBRARY", "DeviceCall", "load", "native", "phase", "reason"]

LIBRARY = Path(__file__).resolve().parents[2] / "_cuda.so"

# The device type that is accepted; the tests that run the CUDA kernels on the CPU change it.
_KIND = "cuda"
_DTYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}

# Tensors of the open phase of this thread; they must live until it ends.
_phase = threading.local()


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return `pymerge._C` with the CUDA library loaded, or the reason why it cannot be used."""
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
    """Return `pymerge._C`; raise RuntimeError if the CUDA library cannot be used."""
    module, error = load()
    if module is None:
        raise RuntimeError(f"backend 'cuda' is not available: {error}")
    return module


def reason() -> str | None:
    """Return why the backend cannot be used, or None."""
    return load()[1]


def _place(device: torch.device) -> tuple[int, int]:
    """Return the number of a device, and the handle of torch's current stream there."""
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


@contextmanager
def phase(device: torch.device) -> Iterator[None]:
    """Gather this thread's calls on a device's current stream; launch them at the end.

    Calls of the same kernel are combined into one launch over many tensors. The calls must not
    depend
    on each other: no tensor may be an output of one and an input of another.
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


class DeviceCall(Call):
    """A call on one device. While a phase is open, its tensors are kept alive until the phase
    ends."""

    NAME = "cuda"
    __slots__ = ("device",)

    def __init__(self, first: Any) -> None:
        self.native = native()
        self.device = first.device
        self.numel = first.numel()

    def operand(self, flat: Any, elements: int | None = None) -> Operand:
        if flat is None:
            return NOTHING
        self._keep(flat)
        expected = self.numel if elements is None else elements
        if flat.numel() != expected or not flat.is_contiguous():
            raise ValueError(
                f"backend 'cuda': expected contiguous tensors of {expected} elements, got "
                f"{flat.numel()} with strides {tuple(flat.stride())}"
            )
        if str(flat.dtype) not in _DTYPES:
            raise ValueError(f"backend 'cuda': dtype {flat.dtype} is not supported")
        # An empty tensor has no address, but an empty base must not be mistaken for a missing one.
        return flat.data_ptr() or 64, _DTYPES[str(flat.dtype)]

    def counters(self, values: Any, dtype: str = "int64", least: int = 0) -> int:
        self._keep(values)
        if values.numel() < least:
            raise ValueError(f"backend 'cuda': expected {least} counters, got {values.numel()}")
        if str(values.dtype) != f"torch.{dtype}" or not values.is_contiguous():
            raise ValueError(f"backend 'cuda': counters must be contiguous {dtype} tensors")
        return values.data_ptr()

    def strided(self, values: Any, dtype: str) -> tuple[int, int]:
        return self.counters(values, dtype), values.shape[1]

    def end(self, wide: bool, threads: int = 0) -> tuple[int, int, int, int, int]:
        return self.numel, 3 if wide else 0, threads, *_place(self.device)

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
