"""The native library as Python sees it: `pymerge._C`, and the addresses of what it computes with.

The extension is loaded at first use. If it is missing or broken, `import pymerge` still works;
`reason()` keeps the error and says what to do.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from pymerge.ops.arguments import padded
from pymerge.ops.array import Array, Flat
from pymerge.ops.constants import HOT_CHUNK, SUM_CHUNK

__all__ = [
    "NOTHING",
    "build",
    "common_arguments",
    "counters_at",
    "load",
    "native",
    "operand",
    "ranks_at",
    "reason",
    "set_threads",
    "supported_isas",
    "threads",
    "use_isa",
]

# By the code of an array, and by the name of a torch dtype.
_DTYPES = {"F32": 0, "F16": 1, "BF16": 2, "F64": 3}
_DTYPES |= {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}
# An operand that is not there.
NOTHING = (0, 0)
# What `set_threads` was called with last.
_threads: int | None = None


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return `pymerge._C`, or why it cannot be used."""
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
    """Return `pymerge._C`; raise RuntimeError where it cannot be used."""
    module, error = load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {error}")
    return module


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return load()[1]


def build() -> dict[str, Any]:
    """Tell what was built: instruction sets, which one runs, compiler; or the error."""
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
    """Return the instruction sets of this build that this machine can run."""
    module, _ = load()
    return [] if module is None else [name for name, runs in module.isa_list().items() if runs]


def use_isa(name: str) -> None:
    """Switch to the kernels of one instruction set ("baseline", "avx2", "avx512", "auto")."""
    native().use_isa(name)


def threads() -> int:
    """Return how many threads the kernels use."""
    module, _ = load()
    return 1 if module is None else int(module.default_threads())


def set_threads(count: int | None) -> int | None:
    """Set how many threads the kernels use; None means all cores that the process may run on.

    Returns:
        What was set before. `pymerge.ops.threads` sets it for a while.
    """
    global _threads
    before, _threads = _threads, count
    module, _ = load()
    if module is not None:
        module.set_default_threads(count or 0)
    return before


def operand(flat: Flat, numel: int) -> tuple[int, int]:
    """Return address and dtype of an array or tensor of that many elements."""
    if isinstance(flat, Array):
        fits, where, dtype = flat.numel() == numel, "", flat.code
    else:
        contiguous = flat.device.type == "cpu" and flat.is_contiguous()
        fits, dtype = contiguous and flat.numel() == numel, str(flat.dtype)
        where = f" on {flat.device} with strides {tuple(flat.stride())}"
    if not fits:
        raise ValueError(
            f"backend 'cpu': expected contiguous CPU tensors of {numel} elements, got "
            f"{flat.numel()}{where}"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"backend 'cpu': dtype {dtype} is not supported")
    # An empty tensor has no address, but a base that is there must not look like none.
    return flat.data_ptr() or 64, _DTYPES[dtype]


def counters_at(values: Any, dtype: str = "int64", least: int = 0) -> int:
    """Return the address of counters, an array of numpy or a tensor."""
    if isinstance(values, np.ndarray):
        fits = values.flags.c_contiguous and values.dtype == dtype
        count, address = values.size, values.ctypes.data
    else:
        fits = values.device.type == "cpu" and values.is_contiguous()
        fits = fits and str(values.dtype) == f"torch.{dtype}"
        count, address = values.numel(), values.data_ptr()
    if count < least:
        raise ValueError(f"backend 'cpu': expected {least} counters, got {count}")
    if not fits:
        raise ValueError(f"backend 'cpu': counters must be contiguous {dtype} in CPU memory")
    return address


def common_arguments(base: Flat | None, models: Sequence[Flat], wide: bool) -> tuple[Any, ...]:
    """Return what every call has: operands, their length, how to compute, threads."""
    numel = models[0].numel()
    return (
        NOTHING if base is None else operand(base, numel),
        [operand(model, numel) for model in models],
        numel,
        3 if wide else 0,
        0,
    )


def ranks_at(ranks: Any, models: Sequence[Flat]) -> tuple[int, int]:
    """Return address and stride of ranks: [models, numel padded], rows may be apart."""
    if ranks is None:
        return NOTHING
    count, room = ranks.shape
    if count != len(models) or room < padded(models[0].numel()):
        raise ValueError(f"backend 'cpu': ranks of shape {tuple(ranks.shape)} are too few")
    if isinstance(ranks, np.ndarray):
        kind, address = str(ranks.dtype), ranks.ctypes.data
        stride, step = (stride // ranks.itemsize for stride in ranks.strides)
    else:
        kind, address = str(ranks.dtype).removeprefix("torch."), ranks.data_ptr()
        stride, step = ranks.stride()
    if kind != "int32" or step != 1:
        raise ValueError(f"backend 'cpu': ranks must be rows of int32, got {kind}")
    return address, stride
