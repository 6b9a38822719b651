"""The reference of `ties_` and `ties_signs_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.reference.value import infinity, keys, scalar, widened

__all__ = ["ties"]


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
    """Trim by key, elect signs, merge the values that agree: csrc/math/ties.h in torch."""
    origin = widened(base, wide)
    zero = torch.zeros_like(origin)
    one = torch.ones_like(origin)
    vote, kept, infinite = zero, torch.zeros_like(origin, dtype=torch.bool), False
    values = []
    for k, model in enumerate(models):
        delta = widened(model, wide) - origin
        key = keys(delta)
        infinite = infinite or bool((key >= infinity(wide)).any())
        limit = thresholds[k] if wide else min(thresholds[k], 0x7FFFFFFF)
        value = torch.where(key >= limit, delta, zero)
        if weighting == "before":
            value = scalar(weights[k], value) * value
        values.append(value)
        kept = kept | (keys(value) != 0)
        ballot = torch.where(value > 0, one, zero) - torch.where(value < 0, one, zero)
        vote = vote + (ballot if elect == "count" else value)
    stats[2] += int(infinite)
    if want_signs:
        stats[0] += int((vote > 0).sum()) - int((vote < 0).sum())
        stats[1] += int(((vote == 0) & kept).sum())
    if out is None:
        return

    elected = torch.where(vote == 0, scalar(float(zero_sign), vote), vote)
    negative = torch.signbit(elected)
    merged, divisor = zero, zero
    for k, value in enumerate(values):
        aligned = torch.where(negative, -value, value)
        agrees = aligned > 0
        chosen = torch.where(agrees, aligned, zero)
        if weighting == "after":
            chosen = scalar(weights[k], chosen) * chosen
        merged = torch.maximum(merged, chosen.abs()) if merge == "max" else merged + chosen
        share = scalar(weights[k], one) * one if merge == "mean_of_weights" else one
        divisor = divisor + torch.where(agrees, share, zero)
    if merge in ("mean_of_count", "mean_of_weights"):
        merged = merged / torch.where(divisor == 0, one, divisor)
    merged = torch.where(elected == 0, zero, merged)
    merged = torch.where(negative, -merged, merged)
    merged = torch.where(vote.isnan(), vote, merged)
    out.copy_((origin + scalar(scale, merged) * merged).to(out.dtype))
