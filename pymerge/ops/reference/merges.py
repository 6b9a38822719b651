"""The reference backend: pure torch, on any device.

It is the definition; every kernel is tested against it. Arithmetic is in float32 (float64 where
`wide`), models in order, one rounding at the store. Nothing here is fast, and nothing here may be
changed without changing what pymerge computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.reference.comparison import compare
from pymerge.ops.reference.divergence import divergence_sums, row_importance
from pymerge.ops.reference.packed import packed_dots, packed_sum
from pymerge.ops.reference.pcb import pcb_merge, pcb_scores
from pymerge.ops.reference.pointwise import pointwise, row_ranks, row_weighted_sum, sparse_merge
from pymerge.ops.reference.sums import chunk_sums

__all__ = [
    "NAME",
    "SUMMARY",
    "chunk_sums",
    "compare",
    "divergence_sums",
    "magnitude_equal_counts",
    "magnitude_histogram",
    "packed_dots",
    "packed_sum",
    "pcb_merge",
    "pcb_scores",
    "pointwise",
    "reason",
    "row_importance",
    "row_ranks",
    "row_weighted_sum",
    "slots",
    "sparse_merge",
    "ties",
    "weighted_sum",
]

NAME = "reference"
SUMMARY = "pure torch: the definition, slow"


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return None


def _scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _widen(tensor: torch.Tensor, wide: bool) -> torch.Tensor:
    return tensor.to(torch.float64 if wide else torch.float32)


def magnitude_key(delta: torch.Tensor) -> torch.Tensor:
    """Return bits(|delta|) as int64: for finite values, ordered as |delta| is."""
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return (delta.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)


def _infinity(wide: bool) -> int:
    return 0x7FF0000000000000 if wide else 0x7F800000


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
    """sum_k w_k x_k / divisor, or base + scale * (sum_k w_k (x_k - base) / divisor)."""
    origin = None if base is None else _widen(base, wide)
    total = torch.zeros_like(out, dtype=torch.float64 if wide else torch.float32)
    for model, weight in zip(models, weights, strict=True):
        x = _widen(model, wide)
        if origin is not None:
            x = x - origin
        total = total + _scalar(weight, total) * x
    if divisor != 1.0:
        total = total / _scalar(divisor, total)
    if origin is not None:
        total = origin + _scalar(scale, total) * total
    stats[0] += int(not bool(torch.isfinite(total).all()))
    out.copy_(total.to(out.dtype))


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
    """Trim by key, elect, merge what agrees: csrc/math/ties.h, in torch."""
    origin = _widen(base, wide)
    zero = torch.zeros_like(origin)
    one = torch.ones_like(origin)
    vote, kept, infinite = zero, torch.zeros_like(origin, dtype=torch.bool), False
    values = []
    for k, model in enumerate(models):
        delta = _widen(model, wide) - origin
        key = magnitude_key(delta)
        infinite = infinite or bool((key >= _infinity(wide)).any())
        limit = thresholds[k] if wide else min(thresholds[k], 0x7FFFFFFF)
        value = torch.where(key >= limit, delta, zero)
        if weighting == "before":
            value = _scalar(weights[k], value) * value
        values.append(value)
        kept = kept | (magnitude_key(value) != 0)
        ballot = torch.where(value > 0, one, zero) - torch.where(value < 0, one, zero)
        vote = vote + (ballot if elect == "count" else value)
    stats[2] += int(infinite)
    if want_signs:
        stats[0] += int((vote > 0).sum()) - int((vote < 0).sum())
        stats[1] += int(((vote == 0) & kept).sum())
    if out is None:
        return

    elected = torch.where(vote == 0, _scalar(float(zero_sign), vote), vote)
    negative = torch.signbit(elected)
    merged, divisor = zero, zero
    for k, value in enumerate(values):
        aligned = torch.where(negative, -value, value)
        agrees = aligned > 0
        chosen = torch.where(agrees, aligned, zero)
        if weighting == "after":
            chosen = _scalar(weights[k], chosen) * chosen
        merged = torch.maximum(merged, chosen.abs()) if merge == "max" else merged + chosen
        share = _scalar(weights[k], one) * one if merge == "mean_of_weights" else one
        divisor = divisor + torch.where(agrees, share, zero)
    if merge in ("mean_of_count", "mean_of_weights"):
        merged = merged / torch.where(divisor == 0, one, divisor)
    merged = torch.where(elected == 0, zero, merged)
    merged = torch.where(negative, -merged, merged)
    merged = torch.where(vote.isnan(), vote, merged)
    out.copy_((origin + _scalar(scale, merged) * merged).to(out.dtype))


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
    """Count keys below, in and above a bracket of bins, and apart from them those that equal
    `hot`."""
    bins = counts.shape[2] - 3
    origin = _widen(base, wide)
    for k, model in enumerate(models):
        key = magnitude_key(_widen(model, wide) - origin)
        column = torch.where(key < lo[k], -1, ((key - lo[k]) >> shift[k]).clamp(max=bins)) + 1
        column = torch.where(key == hot[k], bins + 2, column)
        counts[0, k] += torch.bincount(column, minlength=bins + 3).to(counts)
        if hot_chunks.shape[1] > 0:
            for j, part in enumerate((key == hot[k]).split(HOT_CHUNK)):
                hot_chunks[k, j] = int(part.sum())


def magnitude_equal_counts(
    counts: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    """Count the elements of each chunk whose key equals `key`."""
    equal = magnitude_key(_widen(model, wide) - _widen(base, wide)) == key
    for j in range(counts.numel()):
        counts[j] = int(equal[j * chunk : (j + 1) * chunk].sum())
