"""The reference of sparse merges, pointwise methods and sums: see `pymerge.backends.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.backends.sizes import SUM_CHUNK, SUM_LANES

__all__ = ["chunk_sums", "consensus", "gram", "magmax", "nearswap", "ram", "sparse_merge"]

_LARGEST = 0x7FFFFFFF
_WORD = 0xFFFFFFFF


def widened(tensor: torch.Tensor, wide: bool) -> torch.Tensor:
    return tensor.to(torch.float64 if wide else torch.float32)


def scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def keys(delta: torch.Tensor) -> torch.Tensor:
    """Return bits(|delta|) as int64."""
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return (delta.view(torch.int32) & _LARGEST).to(torch.int64)


def mask_hash(index: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """Return the hash of flat indices (int64, their low halves) as int64 in [0, 2^32)."""
    # Products of two 32-bit numbers overflow int64, but their low halves are right.
    x = (index & _WORD) ^ first
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) + second) & _WORD
    x = x ^ (x >> 16)
    x = (x * 0x846CA68B) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x9E3779B1) & _WORD
    return x ^ (x >> 16)


def kept_mask(
    delta: torch.Tensor,
    k: int,
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    start: int,
) -> torch.Tensor:
    """Return which elements of a task vector are kept: lo <= key <= last, and drawn."""
    key = keys(delta)
    kept = (key >= lo[k]) & (key <= last[k])
    if seeds:
        index = torch.arange(start, start + delta.numel(), device=delta.device)
        kept &= mask_hash(index, seeds[2 * k], seeds[2 * k + 1]) <= limits[k]
    return kept


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    factors: Sequence[float],
    weights: Sequence[float],
    elect: bool,
    divide: bool,
    divisor: float,
    scale: float,
    start: int,
    wide: bool,
) -> None:
    """base + scale * merge_k w_k (f_k kept_k(delta_k)): DARE (Yu et al. 2024), Breadcrumbs
    (Davari & Belilovsky 2024); with `elect`, TIES' election of signs, where zeros elect +."""
    origin = widened(base, wide)
    zero, one = torch.zeros_like(origin), torch.ones_like(origin)
    vote, values, infinite = zero, [], False
    for k, model in enumerate(models):
        delta = widened(model, wide) - origin
        infinite = infinite or not bool(torch.isfinite(delta).all())
        kept = kept_mask(delta, k, lo, last, seeds, limits, start)
        value = scalar(factors[k], delta) * torch.where(kept, delta, zero)
        value = scalar(weights[k], delta) * value
        values.append(value)
        vote = vote + value
    stats[2] += int(infinite)
    merged, negative = vote, torch.signbit(vote)
    if elect:
        merged, total = zero, zero
        for value, weight in zip(values, weights, strict=True):
            aligned = torch.where(negative, -value, value)
            agrees = ~(aligned <= 0)
            merged = merged + torch.where(agrees, aligned, zero)
            total = total + torch.where(agrees, scalar(weight, one) * one, zero)
        if divide:
            merged = merged / torch.where(total == 0, one, total)
    if divisor != 1.0:
        merged = merged / scalar(divisor, merged)
    if elect:
        merged = torch.where(vote.isnan(), vote, torch.where(negative, -merged, merged))
    out.copy_((origin + scalar(scale, merged) * merged).to(out.dtype))


