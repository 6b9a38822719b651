"""Shared parts of the Triton backend: importing triton, checking tensors, launching kernels.

Triton is not a dependency. It is imported when the backend is first used; until then `reason()`
only looks at what is installed. With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on
CPU tensors; this is slow and meant for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "asked",
    "check",
    "check_counters",
    "check_ranks",
    "check_reals",
    "check_shape",
    "device",
    "interprets",
    "kernels",
    "largest",
    "loops_over",
    "reason",
    "row_of",
    "run",
    "tables",
]

_KERNELS = "pymerge.triton_kernels"
_OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def interprets() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors, instead of on a GPU."""
    kernels = sys.modules.get(f"{_KERNELS}.value")
    if kernels is not None:  # the mode was fixed when they were defined
        return bool(kernels.INTERPRETED.value)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device() -> str:
    """Return the device type of the tensors that the backend accepts."""
    return "cpu" if interprets() else "cuda"


def reason() -> str | None:
    """Return why the backend cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'pymerge-kernels[triton]'"
    if not interprets() and not torch.cuda.is_available():
        return "torch sees no GPU (with TRITON_INTERPRET=1 the kernels run on the CPU, slowly)"
    return _load()[1]


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Return the imported kernels (with triton), or the error."""
    wanted = interprets()
    try:
        triton = importlib.import_module("triton")
        version = re.match(r"(\d+)\.(\d+)", triton.__version__)
        if version is None or tuple(map(int, version.groups())) < _OLDEST:
            least = ".".join(map(str, _OLDEST))
            return None, f"triton {triton.__version__} is too old; {least} or newer is needed"
        # Triton fixed the mode of its library's functions when it was imported.
        defined = type(triton.language.sum).__name__ == "InterpretedFunction"
        if defined != wanted:
            return None, "TRITON_INTERPRET changed after triton was imported"
        if not wanted:
            triton.runtime.driver.active.get_current_target()
        return importlib.import_module(f"{_KERNELS}.launch"), None
    except (ImportError, RuntimeError, OSError) as error:
        return None, f"the kernels could not be loaded ({type(error).__name__}: {error})"


def kernels() -> Any:
    module, error = _load()
    if module is None:
        raise RuntimeError(f"backend 'triton' is not available: {error}")
    return module


def check(numel: int, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError for tensors that a kernel would read out of bounds."""
    kind = device()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != kind or not tensor.is_contiguous() or tensor.numel() != numel:
            raise ValueError(
                f"backend 'triton': expected contiguous {kind} tensors of {numel} elements, got "
                f"{tensor.numel()} on {tensor.device} with strides {tuple(tensor.stride())}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"backend 'triton': dtype {tensor.dtype} is not supported")
        if kind == "cuda" and tensor.data_ptr() % tensor.itemsize != 0:
            raise ValueError("backend 'triton': a tensor is not aligned to its elements")


def check_counters(tensor: torch.Tensor, dtype: torch.dtype, least: int = 0) -> None:
    if tensor.numel() < least:
        raise ValueError(f"backend 'triton': expected {least} counters, got {tensor.numel()}")
    if tensor.dtype != dtype or tensor.device.type != device() or not tensor.is_contiguous():
        raise ValueError(
            f"backend 'triton': counters must be contiguous {dtype} {device()} tensors"
        )


def check_shape(
    name: str, table: torch.Tensor, dtype: torch.dtype, rows: int, columns: int
) -> None:
    """Raise ValueError unless a table has `rows` rows of at least `columns` columns."""
    fits = table.dim() == 2 and table.shape[0] == rows and table.shape[1] >= columns
    if not fits or table.dtype != dtype or (columns > 1 and table.stride(1) != 1):
        raise ValueError(
            f"backend 'triton': {name}: expected {rows} rows of {columns} {dtype} or more, got "
            f"{tuple(table.shape)} of {table.dtype} with strides {tuple(table.stride())}"
        )


def check_ranks(ranks: torch.Tensor | None, count: int, numel: int) -> int:
    """Return the stride of the rows of ranks."""
    if ranks is None:
        return 0
    check_shape("ranks", ranks, torch.int32, count, numel)
    return ranks.stride(0)


def check_reals(what: str, reals: Sequence[float], wanted: int, count: int) -> None:
    """Raise ValueError if a kernel would read past the end of `reals`."""
    if len(reals) != wanted:
        raise ValueError(
            f"backend 'triton': {what}: expected {wanted} numbers for {count} models, got "
            f"{len(reals)}"
        )


def asked(what: str, number: float, least: int, count: int) -> int:
    """Return the number of the model that a call refers to."""
    if not least <= number < count:
        raise ValueError(
            f"backend 'triton': {what}: expected a model from {least} to {count - 1}, got {number}"
        )
    return int(number)


def loops_over(kernel: str, models: Sequence[torch.Tensor]) -> bool:
    """Return whether a kernel loops over that many models instead of being compiled for them."""
    return len(models) > kernels().unrolled(kernel)


def run(
    kernel: str,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    arguments: dict[str, Any],
    integers: Sequence[int],
    numbers: Sequence[float],
    wide: bool,
    scratch: tuple[str, ...] = (),
    units: int = 1,
    span: int | None = None,
) -> None:
    """Run a kernel over all elements of `base` and the models.

    integers, numbers: the tables that the kernel reads. scratch: the arguments that it adds to,
    besides the flag among the integers. units, span: see `Launch`.
    """
    module = kernels()
    loops = loops_over(kernel, models)
    where, numel = models[0].device, models[0].numel()
    rows = [number for model in models for number in row_of(model)] if loops else []
    head, rest, floats = tables(where, integers, rows, numbers, wide)
    told = {
        "base": base,
        "models": rest if loops else tuple(models),
        "integers": head,
        "numbers": floats,
        "count": len(models),
        "numel": numel,
        "MODELS": 0 if loops else len(models),
        "ALIGNED": loops and all(model.data_ptr() % 16 == 0 for model in models),
    }
    inputs = models if base is None else (base, *models)
    module.run(
        module.Launch(
            kernel,
            {**arguments, **told},
            numel=numel,
            models=len(models),
            device=where,
            dtypes=tuple(tensor.dtype for tensor in inputs),
            scratch=(*scratch, "integers"),
            units=units,
            span=span,
        )
    )


def row_of(model: torch.Tensor) -> tuple[int, int]:
    """Return a model's row in the table of a kernel that loops over them."""
    return model.data_ptr(), kernels().CODES[str(model.dtype).removeprefix("torch.")]


def tables(
    where: torch.device,
    integers: Sequence[int],
    rows: Sequence[int],
    numbers: Sequence[float],
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy the numbers of a call to its device, in one transfer that waits for nothing.

    If they were arguments of the kernel, some values of integers would trigger a recompilation, and
    floats would lose their lower half.
    """
    dtype = torch.float64 if wide else torch.float32
    floats = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    first = len(integers) + len(integers) % 2  # each part begins at a multiple of 16 bytes
    second = first + len(rows)
    table = torch.zeros(second + len(numbers), dtype=torch.int64, pin_memory=where.type == "cuda")
    table[: len(integers)] = torch.tensor(integers, dtype=torch.int64)
    table[first:second] = torch.tensor(rows, dtype=torch.int64)
    table[second:].view(dtype)[: len(numbers)] = floats
    table = table.to(where, non_blocking=True)
    return table[:first], table[first:second], table[second:].view(dtype)


def largest(wide: bool) -> int:
    """Return the largest possible key."""
    return 0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF
