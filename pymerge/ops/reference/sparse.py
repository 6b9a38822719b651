"""The reference of sparse merges: selecting the elements of task vectors, and merging them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.arguments import Kept, SparseMerge
from pymerge.ops.reference.value import keys, scalar, widened

__all__ = ["kept_values", "mask_hash", "sparse_merge"]

_WORD = 0xFFFFFFFF


def mask_hash(index: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """Return the hash of flat indices (int64, their low 32 bits) as int64 in [0, 2^32)."""
    # Products of two 32-bit numbers overflow int64, but their low 32 bits are right.
    x = index & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return ((x ^ (x >> 16)) * (second | 1) + first) & _WORD


def kept_values(delta: torch.Tensor, k: int, kept: Kept) -> torch.Tensor:
    """Return task vector k with zeros in place of the elements that are not kept."""
    zero = torch.zeros_like(delta)
    drawn = torch.zeros_like(delta, dtype=torch.int64)
    if kept.seeds:
        index = torch.arange(kept.start, kept.start + delta.numel(), device=delta.device)
        drawn = mask_hash(index, kept.seeds[2 * k], kept.seeds[2 * k + 1])
    if kept.ranks is None:
        key = keys(delta)
        mask = (key >= kept.lo[k]) & (key <= kept.last[k])
        if kept.seeds:
            mask &= drawn <= kept.limits[k]
        return torch.where(mask, delta, zero)
    rank = torch.as_tensor(kept.ranks)[k, : delta.numel()]
    if not kept.chances:
        return torch.where((rank >= kept.lo[k]) & (rank <= kept.last[k]), delta, zero)
    first, step = (scalar(value, delta) for value in kept.chances[2 * k : 2 * k + 2])
    chance = first + rank.to(delta.dtype) * step
    mask = (drawn >> 8).to(delta.dtype) * scalar(2.0**-24, delta) < chance
    return torch.where(mask, delta / chance if kept.per_element else delta, zero)


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    """Compute base + scale * merge_k w_k (f_k kept_k(delta_k)): DARE (Yu et al. 2024), Breadcrumbs
    (Davari & Belilovsky 2024), DELLA (Deep et al. 2024). `elect` adds the election of signs of
    TIES, where zeros elect +."""
    origin = widened(base, wide)
    zero, one = torch.zeros_like(origin), torch.ones_like(origin)
    vote, values, infinite = zero, [], False
    for k, model in enumerate(models):
        delta = widened(model, wide) - origin
        infinite = infinite or not bool(torch.isfinite(delta).all())
        value = scalar(how.factors[k], delta) * kept_values(delta, k, kept)
        value = scalar(how.weights[k], delta) * value
        values.append(value)
        vote = vote + value
    stats[2] += int(infinite)
    merged, negative = vote, torch.signbit(vote)
    if how.elect:
        merged, total = zero, zero
        for value, weight in zip(values, how.weights, strict=True):
            aligned = torch.where(negative, -value, value)
            agrees = ~(aligned <= 0)
            merged = merged + torch.where(agrees, aligned, zero)
            total = total + torch.where(agrees, scalar(weight, one) * one, zero)
        if how.divide:
            merged = merged / torch.where(total == 0, one, total)
    if how.divisor != 1.0:
        merged = merged / scalar(how.divisor, merged)
    if how.elect:
        merged = torch.where(vote.isnan(), vote, torch.where(negative, -merged, merged))
    added = scalar(how.scale, merged) * merged
    out.copy_((added if how.bare else origin + added).to(out.dtype))
