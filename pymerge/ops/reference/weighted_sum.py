"""The reference of `weighted_sum_` and `task_arithmetic_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.reference.value import scalar, widened

__all__ = ["weighted_sum"]


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
    """Compute sum_k w_k x_k / divisor, or base + scale * (sum_k w_k (x_k - base) / divisor)."""
    origin = None if base is None else widened(base, wide)
    total = torch.zeros_like(out, dtype=torch.float64 if wide else torch.float32)
    for model, weight in zip(models, weights, strict=True):
        x = widened(model, wide)
        if origin is not None:
            x = x - origin
        total = total + scalar(weight, total) * x
    if divisor != 1.0:
        total = total / scalar(divisor, total)
    if origin is not None:
        total = origin + scalar(scale, total) * total
    stats[0] += int(not bool(torch.isfinite(total).all()))
    out.copy_(total.to(out.dtype))