def _note_infinite(stats: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    stats[2] += int(not all(bool(torch.isfinite(tensor).all()) for tensor in tensors))


def nearswap(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    t: float,
    wide: bool,
) -> None:
    """w b + (1 - w) a with w = clamp(t / max(|a - b|, 1e-6), 0, 1): mergekit's nearswap."""
    a, b = widened(base, wide), widened(model, wide)
    _note_infinite(stats, [a, b])
    one, least = scalar(1.0, a), scalar(1e-6, a)
    distance = (a - b).abs()
    distance = torch.where(distance < least, least, distance)
    weight = scalar(t, a) / distance
    weight = torch.where(weight > one, one, weight)
    weight = torch.where(weight < 0, torch.zeros_like(weight), weight)
    out.copy_((weight * b + (one - weight) * a).to(out.dtype))


def ram(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    factors: Sequence[float],
    epsilon: float,
    wide: bool,
) -> None:
    """RAM: mean of the task vectors with |delta| > epsilon; where one has, its own times f_k."""
    origin = widened(base, wide)
    zero, one = torch.zeros_like(origin), torch.ones_like(origin)
    total, scaled, count = zero, zero, zero
    _note_infinite(stats, [base, *models])
    for model, factor in zip(models, factors, strict=True):
        delta = widened(model, wide) - origin
        active = delta.abs() > scalar(epsilon, delta)
        total = total + torch.where(active, delta, zero)
        scaled = scaled + torch.where(active, scalar(factor, delta) * delta, zero)
        count = count + torch.where(active, one, zero)
    mean = total / torch.where(count > one, count, one)
    out.copy_((origin + torch.where(count == one, scaled, mean)).to(out.dtype))


def magmax(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    scale: float,
    wide: bool,
) -> None:
    """MagMax (Marczak et al. 2024): each element of the task vector where it is largest."""
    origin = widened(base, wide)
    best = torch.zeros_like(origin)
    _note_infinite(stats, [base, *models])
    for model in models:
        delta = widened(model, wide) - origin
        best = torch.where(keys(delta) > keys(best), delta, best)
    out.copy_((origin + scalar(scale, best) * best).to(out.dtype))


def consensus(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    thresholds: Sequence[float],
    scale: float,
    need: int,
    wide: bool,
) -> None:
    """Consensus TA (Wang et al. 2024): task arithmetic where >= need TALL masks are set."""
    origin = widened(base, wide)
    one, zero = torch.ones_like(origin), torch.zeros_like(origin)
    _note_infinite(stats, [base, *models])
    total = zero
    for model in models:
        total = total + (widened(model, wide) - origin)
    merged = origin + scalar(scale, total) * total
    count = zero
    for model, threshold in zip(models, thresholds, strict=True):
        x = widened(model, wide)
        own = (x - origin).abs() > scalar(threshold, x) * (merged - x).abs()
        count = count + torch.where(own, one, zero)
    kept = torch.where(count >= need, total, zero)
    out.copy_((origin + scalar(scale, total) * kept).to(out.dtype))


def _chunked(values: torch.Tensor) -> torch.Tensor:
    """Return values as doubles [chunks, steps, lanes], padded with zeros."""
    chunks = -(-values.numel() // SUM_CHUNK)
    padded = torch.zeros(chunks * SUM_CHUNK, dtype=torch.float64, device=values.device)
    padded[: values.numel()] = values.to(torch.float64)
    return padded.view(chunks, SUM_CHUNK // SUM_LANES, SUM_LANES)


def chunk_sums(values: torch.Tensor) -> torch.Tensor:
    """Add up chunks of doubles, each lane in order, then the lanes: the order of all backends."""
    steps = _chunked(values)
    lanes = torch.zeros_like(steps[:, 0])
    for step in steps.unbind(1):
        lanes = lanes + step
    total = torch.zeros_like(lanes[:, 0])
    for lane in lanes.unbind(1):
        total = total + lane
    return total


def sparse_sums(
    partials: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    start: int,
    wide: bool,
) -> None:
    """partials[2k] = chunk sums of |delta_k|, partials[2k + 1] of what is kept of it."""
    origin = widened(base, wide)
    for k, model in enumerate(models):
        delta = widened(model, wide) - origin
        kept = kept_mask(delta, k, lo, last, seeds, limits, start)
        partials[2 * k] = chunk_sums(delta.abs())
        partials[2 * k + 1] = chunk_sums(torch.where(kept, delta, torch.zeros_like(delta)).abs())


def gram(
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    wide: bool,
) -> None:
    """partials[row] = chunk sums of x_i x_j, i <= j row by row, x the models or their deltas."""
    vectors = [widened(model, wide) for model in models]
    if base is not None:
        vectors = [vector - widened(base, wide) for vector in vectors]
    doubles = [vector.to(torch.float64) for vector in vectors]
    row = 0
    for i, first in enumerate(doubles):
        for second in doubles[i:]:
            partials[row] = chunk_sums(first * second)
            row += 1
