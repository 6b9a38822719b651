# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Merges of sparse task vectors: DARE, Breadcrumbs, DELLA. The twin of csrc/math/sparse.h.

KEEP is the criterion that decides on an element: "all"; its key ("band"); a hash of its index
("drawn"), or "both"; its rank in its row ("ranks"); a hash and its rank ("chances", or "shares" if
kept values are divided by their probability).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .value import (
    divide,
    flip,
    is_nonfinite,
    load,
    load_model,
    magnitude_key,
    raise_flag,
    sign_bit,
    store,
)

# The integers of a model's rule: lo, last, two words of a seed, limit.
RULE = tl.constexpr(5)


@triton.jit
def mask_mix(x: tl.tensor):
    """Mix flat indices, uint32; all models share the result."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _mask_hash(mixed: tl.tensor, first: tl.tensor, slope: tl.tensor):
    """Return the hash of mixed indices: a line for each model, with an odd slope. All are
    uint32."""
    return mixed * slope + first


@triton.jit
def load_rule(integers: tl.tensor, numbers: tl.tensor, k: int):
    """Load the rule of model k: lo, last, seed, limit, and the chance at rank 0 and its step."""
    at = integers + RULE * k
    first, slope = tl.load(at + 2).to(tl.uint32), tl.load(at + 3).to(tl.uint32) | 1
    limit = tl.load(at + 4).to(tl.uint32)
    chance, step = tl.load(numbers + 2 * k), tl.load(numbers + 2 * k + 1)
    return tl.load(at), tl.load(at + 1), first, slope, limit, chance, step


@triton.jit
def load_rank(
    ranks: tl.tensor | None, stride: int, k: int, start: tl.tensor, lane: tl.tensor, mask: tl.tensor
):
    """Load ranks of model k, if there are any."""
    rank = lane
    if ranks is not None:
        rank = tl.load(ranks + (k * stride.to(tl.int64) + start) + lane, mask=mask, other=0)
    return rank


@triton.jit
def keep(delta: tl.tensor, mixed: tl.tensor, rank: tl.tensor, rule: tl.tuple, KEEP: tl.constexpr):
    """Return a model's task vector with zeros for what it does not keep. mixed: the mixed
    indices."""
    if KEEP == "band" or KEEP == "both":
        key = magnitude_key(delta)
        within = (key >= rule[0].to(key.dtype)) & (key <= rule[1].to(key.dtype))
        delta = tl.where(within, delta, 0.0)
    elif KEEP == "ranks":
        within = (rank >= rule[0].to(tl.int32)) & (rank <= rule[1].to(tl.int32))
        delta = tl.where(within, delta, 0.0)
    if KEEP == "drawn" or KEEP == "both":
        delta = tl.where(_mask_hash(mixed, rule[2], rule[3]) <= rule[4], delta, 0.0)
    elif KEEP == "chances" or KEEP == "shares":
        F: tl.constexpr = delta.dtype
        drawn = (_mask_hash(mixed, rule[2], rule[3]) >> 8).to(F) * 5.9604644775390625e-08  # 2^-24
        chance = rule[5] + rank.to(F) * rule[6]
        kept = drawn < chance
        if KEEP == "shares":
            delta = divide(delta, chance)
        delta = tl.where(kept, delta, 0.0)
    return delta


@triton.jit
def _value(
    delta: tl.tensor, mixed: tl.tensor, rank: tl.tensor, k: int, count: int, integers: tl.tensor,
    numbers: tl.tensor, KEEP: tl.constexpr,
):  # fmt: skip
    """Return the value that one model adds, and its weight."""
    kept = keep(delta, mixed, rank, load_rule(integers + 2, numbers + 2 + 2 * count, k), KEEP)
    weight = tl.load(numbers + 3 + 2 * k)
    return weight * (tl.load(numbers + 2 + 2 * k) * kept), weight


@triton.jit
def _agree(
    value: tl.tensor, weight: tl.tensor, sign: tl.tensor, merged: tl.tensor, divisor: tl.tensor
):
    """Add a value to the merged magnitude, and its weight to the divisor, if it agrees."""
    aligned = flip(value, sign)
    agrees = (aligned > 0) | (aligned != aligned)
    return merged + tl.where(agrees, aligned, 0.0), divisor + tl.where(agrees, weight, 0.0)


@triton.jit
def sparse_merge_kernel(
    out: tl.tensor,
    stats: tl.tensor,
    base: tl.tensor,
    models: tl.tuple | tl.tensor,
    ranks: tl.tensor | None,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    stride: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEEP: tl.constexpr,
    ELECT: tl.constexpr,
    DIVIDE_WEIGHTS: tl.constexpr,
    DIVIDE: tl.constexpr,
    BARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out = base + scale * merge_k w_k (f_k t_k), t_k the part of its task vector that k
    keeps.

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows, loaded twice with ELECT.
    ranks: rows `stride` apart. BARE: without the base.
    integers: [0] the flag of `raise_flag`, [1] flat index of the first element, [2 + RULE k ..] the
    rule of model k. numbers: [0] scale, [1] divisor, [2 + 2k] f_k, [3 + 2k] w_k, then, for each of
    the K models, the chance at rank 0 and its step.
    """
    F = numbers.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    mixed = mask_mix((tl.load(integers + 1) + start).to(tl.uint32) + lane.to(tl.uint32))
    origin = load(base + start, lane, mask, F)
    vote = tl.zeros([BLOCK], F)
    worst = magnitude_key(vote)
    values = ()
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            delta = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F) - origin
            rank = load_rank(ranks, stride, k, start, lane, mask)
            value, weight = _value(delta, mixed, rank, k, MODELS, integers, numbers, KEEP)
            worst = tl.maximum(worst, magnitude_key(delta))
            vote = vote + value
            values = values + (value,)  # noqa: RUF005  Triton has no unpacking
    else:
        for k in range(count):
            delta = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F) - origin
            rank = load_rank(ranks, stride, k, start, lane, mask)
            value, weight = _value(delta, mixed, rank, k, count, integers, numbers, KEEP)
            worst = tl.maximum(worst, magnitude_key(delta))
            vote = vote + value
    raise_flag(stats + 2, integers, is_nonfinite(worst))
    merged = vote
    if ELECT:
        # The vote begins with +0 and so is never -0: its sign bit is the elected sign.
        sign = sign_bit(vote)
        merged = tl.zeros([BLOCK], F)
        divisor = merged
        if MODELS > 0:
            for k in tl.static_range(MODELS):
                weight = tl.load(numbers + 3 + 2 * k)
                merged, divisor = _agree(values[k], weight, sign, merged, divisor)
        else:
            for k in range(count):
                delta = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F) - origin
                rank = load_rank(ranks, stride, k, start, lane, mask)
                value, weight = _value(delta, mixed, rank, k, count, integers, numbers, KEEP)
                merged, divisor = _agree(value, weight, sign, merged, divisor)
        if DIVIDE_WEIGHTS:
            merged = divide(merged, tl.where(divisor == 0, 1.0, divisor))
    if DIVIDE:
        merged = divide(merged, tl.load(numbers + 1))
    if ELECT:
        merged = tl.where(vote == vote, flip(merged, sign), vote)
    result = tl.load(numbers) * merged
    if not BARE:
        result = origin + result
    store(out + start, lane, mask, result)
