"""The CUDA backend: marshals device tensors to the kernels of `_cuda.so`, by way of `pymerge._C`.

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
from pymerge.backends.cuda_packed import packed_dots as packed_dots
from pymerge.backends.cuda_packed import packed_sum as packed_sum
from pymerge.backends.sizes import HOT_CHUNK

if TYPE_CHECKING:
    import torch

NAME = "cuda"
SUMMARY = "compiled CUDA kernels"

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.so"

# The device type whose tensors are taken; the tests of the kernels on the processor change it.
_KIND = "cuda"
_DTYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}
_WEIGHTING = {"none": 0, "before": 1, "after": 2}
_MERGE = {"mean_of_count": 0, "mean_of_weights": 1, "sum": 2, "max": 3}
_NOTHING = (0, 0)

# Tensors of a phase that is open in this thread: they must live until it ends.
_phase = threading.local()


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
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


def _native() -> Any:
    module, error = _load()
    if module is None:
        raise RuntimeError(f"backend 'cuda' is not available: {error}")
    return module


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return _load()[1]


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
    native, place = _native(), _place(device)
    native.begin(*place)
    _phase.kept = []
    try:
        yield
    finally:
        try:
            native.end(*place)
        finally:
            _phase.kept = None


class _Call:
    """One call: checks that all tensors are on one device, and keeps them for an open phase."""

    def __init__(self, first: torch.Tensor) -> None:
        self.native = _native()
        self.device = first.device
        self.numel = first.numel()

    def address(self, tensor: torch.Tensor | None, elements: int | None = None) -> tuple[int, int]:
        """Return address and dtype of an operand; (0, 0) where there is none.

        elements: how many it has, where that is not what the first tensor of the call has.
        """
        if tensor is None:
            return _NOTHING
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
    call = _Call(out)
    call.native.weighted_sum(
        call.address(out),
        call.address(base),
        call.addresses(models),
        weights,
        scale,
        divisor,
        *call.end(wide),
        stats=call.counters(stats, least=1),
    )


def streaming_floor(
    out: torch.Tensor, base: torch.Tensor | None, models: Sequence[torch.Tensor]
) -> None:
    """Read base and models and write out, computing nothing: what benchmarks compare with."""
    call = _Call(out)
    operands = call.address(out), call.address(base), call.addresses(models)
    call.native.streaming_floor(*operands, [1.0] * len(models), 1.0, 1.0, *call.end(False))


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
    call = _Call(base)
    call.native.ties(
        call.address(out),
        call.counters(stats, least=3),
        call.address(base),
        call.addresses(models),
        thresholds,
        weights,
        _WEIGHTING[weighting],
        _MERGE[merge],
        elect == "count",
        zero_sign,
        scale,
        want_signs,
        *call.end(wide),
    )


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
    call = _Call(base)
    slots, count, columns = counts.shape
    if count != len(models):
        raise ValueError(f"backend 'cuda': expected counts of {len(models)} models, got {count}")
    chunks = hot_chunks.shape[1]
    if hot_chunks.shape[0] != count or 0 < chunks < -(-call.numel // HOT_CHUNK):
        raise ValueError(
            f"backend 'cuda': hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    call.native.magnitude_histogram(
        call.counters(counts, "int32"),
        call.counters(hot_chunks, "int32"),
        chunks,
        call.address(base),
        call.addresses(models),
        lo,
        shift,
        hot,
        slots,
        columns - 3,
        *call.end(wide),
    )


def magnitude_equal_counts(
    counts: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    call = _Call(base)
    expected = -(-call.numel // chunk)
    if counts.numel() != expected:
        raise ValueError(f"backend 'cuda': expected {expected} counts, got {counts.numel()}")
    call.native.magnitude_equal_counts(
        call.counters(counts),
        call.address(base),
        call.address(model),
        key,
        chunk,
        *call.end(wide),
    )


def _ranked(call: _Call, kept: Kept, count: int) -> tuple[int, int]:
    return _NOTHING if kept.ranks is None else call.rows(kept.ranks, count, "int32")


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    call = _Call(out)
    call.native.sparse_merge(
        call.common(base, models, wide),
        call.address(out),
        call.counters(stats, least=3),
        *kept.numbers(),
        how.factors,
        how.weights,
        how.elect,
        how.divide,
        how.divisor,
        how.scale,
        kept.start,
        how.bare,
        _ranked(call, kept, len(models)),
        kept.chances,
        kept.per_element,
    )


def pointwise(
    op: str,
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    wide: bool,
) -> None:
    call = _Call(out)
    common = call.common(base, models, wide)
    call.native.pointwise(
        common, call.address(out), call.counters(stats, least=3), POINTWISE[op], reals
    )


def chunk_sums(
    kind: str,
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    call = _Call(models[0])
    shape = sums_shape(kind, len(models), call.numel, columns)
    call.native.chunk_sums(
        call.common(base, models, wide),
        call.table(partials, shape),
        shape[1],
        SUMS[kind],
        columns,
        *kept.numbers(),
        kept.start,
        _ranked(call, kept, len(models)),
        kept.chances,
        reals,
    )


def pcb_scores(
    scores: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    call = _Call(base)
    common = call.common(base, models, False)
    place = call.rows(scores, len(models), "float32")
    call.native.pcb(common, _NOTHING, call.counters(stats, least=3), *place, variant, reals)


def pcb_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    call = _Call(out)
    common = call.common(base, models, False)
    call.native.pcb(
        common, call.address(out), call.counters(stats, least=3), *_NOTHING, variant, reals
    )


def row_ranks(
    ranks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    columns: int,
    wide: bool,
) -> None:
    """Rank by torch's stable sort, model by model: it runs on the device, too."""
    import torch

    call = _Call(base)
    call.rows(ranks, len(models), "int32")
    call.common(base, models, wide)
    if call.numel == 0:
        return
    float_, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    places = torch.arange(columns, dtype=torch.int32, device=base.device)
    for k, model in enumerate(models):
        delta = model.to(float_) - base.to(float_)
        keys = (delta.view(bits) & torch.iinfo(bits).max).view(-1, columns)
        order = torch.sort(keys, dim=1, stable=True).indices
        rows = ranks[k, : call.numel].view(-1, columns)
        rows.scatter_(1, order, places.expand_as(order))


def row_weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: torch.Tensor,
    columns: int,
    wide: bool,
) -> None:
    call = _Call(out)
    call.native.row_weighted_sum(
        call.common(base, models, wide),
        call.address(out),
        call.counters(stats, least=1),
        call.table(weights, (len(models), call.numel // columns)),
        columns,
    )


def divergence_sums(
    table: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    kind: str,
    columns: int,
    wide: bool,
) -> None:
    call = _Call(base)
    count = divergence_columns(kind, table, call.numel, columns, NAME)
    common, address = call.common(base, [model], wide), call.counters(table, "float64")
    call.native.divergence_sums(common, address, count, list(DIVERGENCE).index(kind), columns)


def row_importance(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    divergences: torch.Tensor,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    call = _Call(out)
    check_divergences(divergences, call.numel, columns, NAME)
    call.native.row_importance(
        call.common(base, [model], wide),
        call.address(out),
        call.counters(stats, least=3),
        call.counters(divergences, "float64"),
        threshold,
        columns,
    )
