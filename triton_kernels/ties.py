# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""TIES: trim, elect sign, disjoint merge, in every dialect. The twin of csrc/math/ties.h.

Like that header, it sums magnitudes and puts the sign back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .value import (
    ROW,
    divide,
    flip,
    is_nonfinite,
    load,
    load_row,
    magnitude_key,
    raise_flag,
    sign_bit,
    store,
)


@triton.jit
def _trim(
    x: tl.tensor, origin: tl.tensor, threshold: tl.tensor, weight: tl.tensor,
    WEIGHTING: tl.constexpr,
):  # fmt: skip
    """Return what one model votes with, and the key of its delta."""
    delta = x - origin
    key = magnitude_key(delta)
    value = tl.where(key >= threshold, delta, 0.0)
    if WEIGHTING == "before":
        value = weight * value
    return value, key


@triton.jit
def _ballot(value: tl.tensor, ELECT: tl.constexpr):
    if ELECT == "count":
        value = tl.where(value > 0, 1.0, 0.0) - tl.where(value < 0, 1.0, 0.0)
    return value


@triton.jit
def _merge(
    value: tl.tensor, sign: tl.tensor, weight: tl.tensor, merged: tl.tensor, divisor: tl.tensor,
    WEIGHTING: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Add one model to the merged magnitude and to its divisor, if it agrees."""
    aligned = flip(value, sign)
    agrees = aligned > 0
    chosen = tl.where(agrees, aligned, 0.0)
    if WEIGHTING == "after":
        chosen = weight * chosen
    if MERGE == "max":
        size = magnitude_key(chosen).to(chosen.dtype, bitcast=True)
        merged = tl.where((size > merged) | (size != size), size, merged)
    else:
        merged = merged + chosen
    if MERGE == "mean_of_count":
        divisor = divisor + tl.where(agrees, 1.0, 0.0)
    elif MERGE == "mean_of_weights":
        divisor = divisor + tl.where(agrees, weight, 0.0)
    return merged, divisor


@triton.jit
def _count_signs(stats: tl.tensor, vote: tl.tensor, kept: tl.tensor):
    """Add the balance of the votes, and the zero votes that kept something: one reduction."""
    tl.static_assert(vote.shape[0] <= 1 << 14)
    ballots = (vote > 0).to(tl.int32) - (vote < 0).to(tl.int32)
    zeros = ((vote == 0) & (kept != 0)).to(tl.int32)
    both = tl.sum(ballots + (zeros << 16), axis=0)
    balance = ((both + 0x8000) & 0xFFFF) - 0x8000
    tl.atomic_add(stats, balance.to(tl.int64), sem="relaxed")
    tl.atomic_add(stats + 1, ((both - balance) >> 16).to(tl.int64), sem="relaxed")


@triton.jit
def ties_kernel(
    out: tl.tensor | None,
    stats: tl.tensor,
    base: tl.tensor,
    models: tl.tuple | tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHTING: tl.constexpr,
    MERGE: tl.constexpr,
    ELECT: tl.constexpr,
    ZERO_SIGN: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge, or only count signs if `out` is None.

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows, each loaded twice then.
    integers: [0] the flag of `raise_flag`, [1 + k] threshold_k. numbers: [0] scale, [1 + k] w_k.
    """
    F = numbers.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    origin = load(base + start, lane, mask, F)
    vote = tl.zeros([BLOCK], F)
    kept = magnitude_key(vote)
    worst = kept
    values = ()
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            x = load(models[k] + start, lane, mask, F)
            threshold = tl.load(integers + 1 + k).to(worst.dtype)
            value, key = _trim(x, origin, threshold, tl.load(numbers + 1 + k), WEIGHTING)
            worst = tl.maximum(worst, key)
            kept = kept | magnitude_key(value)
            vote = vote + _ballot(value, ELECT)
            values = values + (value,)  # noqa: RUF005  Triton has no unpacking
    else:
        for k in range(count):
            x = load_row(models + ROW * k, start, lane, mask, ALIGNED, F)
            threshold = tl.load(integers + 1 + k).to(worst.dtype)
            value, key = _trim(x, origin, threshold, tl.load(numbers + 1 + k), WEIGHTING)
            worst = tl.maximum(worst, key)
            kept = kept | magnitude_key(value)
            vote = vote + _ballot(value, ELECT)
    raise_flag(stats + 2, integers, is_nonfinite(worst))
    if SIGNS:
        _count_signs(stats, vote, kept)
    if out is not None:
        elected = tl.where(vote == 0, ZERO_SIGN * 1.0, vote)
        sign = sign_bit(elected)
        merged = tl.zeros([BLOCK], F)
        divisor = merged
        if MODELS > 0:
            for k in tl.static_range(MODELS):
                weight = tl.load(numbers + 1 + k)
                merged, divisor = _merge(values[k], sign, weight, merged, divisor, WEIGHTING, MERGE)
        else:
            for k in range(count):
                x = load_row(models + ROW * k, start, lane, mask, ALIGNED, F)
                threshold = tl.load(integers + 1 + k).to(worst.dtype)
                weight = tl.load(numbers + 1 + k)
                value, key = _trim(x, origin, threshold, weight, WEIGHTING)
                merged, divisor = _merge(value, sign, weight, merged, divisor, WEIGHTING, MERGE)
        if MERGE == "mean_of_count" or MERGE == "mean_of_weights":
            merged = divide(merged, tl.where(divisor == 0, 1.0, divisor))
        merged = flip(tl.where(elected == 0, 0.0, merged), sign)
        merged = tl.where(vote == vote, merged, vote)
        store(out + start, lane, mask, origin + tl.load(numbers) * merged)
