"""The reference of trimmed task vectors, stored as bit masks and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.packed import check_packed, check_partials
from pymerge.ops.reference.sums import added, chunks_of
from pymerge.ops.reference.value import scalar, widened

__all__ = ["packed_dots", "packed_sum", "unpack"]

Tensor = torch.Tensor


def _kept(mask: Tensor, numel: int) -> Tensor:
    """Return the first `numel` bits of a mask as booleans."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.unsqueeze(-1) >> bits) & 1).view(-1)[:numel].bool()


def unpack(mask: Tensor, values: Tensor, base: Tensor) -> Tensor:
    """Return a trimmed task vector in dense form, in float32 (float64 if an input is).

    Args:
        mask: int32 words [ceil(n / 32)]; bit i of word j is set if element 32 j + i is kept.
        values: the model's own values where the mask is set, [kept].
        base: n elements, in any shape.
    """
    wide = torch.float64 in (values.dtype, base.dtype)
    kept = _kept(mask, base.numel())
    return _dense(kept, values, base.detach().reshape(-1), wide).view(base.shape)


def _dense(kept: Tensor, values: Tensor, base: Tensor, wide: bool) -> Tensor:
    dense = widened(torch.zeros_like(base), wide)
    dense[kept] = widened(values, wide) - widened(base[kept], wide)
    return dense


def packed_sum(
    out: Tensor,
    base: Tensor,
    masks: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    weights: Sequence[float],
    wide: bool,
) -> None:
    """out = base + sum_k weights[k] t_k, where t_k is a task vector in dense form."""
    check_packed(masks, values, offsets, base.numel(), "reference")
    origin = widened(base, wide)
    total = torch.zeros_like(origin)
    for weight, mask, own in zip(weights, masks, values, strict=True):
        kept = _kept(mask, base.numel())
        # Elements that are not kept add nothing, not even 0 times an infinite weight.
        delta = _dense(kept, own, base, wide)
        total = torch.where(kept, total + scalar(weight, delta) * delta, total)
    out.copy_(origin + total)


def packed_dots(
    partials: Tensor,
    gradient: Tensor,
    base: Tensor,
    masks: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Sequence[Tensor],
    wide: bool,
) -> None:
    """partials[k, c] = <gradient, t_k> over chunk c, in the summation order of all sums."""
    chunks = check_packed(masks, values, offsets, base.numel(), "reference")
    check_partials(partials, len(masks), chunks, "reference")
    if chunks == 0:
        return
    doubles = gradient.to(torch.float64)
    for k, (mask, own) in enumerate(zip(masks, values, strict=True)):
        kept = _kept(mask, base.numel())
        delta = _dense(kept, own, base, wide).to(torch.float64)
        products = torch.where(kept, doubles * delta, torch.zeros_like(delta))
        partials[k] = added(chunks_of(products, 0))
