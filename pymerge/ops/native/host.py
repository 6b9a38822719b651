"""The native library `pymerge._C`, as used from Python, and calls on host memory.

The extension is loaded at first use. If it is missing or broken, `import pymerge` still works;
`reason()` returns the error and what to do about it.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.ops.array import Array, Flat
from pymerge.ops.constants import HOT_CHUNK, SUM_CHUNK
from pymerge.ops.native.call import NOTHING, Call, Operand

if TYPE_CHECKING:
    import torch

__all__ = [
    "HostCall",
    "build",
    "load",
    "native",
    "reason",
    "set_threads",
    "supported_isas",
    "threads",
    "use_isa",
]

# Keys: the code of an array, the name of a torch dtype, and torch dtypes once they were looked up.
_CODES: dict[Any, int] = {"F32": 0, "F16": 1, "BF16": 2, "F64": 3}
_CODES |= {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}
# The dtypes that counters may have.
_NUMPY = {name: np.dtype(name) for name in ("int32", "int64", "float32", "float64")}
_NAMES: dict[torch.dtype, str] = {}  # of torch dtypes, once they were looked up
# The argument of the last `set_threads`.
_threads: int | None = None


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return `pymerge._C`, or the reason why it cannot be used."""
    try:
        from pymerge import _C
    except ImportError as error:
        return None, (
            f"the native library could not be loaded ({error}); reinstall with a C++17 compiler: "
            "pip install --force-reinstall --no-deps pymerge-kernels"
        )
    wanted = os.environ.get("PYMERGE_CPU_ISA", "") or "auto"
    try:
        _C.use_isa(wanted)
    except (ValueError, RuntimeError) as error:
        return None, f"PYMERGE_CPU_ISA={wanted}: {error}"
    if (_C.hot_chunk, _C.sum_chunk) != (HOT_CHUNK, SUM_CHUNK):
        return None, (
            f"the native library has chunks of {_C.hot_chunk} and {_C.sum_chunk}, expected "
            f"{HOT_CHUNK} and {SUM_CHUNK}"
        )
    return _C, None


def native() -> Any:
    """Return `pymerge._C`; raise RuntimeError if it cannot be used."""
    module, error = load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {error}")
    return module


def reason() -> str | None:
    """Return why the backend cannot be used, or None."""
    return load()[1]


def build() -> dict[str, Any]:
    """Describe the build: instruction sets, the one in use, compiler; or return the error."""
    module, error = load()
    if module is None:
        return {"error": error}
    return {
        "isa": module.isa(),
        "isa_built": {name: bool(supported) for name, supported in module.isa_list().items()},
        "compiler": module.compiler,
        "abi_version": module.abi,
        "threads": module.default_threads(),
    }


def supported_isas() -> list[str]:
    """Return the instruction sets of this build that this machine supports."""
    module, _ = load()
    return [] if module is None else [name for name, runs in module.isa_list().items() if runs]


def use_isa(name: str) -> None:
    """Switch to the kernels of one instruction set ("baseline", "avx2", "avx512", "auto")."""
    native().use_isa(name)


def threads() -> int:
    """Return the number of threads that the kernels use."""
    module, _ = load()
    return 1 if module is None else int(module.default_threads())


def set_threads(count: int | None) -> int | None:
    """Set the number of threads that the kernels use; None means all cores the process may run on.

    Returns:
        The previous setting. `pymerge.ops.threads` sets it temporarily.
    """
    global _threads
    before, _threads = _threads, count
    module, _ = load()
    if module is not None:
        module.set_default_threads(count or 0)
    return before


class HostCall(Call):
    """A call on the CPU: addresses of arrays, torch tensors, and numpy or torch counters.

    Nothing has to be kept alive: a kernel has finished when its call returns.
    """

    NAME = "cpu"
    __slots__ = ()

    def __init__(self, first: Flat) -> None:
        self.native = native()
        self.numel = first.numel()

    def operand(self, flat: Flat | None, elements: int | None = None) -> Operand:
        if flat is None:
            return NOTHING
        numel = self.numel if elements is None else elements
        if isinstance(flat, Array):
            fits, dtype = flat.numel() == numel, flat.code
        else:
            fits = flat.is_cpu and flat.numel() == numel and flat.is_contiguous()
            dtype = flat.dtype
        if not fits:
            where = "" if isinstance(flat, Array) else _lies(flat)
            raise ValueError(
                f"backend 'cpu': expected contiguous CPU tensors of {numel} elements, got "
                f"{flat.numel()}{where}"
            )
        code = _CODES.get(dtype)
        # An empty tensor has no address, but an empty base must not be mistaken for a missing one.
        return flat.data_ptr() or 64, _code(dtype) if code is None else code

    def counters(self, values: Any, dtype: str = "int64", least: int = 0) -> int:
        if isinstance(values, np.ndarray):
            fits = values.dtype == _NUMPY[dtype] and values.flags.c_contiguous
            count, address = values.size, values.__array_interface__["data"][0]
        else:
            fits = values.is_cpu and values.is_contiguous() and _name(values.dtype) == dtype
            count, address = values.numel(), values.data_ptr()
        if count < least:
            raise ValueError(f"backend 'cpu': expected {least} counters, got {count}")
        if not fits:
            raise ValueError(f"backend 'cpu': counters must be contiguous {dtype} in CPU memory")
        return address

    def strided(self, values: Any, dtype: str) -> tuple[int, int]:
        if isinstance(values, np.ndarray):
            fits, address = values.dtype == _NUMPY[dtype], values.ctypes.data
            stride, step = (stride // values.itemsize for stride in values.strides)
        else:
            fits, address = values.is_cpu and _name(values.dtype) == dtype, values.data_ptr()
            stride, step = values.stride()
        if not fits or step != 1:
            raise ValueError(
                f"backend 'cpu': expected rows of {dtype} in CPU memory, got {values.dtype} in "
                f"steps of {step}"
            )
        return address, stride

    def end(self, wide: bool, threads: int = 0) -> tuple[int, int, int, int, int]:
        return self.numel, 3 if wide else 0, threads, -1, 0


def _lies(tensor: torch.Tensor) -> str:
    return f" on {tensor.device} with strides {tuple(tensor.stride())}"


def _code(dtype: Any) -> int:
    """Return the code of a dtype that was not looked up before."""
    code = _CODES.get(str(dtype))
    if code is None:
        raise ValueError(f"backend 'cpu': dtype {dtype} is not supported")
    _CODES[dtype] = code
    return code


def _name(dtype: torch.dtype) -> str:
    """Return numpy's name of a torch dtype."""
    name = _NAMES.get(dtype)
    return name or _NAMES.setdefault(dtype, str(dtype).removeprefix("torch."))
