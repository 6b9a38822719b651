"""The CPU backend: marshals tensors to the C++ kernels of `pymerge._C`.

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

from pymerge.array import Array, Flat
from pymerge.backends.arguments import (
    DIVERGENCE,
    POINTWISE,
    SUMS,
    Kept,
    SparseMerge,
    check_divergences,
    divergence_columns,
    padded,
    sums_shape,
)
from pymerge.backends.cpu_comparison import compare as compare
from pymerge.backends.cpu_packed import packed_dots as packed_dots
from pymerge.backends.cpu_packed import packed_sum as packed_sum
from pymerge.backends.sizes import HOT_CHUNK, SUM_CHUNK

NAME = "cpu"
SUMMARY = "C++ kernels"

# By the code of an array, and by the name of a torch dtype.
_DTYPES = {"F32": 0, "F16": 1, "BF16": 2, "F64": 3}
_DTYPES |= {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}
_WEIGHTING = {"none": 0, "before": 1, "after": 2}
_MERGE = {"mean_of_count": 0, "mean_of_weights": 1, "sum": 2, "max": 3}
_NOTHING = (0, 0)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
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


def _native() -> Any:
    module, error = _load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {error}")
    return module


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return _load()[1]


def build() -> dict[str, Any]:
    """Tell what was built: instruction sets, which one runs, compiler; or the error."""
    module, error = _load()
    if module is None:
        return {"error": error}
    return {
        "isa": module.isa(),
        "isa_built": {name: bool(supported) for name, supported in module.isa_list().items()},
        "compiler": module.compiler,
        "abi_version": module.abi_version,
        "threads": module.default_threads(),
    }


def supported_isas() -> list[str]:
    """Return the instruction sets of this build that this machine can run."""
    module, _ = _load()
    return [] if module is None else [name for name, runs in module.isa_list().items() if runs]


def use_isa(name: str) -> None:
    """Switch to the kernels of one instruction set ("baseline", "avx2", "avx512", "auto")."""
    _native().use_isa(name)


def threads() -> int:
    """Return how many threads the kernels use."""
    module, _ = _load()
    return 1 if module is None else int(module.default_threads())


def set_threads(count: int | None) -> None:
    """Set how many threads the kernels use; None means all cores that the process may run on."""
    module, _ = _load()
    if module is not None:
        module.set_default_threads(count or 0)


def _address(flat: Flat, numel: int) -> tuple[int, int]:
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


def _counters(values: Any, dtype: str = "int64", least: int = 0) -> int:
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


def weighted_sum(
    out: Flat,
    stats: Any,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    wide: bool,
) -> None:
    numel = out.numel()
    nonfinite = _native().weighted_sum(
        _address(out, numel),
        _NOTHING if base is None else _address(base, numel),
        [_address(model, numel) for model in models],
        weights,
        scale,
        divisor,
        numel,
        3 if wide else 0,
        0,
    )
    if nonfinite:
        stats[0] += nonfinite


def streaming_floor(out: Flat, base: Flat | None, models: Sequence[Flat], threads: int = 0) -> None:
    """Read base and models and write out, computing nothing: what benchmarks compare with."""
    numel = out.numel()
    _native().streaming_floor(
        _address(out, numel),
        _NOTHING if base is None else _address(base, numel),
        [_address(model, numel) for model in models],
        [1.0] * len(models),
        1.0,
        1.0,
        numel,
        0,
        threads,
    )


def ties(
    out: Flat | None,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
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
    numel = base.numel()
    _native().ties(
        _NOTHING if out is None else _address(out, numel),
        _counters(stats, least=3),
        _address(base, numel),
        [_address(model, numel) for model in models],
        thresholds,
        weights,
        _WEIGHTING[weighting],
        _MERGE[merge],
        elect == "count",
        zero_sign,
        scale,
        want_signs,
        numel,
        3 if wide else 0,
        0,
    )


def slots() -> int:
    """Return how many slots of counters `magnitude_histogram` can use at once: one a thread."""
    return threads()


def magnitude_histogram(
    counts: Any,
    hot_chunks: Any,
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    wide: bool,
) -> None:
    numel = base.numel()
    slots, count, columns = counts.shape
    if count != len(models):
        raise ValueError(f"backend 'cpu': expected counts of {len(models)} models, got {count}")
    chunks = hot_chunks.shape[1]
    if hot_chunks.shape[0] != count or 0 < chunks < -(-numel // HOT_CHUNK):
        raise ValueError(
            f"backend 'cpu': hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    _native().magnitude_histogram(
        _counters(counts, "int32"),
        _counters(hot_chunks, "int32"),
        chunks,
        _address(base, numel),
        [_address(model, numel) for model in models],
        lo,
        shift,
        hot,
        slots,
        columns - 3,
        numel,
        3 if wide else 0,
        0,
    )


def magnitude_equal_counts(
    counts: Any,
    base: Flat,
    model: Flat,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    numel = base.numel()
    count = counts.shape[0]
    if count != -(-numel // chunk):
        raise ValueError(f"backend 'cpu': expected {-(-numel // chunk)} counts, got {count}")
    _native().magnitude_equal_counts(
        _counters(counts),
        _address(base, numel),
        _address(model, numel),
        key,
        chunk,
        numel,
        3 if wide else 0,
        0,
    )


def _common(base: Flat | None, models: Sequence[Flat], wide: bool) -> tuple[Any, ...]:
    """Return what every call has: operands, their length, how to compute, threads."""
    numel = models[0].numel()
    return (
        _NOTHING if base is None else _address(base, numel),
        [_address(model, numel) for model in models],
        numel,
        3 if wide else 0,
        0,
    )


def _ranked(ranks: Any, models: Sequence[Flat]) -> tuple[int, int]:
    """Return address and stride of ranks: [models, numel padded], rows may be apart."""
    if ranks is None:
        return _NOTHING
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


def sparse_merge(
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    _native().sparse_merge(
        _common(base, models, wide),
        _address(out, models[0].numel()),
        _counters(stats, least=3),
        *kept.numbers(),
        how.factors,
        how.weights,
        how.elect,
        how.divide,
        how.divisor,
        how.scale,
        kept.start,
        how.bare,
        _ranked(kept.ranks, models),
        kept.chances,
        kept.per_element,
    )


def pointwise(
    op: str,
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    reals: Sequence[float],
    wide: bool,
) -> None:
    _native().pointwise(
        _common(base, models, wide),
        _address(out, models[0].numel()),
        _counters(stats, least=3),
        POINTWISE[op],
        reals,
    )


def chunk_sums(
    kind: str,
    partials: Any,
    base: Flat | None,
    models: Sequence[Flat],
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    shape = sums_shape(kind, len(models), models[0].numel(), columns)
    if tuple(partials.shape) != shape:
        raise ValueError(
            f"backend 'cpu': expected partials of shape {shape}, got {tuple(partials.shape)}"
        )
    _native().chunk_sums(
        _common(base, models, wide),
        _counters(partials, "float64"),
        shape[1],
        SUMS[kind],
        columns,
        *kept.numbers(),
        kept.start,
        _ranked(kept.ranks, models),
        kept.chances,
        reals,
    )


def pcb_scores(
    scores: Any,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
) -> None:
    count, stride = scores.shape
    if count != len(models) or stride < padded(base.numel()):
        raise ValueError(f"backend 'cpu': scores of shape {tuple(scores.shape)} are too small")
    _native().pcb(
        _common(base, models, False),
        _NOTHING,
        _counters(stats, least=3),
        _counters(scores, "float32"),
        stride,
        variant,
        reals,
    )


def pcb_merge(
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
) -> None:
    _native().pcb(
        _common(base, models, False),
        _address(out, models[0].numel()),
        _counters(stats, least=3),
        0,
        0,
        variant,
        reals,
    )


def row_ranks(ranks: Any, base: Flat, models: Sequence[Flat], columns: int, wide: bool) -> None:
    _native().row_ranks(_common(base, models, wide), *_ranked(ranks, models), columns)


def row_weighted_sum(
    out: Flat,
    stats: Any,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Any,
    columns: int,
    wide: bool,
) -> None:
    shape = len(models), models[0].numel() // columns
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"backend 'cpu': expected weights of shape {shape}, got {tuple(weights.shape)}"
        )
    _native().row_weighted_sum(
        _common(base, models, wide),
        _address(out, models[0].numel()),
        _counters(stats, least=1),
        _counters(weights, "float64"),
        columns,
    )


def divergence_sums(
    table: Any, base: Flat, model: Flat, kind: str, columns: int, wide: bool
) -> None:
    count = divergence_columns(kind, table, base.numel(), columns, NAME)
    common, address = _common(base, [model], wide), _counters(table, "float64")
    _native().divergence_sums(common, address, count, list(DIVERGENCE).index(kind), columns)


def row_importance(
    out: Flat,
    stats: Any,
    base: Flat,
    model: Flat,
    divergences: Any,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    check_divergences(divergences, base.numel(), columns, NAME)
    _native().row_importance(
        _common(base, [model], wide),
        _address(out, model.numel()),
        _counters(stats, least=3),
        _counters(divergences, "float64"),
        threshold,
        columns,
    )
