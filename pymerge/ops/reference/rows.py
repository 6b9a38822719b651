"""The reference of the ops on rows of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.reference.value import Element, keys, widened

__all__ = ["row_ranks", "row_weighted_sum"]


def row_ranks(
    ranks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    columns: int,
    wide: bool,
) -> None:
    """Rank |delta| within each row; equal magnitudes are ordered by index."""
    for k, model in enumerate(models):
        key = keys(widened(model, wide) - widened(base, wide)).view(-1, columns)
        order = key.sort(dim=1, stable=True).indices
        places = torch.arange(columns, device=key.device).expand_as(order)
        found = torch.empty_like(order).scatter_(1, order, places)
        ranks[k, : key.numel()] = found.reshape(-1).to(torch.int32)


def row_weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: torch.Tensor,
    columns: int,
    wide: bool,
) -> None:
    """Compute a weighted sum with separate weights for each row."""
    element = Element(base, models, wide)
    total = element.zero
    for delta, own in zip(element.deltas, weights, strict=True):
        total = total + own.to(total.dtype).repeat_interleave(columns) * delta
    if base is not None:
        total = element.base + total
    stats[0] += int(not bool(torch.isfinite(total).all()))
    out.copy_(total.to(out.dtype))
