"""The Triton backend: marshals tensors to the kernels of `pymerge.triton_kernels`.

Triton is not a dependency. It is imported when the backend is first used; until then `reason()`
answers from what is installed. With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on
CPU tensors: that is slow and for tests.
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

from pymerge.backends.sizes import HOT_CHUNK

NAME = "triton"
SUMMARY = "Triton kernels"

_KERNELS = "pymerge.triton_kernels"
_OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def interprets() -> bool:
    """Tell whether kernels run in Triton's interpreter, on CPU tensors, instead of on a GPU."""
    kernels = sys.modules.get(f"{_KERNELS}.value")
    if kernels is not None:  # it was decided when they were defined
        return bool(kernels.INTERPRETED.value)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device() -> str:
    """Return the type of device whose tensors the backend takes."""
    return "cpu" if interprets() else "cuda"


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'pymerge-kernels[triton]'"
    if not interprets() and not torch.cuda.is_available():
        return "torch sees no GPU (with TRITON_INTERPRET=1 the kernels run on the CPU, slowly)"
    return _load()[1]


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Import the kernels, and with them triton; or return the error."""
    wanted = interprets()
    try:
        triton = importlib.import_module("triton")
        version = re.match(r"(\d+)\.(\d+)", triton.__version__)
        if version is None or tuple(map(int, version.groups())) < _OLDEST:
            least = ".".join(map(str, _OLDEST))
            return None, f"triton {triton.__version__} is too old; {least} or newer is needed"
        # Functions of Triton's library were defined when it was imported, for one way or the other.
        defined = type(triton.language.sum).__name__ == "InterpretedFunction"
        if defined != wanted:
            return None, "TRITON_INTERPRET changed after triton was imported"
        if not wanted:
            triton.runtime.driver.active.get_current_target()
        return importlib.import_module(f"{_KERNELS}.launch"), None
    except (ImportError, RuntimeError, OSError) as error:
        return None, f"the kernels could not be loaded ({type(error).__name__}: {error})"


def _kernels() -> Any:
    module, error = _load()
    if module is None:
        raise RuntimeError(f"backend 'triton' is not available: {error}")
    return module


def _check(numel: int, *tensors: torch.Tensor | None) -> None:
    """Refuse tensors that a kernel would read past the ends of."""
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


def _check_counters(tensor: torch.Tensor, dtype: torch.dtype, least: int = 0) -> None:
    if tensor.numel() < least:
        raise ValueError(f"backend 'triton': expected {least} counters, got {tensor.numel()}")
    if tensor.dtype != dtype or tensor.device.type != device() or not tensor.is_contiguous():
        raise ValueError(
            f"backend 'triton': counters must be contiguous {dtype} {device()} tensors"
        )


def _run(
    kernel: str,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    arguments: dict[str, Any],
    integers: Sequence[int],
    numbers: Sequence[float],
    wide: bool,
    scratch: tuple[str, ...],
) -> None:
    """Run a kernel over all elements of `base` and the models.

    integers, numbers: what the kernel reads from its tables. scratch: the arguments it adds to,
    beside the flag among the integers.
    """
    kernels = _kernels()
    looped = len(models) > kernels.UNROLLED
    rows = [number for model in models for number in _row(model)] if looped else []
    head, rest, floats = _tables(base.device, integers, rows, numbers, wide)
    told = {
        "models": rest if looped else tuple(models),
        "integers": head,
        "numbers": floats,
        "count": len(models),
        "numel": base.numel(),
        "MODELS": 0 if looped else len(models),
        "ALIGNED": looped and all(model.data_ptr() % 16 == 0 for model in models),
    }
    kernels.run(
        kernels.Launch(
            kernel,
            {**arguments, **told},
            numel=base.numel(),
            models=len(models),
            device=base.device,
            dtypes=(base.dtype, *(model.dtype for model in models)),
            scratch=(*scratch, "integers"),
        )
    )


def _row(model: torch.Tensor) -> tuple[int, int]:
    """Return a model's row in the table of a kernel that loops over them."""
    return model.data_ptr(), _kernels().CODES[str(model.dtype).removeprefix("torch.")]


