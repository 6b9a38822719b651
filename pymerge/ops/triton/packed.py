"""The Triton backend's `packed_sum_` and `packed_dots_`: triton_kernels/packed.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.packed import check_packed, check_partials
from pymerge.ops.triton.library import (
    check,
    check_counters,
    kernels,
    loops_over,
    row_of,
    tables,
)

__all__ = ["packed_dots", "packed_sum"]

Tensors = Sequence[torch.Tensor]


def packed_sum(
    out: torch.Tensor,
    base: torch.Tensor,
    masks: Tensors,
    values: Tensors,
    offsets: Tensors,
    weights: Sequence[float],
    wide: bool,
) -> None:
    """Compute out = base + sum_k weights[k] t_k."""
    numel = base.numel()
    _check(masks, values, offsets, base, out)
    if len(weights) != len(values):
        raise ValueError(
            f"backend 'triton': expected {len(values)} weights, one for each model, got "
            f"{len(weights)}"
        )
    if numel > 0:
        arguments = {"out": out, "base": base, "count": len(values)}
        _run("packed_sum", arguments, masks, values, offsets, weights, wide, units=1)


def packed_dots(
    partials: torch.Tensor,
    gradient: torch.Tensor,
    base: torch.Tensor,
    masks: Tensors,
    values: Tensors,
    offsets: Tensors,
    wide: bool,
) -> None:
    """Compute partials[k, c] = <gradient, t_k> over chunk c."""
    chunks = _check(masks, values, offsets, base, gradient)
    check_partials(partials, len(masks), chunks, "triton")
    check_counters(partials, torch.float64)
    if chunks == 0:
        return
    units = len(values) if loops_over("packed_dots", values) else 1
    arguments = {
        "partials": partials,
        "gradient": gradient,
        "base": base,
        "chunks": chunks,
        "units": units,
    }
    _run("packed_dots", arguments, masks, values, offsets, [0.0], wide, units)


def _check(
    masks: Tensors, values: Tensors, offsets: Tensors, base: torch.Tensor, other: torch.Tensor
) -> int:
    """Raise ValueError if a kernel would read out of bounds; return the number of chunks."""
    chunks = check_packed(masks, values, offsets, base.numel(), "triton")
    check(base.numel(), base, other)
    for mask, own, offset in zip(masks, values, offsets, strict=True):
        check(own.numel(), own)
        check_counters(mask, torch.int32)
        check_counters(offset, torch.int64)
    return chunks


def _run(
    kernel: str,
    arguments: dict[str, Any],
    masks: Tensors,
    values: Tensors,
    offsets: Tensors,
    numbers: Sequence[float],
    wide: bool,
    units: int,
) -> None:
    module, base, loops = kernels(), arguments["base"], loops_over(kernel, values)
    rows = [
        number
        for mask, own, offset in zip(masks, values, offsets, strict=True)
        for number in (*row_of(own), mask.data_ptr(), offset.data_ptr())
    ]
    _, table, floats = tables(base.device, [], rows if loops else [], numbers, wide)
    told = {
        "values": table if loops else tuple(values),
        "masks": None if loops else tuple(masks),
        "offsets": None if loops else tuple(offsets),
        "numbers": floats,
        "numel": base.numel(),
        "MODELS": 0 if loops else len(values),
    }
    module.run(
        module.Launch(
            kernel,
            {**arguments, **told},
            numel=base.numel(),
            models=len(values),
            device=base.device,
            dtypes=(base.dtype, *(own.dtype for own in values)),
            units=units,
            span=-(-base.numel() // SUM_CHUNK) * SUM_CHUNK,
        )
    )
