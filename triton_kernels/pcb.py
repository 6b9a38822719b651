# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""PCB-Merging: scores of every model, or the merge. The twin of csrc/math/pcb.h.

Tables of numbers begin with K, the number of models; the `reals` of csrc/kernel_table.h follow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import exp32, tanh32
from .value import (
    absolute,
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

PAPER, ROOT, VISION, VISION_ES = (tl.constexpr(code) for code in range(4))


@triton.jit
def scaled_product(a: tl.tensor, b: tl.tensor, least: tl.tensor, inverse: tl.tensor):
    """Return x_ij of the paper, from two deltas."""
    return (a * b - least) * inverse


@triton.jit
def _signed(x: tl.tensor, size: tl.tensor):
    """Return sgn(x) size, with size >= 0: 0 if x is 0."""
    return tl.where(x == 0, 0.0, flip(size, sign_bit(x)))


@triton.jit
def _magnitude(tau: tl.tensor, k: int, reals: tl.tensor, count: int):
    lo, hi = tl.load(reals + k), tl.load(reals + count + k)
    size = absolute(tau)
    size = tl.where(size < lo, lo, size)
    return tl.where(size > hi, hi, size)


@triton.jit
def _normal(tau: tl.tensor, k: int, reals: tl.tensor, count: int):
    """sgn(tau_k) n_k"""
    n = _magnitude(tau, k, reals, count) - tl.load(reals + k)
    return _signed(tau, n * tl.load(reals + 2 * count + k))


@triton.jit
def _scores(taus: tl.tuple, numbers: tl.tensor, MODELS: tl.constexpr, VARIANT: tl.constexpr):
    """Return the scores of all models. What two models share is computed once and added to both."""
    many, reals = tl.load(numbers), numbers + 1
    PAIRS: tl.constexpr = MODELS * (MODELS + 1) // 2
    zero = tl.zeros_like(taus[0])
    values = ()
    total = zero
    for k in tl.static_range(MODELS):
        value = taus[k]
        if VARIANT != PAPER:
            value = _normal(value, k, reals, MODELS)
        if VARIANT == ROOT:
            total = total + taus[k]
        elif VARIANT == VISION:
            total = total + value
        values = values + (value,)  # noqa: RUF005  Triton has no unpacking
    scores = ()
    # The sums of models i and on, each over the models before i.
    sums = ()
    for _ in tl.static_range(MODELS):
        sums = sums + (zero,)  # noqa: RUF005
    for i in tl.static_range(MODELS):
        rest = ()
        if VARIANT == PAPER:
            inter = sums[0]
            for j in tl.static_range(i, MODELS):
                row = reals + (i * MODELS - i * (i - 1) // 2 + j - i)
                x = scaled_product(values[i], values[j], tl.load(row), tl.load(row + PAIRS))
                term = exp32(x) * tl.load(row + 2 * PAIRS)
                inter = inter + term
                if j == i:
                    intra = exp32(many * x) * tl.load(reals + 3 * PAIRS + i)
                else:
                    rest = rest + (sums[j - i] + term,)  # noqa: RUF005
        else:
            intra = exp32(many * (values[i] * values[i]))
            if VARIANT == VISION_ES:
                inter = sums[0]
                for j in tl.static_range(i, MODELS):
                    term = tanh32(values[i] * values[j])
                    inter = inter + term
                    if j != i:
                        rest = rest + (sums[j - i] + term,)  # noqa: RUF005
            else:
                inter = tanh32(taus[i] * total)
        sums = rest
        scores = scores + (intra * inter,)  # noqa: RUF005
    return scores


@triton.jit
def _score(
    i: int, origin: tl.tensor, models: tl.tensor, start: tl.tensor, lane: tl.tensor,
    mask: tl.tensor, numbers: tl.tensor, count: int, total: tl.tensor, ALIGNED: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Return one model's score and delta; the models are loaded again for every pair."""
    many, reals = tl.load(numbers), numbers + 1
    tau = load_model(models, i, start, lane, mask, 0, ALIGNED, tl.float32) - origin
    inter = tl.zeros_like(tau)
    if VARIANT == PAPER:
        pairs = count * (count + 1) // 2
        for j in range(count):
            other = load_model(models, j, start, lane, mask, 0, ALIGNED, tl.float32) - origin
            least, most = tl.minimum(i, j), tl.maximum(i, j)
            row = reals + (least * count - least * (least - 1) // 2 + most - least)
            x = scaled_product(tau, other, tl.load(row), tl.load(row + pairs))
            inter = inter + exp32(x) * tl.load(row + 2 * pairs)
        row = reals + (i * count - i * (i - 1) // 2)
        x = scaled_product(tau, tau, tl.load(row), tl.load(row + pairs))
        intra = exp32(many * x) * tl.load(reals + 3 * pairs + i)
    else:
        n = _normal(tau, i, reals, count)
        intra = exp32(many * (n * n))
        if VARIANT == VISION_ES:
            for j in range(count):
                other = load_model(models, j, start, lane, mask, 0, ALIGNED, tl.float32) - origin
                inter = inter + tanh32(n * _normal(other, j, reals, count))
        else:
            inter = tanh32(tau * total)
    return intra * inter, tau


@triton.jit
def _merge(
    tau: tl.tensor, score: tl.tensor, k: int, reals: tl.tensor, count: int, total: tl.tensor,
    weight: tl.tensor, VARIANT: tl.constexpr,
):  # fmt: skip
    """Add one model to the sum and to the weights."""
    if VARIANT == PAPER:
        q = reals + 3 * (count * (count + 1) // 2) + count + k
        own = tl.load(q + count)
        share = tl.where(score >= tl.load(q), score, 0.0)
        value = tau
    else:
        q = reals + 3 * count + k
        least, most, inverse = tl.load(q), tl.load(q + count), tl.load(q + 2 * count)
        own = tl.load(q + 3 * count)
        share = tl.where(score < least, least, score)
        share = tl.where(share > most, most, share)
        share = tl.where(inverse == 0, 1.0, (share - least) * inverse)
        value = _signed(tau, _magnitude(tau, k, reals, count))
    return total + (own * value) * share, weight + share


@triton.jit
def _scale(reals: tl.tensor, count: int, VARIANT: tl.constexpr):
    if VARIANT == PAPER:
        return tl.load(reals + 3 * (count * (count + 1) // 2) + 3 * count)
    else:
        return tl.load(reals + 7 * count)


@triton.jit
def _positive(score: tl.tensor, reals: tl.tensor, count: int, VARIANT: tl.constexpr):
    """Return the values that are selected from: max(scale score, 0); NaN counts as 0."""
    scaled = _scale(reals, count, VARIANT) * score
    return tl.where(scaled > 0, scaled, 0.0)


@triton.jit
def _finish(
    origin: tl.tensor, total: tl.tensor, weight: tl.tensor, reals: tl.tensor, count: int,
    VARIANT: tl.constexpr,
):  # fmt: skip
    merged = divide(total, tl.where(weight < 1e-12, 1e-12, weight))
    return origin + _scale(reals, count, VARIANT) * merged


@triton.jit
def pcb_kernel(
    out: tl.tensor | None,
    scores: tl.tensor | None,
    stats: tl.tensor,
    base: tl.tensor,
    models: tl.tuple | tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    stride: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    VARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge, or if `out` is None fill scores[k, : numel] with max(scale score, 0). Rows of scores
    are `stride` apart.

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows, each loaded for every pair.
    integers: [0] the flag of `raise_flag`. numbers: see above.
    """
    F = tl.float32
    reals = numbers + 1
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    origin = load(base + start, lane, mask, F)
    total = tl.zeros([BLOCK], F)
    weight = total
    worst = magnitude_key(total)
    if out is None:
        row = scores + start
    if MODELS > 0:
        taus = ()
        for k in tl.static_range(MODELS):
            tau = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F) - origin
            worst = tl.maximum(worst, magnitude_key(tau))
            taus = taus + (tau,)  # noqa: RUF005
        found = _scores(taus, numbers, MODELS, VARIANT)
        for k in tl.static_range(MODELS):
            if out is None:
                store(row, lane, mask, _positive(found[k], reals, MODELS, VARIANT))
                row += stride
            else:
                total, weight = _merge(taus[k], found[k], k, reals, MODELS, total, weight, VARIANT)
        if out is not None:
            store(out + start, lane, mask, _finish(origin, total, weight, reals, MODELS, VARIANT))
    else:
        together = total
        if VARIANT != PAPER and VARIANT != VISION_ES:
            for k in range(count):
                tau = load_model(models, k, start, lane, mask, 0, ALIGNED, F) - origin
                if VARIANT == VISION:
                    tau = _normal(tau, k, reals, count)
                together = together + tau
        for k in range(count):
            score, tau = _score(
                k, origin, models, start, lane, mask, numbers, count, together, ALIGNED, VARIANT
            )
            worst = tl.maximum(worst, magnitude_key(tau))
            if out is None:
                store(row, lane, mask, _positive(score, reals, count, VARIANT))
                row += stride
            else:
                total, weight = _merge(tau, score, k, reals, count, total, weight, VARIANT)
        if out is not None:
            store(out + start, lane, mask, _finish(origin, total, weight, reals, count, VARIANT))
    raise_flag(stats + 2, integers, is_nonfinite(worst))