def _tables(
    where: torch.device,
    integers: Sequence[int],
    rows: Sequence[int],
    numbers: Sequence[float],
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the numbers of a call on its device, in one copy that waits for nothing.

    As arguments of the kernel, integers would make it compile again for some of their values, and
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


def weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    wide: bool,
) -> None:
    _check(out.numel(), out, base, *models)
    _check_counters(stats, torch.int64, least=1)
    if out.numel() == 0:
        return
    arguments = {"out": out, "stats": stats, "base": base, "DIVIDE": divisor != 1.0}
    _run(
        "weighted_sum",
        out if base is None else base,
        models,
        arguments,
        [0],
        [scale, divisor, *weights],
        wide,
        scratch=("stats",),
    )


def ties(
    out: torch.Tensor | None,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    thresholds: Sequence[int],
    weights: Sequence[float],
    weighting: str,
    merge: str,
    elect: str,
    zero_sign: int,
    scale: float,
    want_signs: bool,
    wide: bool,
) -> None:
    _check(base.numel(), out, base, *models)
    _check_counters(stats, torch.int64, least=3)
    if base.numel() == 0:
        return
    arguments = {
        "out": out,
        "stats": stats,
        "base": base,
        "WEIGHTING": weighting,
        "MERGE": merge,
        "ELECT": elect,
        "ZERO_SIGN": zero_sign,
        "SIGNS": want_signs,
    }
    limits = [min(max(threshold, 0), _largest(wide)) for threshold in thresholds]
    scales = weights if len(weights) > 0 else [1.0] * len(models)
    _run(
        "ties",
        base,
        models,
        arguments,
        [0, *limits],
        [scale, *scales],
        wide,
        scratch=("stats",),
    )


def _largest(wide: bool) -> int:
    """Return the largest key that there is."""
    return 0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF


def slots() -> int:
    """Return how many slots of counters `magnitude_histogram` can use at once."""
    return 1


def magnitude_histogram(
    counts: torch.Tensor,
    hot_chunks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    wide: bool,
) -> None:
    numel = base.numel()
    count, columns = counts.shape[1:]
    needed, chunks = max(1, -(-numel // HOT_CHUNK)), hot_chunks.shape[1]
    if count != len(models):
        raise ValueError(f"backend 'triton': expected counts of {len(models)} models, got {count}")
    if hot_chunks.shape[0] != count or 0 < chunks < needed:
        raise ValueError(
            f"backend 'triton': hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    if not all(0 <= key <= _largest(wide) for key in lo):
        raise ValueError(f"backend 'triton': lo: expected keys, got {list(lo)}")
    if not all(0 <= bits < (64 if wide else 32) for bits in shift):
        raise ValueError(f"backend 'triton': shift: expected bits of a key, got {list(shift)}")
    _check(numel, base, *models)
    _check_counters(counts, torch.int32)
    _check_counters(hot_chunks, torch.int32)
    if chunks > 0:
        hot_chunks[:, :needed].zero_()
    if numel == 0:
        return
    # No key is -1.
    guesses = [key if 0 <= key <= _largest(wide) else -1 for key in hot]
    bins = columns - 3
    spans = [
        min(bins << bits, _largest(wide) - key + 1) - 1 for key, bits in zip(lo, shift, strict=True)
    ]
    brackets = [number for row in zip(lo, spans, shift, guesses, strict=True) for number in row]
    arguments = {
        "counts": counts,
        "hot_chunks": hot_chunks if chunks > 0 else None,
        "base": base,
        "bins": bins,
        "chunks": chunks,
    }
    _run(
        "magnitude_histogram",
        base,
        models,
        arguments,
        brackets,
        [0.0],
        wide,
        scratch=("counts", "hot_chunks"),
    )


def magnitude_equal_counts(
    counts: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    numel = base.numel()
    if chunk < 1 or counts.numel() != -(-numel // chunk):
        raise ValueError(
            f"backend 'triton': expected one count for each {chunk} of {numel} elements, got "
            f"{counts.numel()}"
        )
    _check(numel, base, model)
    _check_counters(counts, torch.int64)
    if numel == 0:
        return
    if not 0 <= key <= _largest(wide):
        counts.zero_()
        return
    kernels = _kernels()
    integers, _, numbers = _tables(base.device, [key], [], [0.0], wide)
    kernels.run(
        kernels.Launch(
            "magnitude_equal_counts",
            {
                "counts": counts,
                "base": base,
                "model": model,
                "integers": integers,
                "numbers": numbers,
                "chunk": chunk,
                "numel": numel,
            },
            numel=numel,
            models=1,
            device=base.device,
            dtypes=(base.dtype, model.dtype),
            programs=counts.numel(),
        )
    )
