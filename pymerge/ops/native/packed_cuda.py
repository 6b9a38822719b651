"""The CUDA backend's `packed_sum_` and `packed_dots_`: csrc/cuda/kernels_packed.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pymerge.ops.native.device import NOTHING, Call
from pymerge.ops.packed import check_packed, check_partials

if TYPE_CHECKING:
    import torch

__all__ = ["packed_dots", "packed_sum"]


def packed_sum(
    out: torch.Tensor,
    base: torch.Tensor,
    masks: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    weights: Sequence[float],
    wide: bool,
) -> None:
    """out = base + sum_k weights[k] t_k."""
    call = Call(out)
    told, chunks = _told(call, base, masks, values, offsets, wide)
    call.native.packed(*told, call.address(out), weights, NOTHING, 0, chunks)


def packed_dots(
    partials: torch.Tensor,
    gradient: torch.Tensor,
    base: torch.Tensor,
    masks: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    wide: bool,
) -> None:
    """partials[k, c] = <gradient, t_k> over chunk c."""
    call = Call(base)
    told, chunks = _told(call, base, masks, values, offsets, wide)
    check_partials(partials, len(masks), chunks, "cuda")
    if chunks == 0:
        return
    counters = call.counters(partials, "float64")
    call.native.packed(*told, NOTHING, [], call.address(gradient), counters, chunks)


def _told(
    call: Call,
    base: torch.Tensor,
    masks: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    wide: bool,
) -> tuple[tuple[Any, ...], int]:
    """Return what both calls begin with, and the number of chunks."""
    chunks = check_packed(masks, values, offsets, base.numel(), "cuda")
    kept = [call.address(own, own.numel()) for own in values]
    common = call.address(base), kept, *call.end(wide)
    words = [call.counters(mask, "int32") for mask in masks]
    return (common, words, [call.counters(offset) for offset in offsets]), chunks
