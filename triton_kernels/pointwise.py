# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Methods that look at each element by itself. The twin of csrc/math/pointwise.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .value import (
    absolute,
    align,
    divide,
    is_nonfinite,
    load,
    load_model,
    magnitude_key,
    raise_flag,
    store,
)


@triton.jit
def _first(
    x: tl.tensor, origin: tl.tensor, k: int, models: int, numbers: tl.tensor, total: tl.tensor,
    count: tl.tensor, scaled: tl.tensor, METHOD: tl.constexpr,
):  # fmt: skip
    """Let one model add to what the method gathers of all; nearswap takes its model as it is."""
    delta = x - origin
    if METHOD == "nearswap":
        total = x
    elif METHOD == "ram":
        active = absolute(delta) > tl.load(numbers + 1 + k)
        total = total + tl.where(active, delta, 0.0)
        scaled = scaled + tl.where(active, tl.load(numbers + 1 + models + k) * delta, 0.0)
        count = count + tl.where(active, 1.0, 0.0)
    elif METHOD == "magmax":
        total = tl.where(magnitude_key(delta) > magnitude_key(total), delta, total)
    else:
        total = total + delta
    return total, count, scaled


@triton.jit
def _second(
    x: tl.tensor, origin: tl.tensor, k: int, numbers: tl.tensor, total: tl.tensor,
    among: tl.tensor, count: tl.tensor, found: tl.tensor, squares: tl.tensor, METHOD: tl.constexpr,
):  # fmt: skip
    """The same where the sum of all task vectors is known; among: what is made of it."""
    delta = x - origin
    if METHOD == "consensus_ta":
        own = absolute(delta) > tl.load(numbers + 3 + k) * absolute(among - x)
        count = count + tl.where(own, 1.0, 0.0)
    elif METHOD == "emr":
        aligned = align(delta, total > 0)
        found = tl.where(aligned > found, aligned, found)
    if METHOD == "sce" or METHOD == "sce_everywhere":
        weight = tl.load(numbers + 3 + k)
        agrees = align(delta, total >= 0) > 0
        found = found + tl.where(agrees, weight * delta, 0.0)
        count = count + tl.where(agrees, weight, 0.0)
    if METHOD == "variance" or METHOD == "sce_everywhere":
        apart = delta - among
        squares = squares + apart * apart
    return count, found, squares


@triton.jit
def _ahead(own: tl.tensor, k: int, other: tl.tensor, j: int):
    """Return 1 where model j comes before model k, equal ones by their order; else 0."""
    return tl.where((other < own) | ((other == own) & (j < k)), 1, 0)


@triton.jit
def _middle(
    own: tl.tensor, rank: tl.tensor, count: int, lower: tl.tensor, upper: tl.tensor, nan: tl.tensor
):
    """Let a model be one of the middle two if its rank is, and NaN count if it is one."""
    lower = tl.where(rank == (count - 1) // 2, own, lower)
    upper = tl.where(rank == count // 2, own, upper)
    return lower, upper, tl.where(own == own, nan, own)


@triton.jit
def _median(
    inputs: tl.tuple, models: tl.tuple | tl.tensor, origin: tl.tensor, numbers: tl.tensor,
    count: int, start: int, lane: tl.tensor, mask: tl.tensor, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """inputs: what was loaded of `models` if MODELS > 0."""
    origin = tl.where(tl.load(numbers + 2) != 0, origin, 0.0)
    lower = tl.zeros_like(origin)
    upper = lower
    nan = lower
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            rank = tl.zeros(origin.shape, tl.int32)
            for j in tl.static_range(MODELS):
                rank += _ahead(inputs[k], k, inputs[j], j)
            lower, upper, nan = _middle(inputs[k], rank, count, lower, upper, nan)
    else:
        for k in range(count):
            own = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F)
            rank = tl.zeros(origin.shape, tl.int32)
            for j in range(count):
                other = load_model(models, j, start, lane, mask, MODELS, ALIGNED, F)
                rank += _ahead(own, k, other, j)
            lower, upper, nan = _middle(own, rank, count, lower, upper, nan)
    lower -= origin
    upper -= origin
    middle = tl.where(lower == upper, lower, 0.5 * lower + 0.5 * upper)
    return origin + tl.load(numbers + 1) * tl.where(nan == nan, middle, nan)


@triton.jit
def _nearswap(a: tl.tensor, b: tl.tensor, numbers: tl.tensor):
    least = tl.load(numbers + 2)
    distance = absolute(a - b)
    distance = tl.where(distance < least, least, distance)
    weight = divide(tl.zeros_like(a) + tl.load(numbers + 1), distance)
    weight = tl.where(weight > 1.0, 1.0, weight)
    weight = tl.where(weight < 0.0, 0.0, weight)
    return weight * b + (1.0 - weight) * a


@triton.jit
def _result(
    origin: tl.tensor, own: tl.tensor, total: tl.tensor, among: tl.tensor, count: tl.tensor,
    found: tl.tensor, squares: tl.tensor, numbers: tl.tensor, METHOD: tl.constexpr,
):  # fmt: skip
    """own: the model that the method is asked about, of nearswap the only one.

    Methods that compare the models with each other have functions of their own.
    """
    result = origin
    first = tl.load(numbers + 1)
    if METHOD == "nearswap":
        result = _nearswap(origin, total, numbers)
    elif METHOD == "ram":
        mean = divide(total, tl.where(count > 1.0, count, 1.0))
        result = origin + tl.where(count == 1.0, found, mean)
    elif METHOD == "magmax":
        result = origin + first * total
    elif METHOD == "consensus_ta":
        result = origin + first * tl.where(count >= tl.load(numbers + 2), total, 0.0)
    elif METHOD == "tall_masks":
        claims = absolute(own - origin) > tl.load(numbers + 2) * absolute(among - own)
        result = origin + tl.where(claims, first * total, 0.0)
    elif METHOD == "emr":
        unified = align(found, total > 0)
        agrees = align(own - origin, total > 0) > 0
        masked = tl.load(numbers + 2) * tl.where(agrees, unified, 0.0)
        result = origin + tl.where(first < 0, unified, masked)
    elif METHOD == "variance" or METHOD == "sce" or METHOD == "sce_everywhere":
        many = tl.load(numbers)
        variance = divide(squares, many)
        if METHOD == "variance":
            result = variance
        else:
            if METHOD == "sce":
                merged = divide(found, tl.where(count == 0, 1.0, count))
            else:
                merged = divide(found, tl.where(count < 1e-6, 1e-6, count))
                merged = tl.where(variance >= tl.load(numbers + 2), merged, 0.0)
            # NaN agrees with nothing, but must not be lost.
            result = origin + tl.where(total == total, merged, total)
    return result


@triton.jit
def pointwise_kernel(
    out: tl.tensor,
    stats: tl.tensor,
    base: tl.tensor,
    models: tl.tuple | tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """METHOD: that of csrc/math/pointwise.h, and "sce_everywhere" for SCE with its mask
    everywhere.

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows, of which some methods load
    each twice. integers: [0] the flag of `raise_flag`, [1] the model that the method is asked
    about. numbers: K, then the `reals` of that header.
    """
    F = numbers.dtype.element_ty
    TWICE: tl.constexpr = (
        METHOD == "consensus_ta" or METHOD == "emr" or METHOD == "variance" or METHOD == "sce"
        or METHOD == "sce_everywhere"
    )  # fmt: skip
    ASKS: tl.constexpr = METHOD == "tall_masks" or METHOD == "emr"
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    origin = load(base + start, lane, mask, F)
    worst = magnitude_key(origin)
    total = tl.zeros([BLOCK], F)
    many = total
    found = total
    squares = total
    own = total
    inputs = ()
    asked = tl.load(integers + 1)
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F)
            worst = tl.maximum(worst, magnitude_key(x))
            total, many, found = _first(x, origin, k, count, numbers, total, many, found, METHOD)
            if ASKS:
                own = tl.where(asked == k, x, own)
            inputs = inputs + (x,)  # noqa: RUF005  Triton has no unpacking
    else:
        for k in range(count):
            x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F)
            worst = tl.maximum(worst, magnitude_key(x))
            total, many, found = _first(x, origin, k, count, numbers, total, many, found, METHOD)
            if ASKS:
                own = tl.where(asked == k, x, own)
    raise_flag(stats + 2, integers, is_nonfinite(worst))
    among = total
    if METHOD == "consensus_ta" or METHOD == "tall_masks":
        among = origin + tl.load(numbers + 1) * total
    elif TWICE:
        among = divide(total, tl.load(numbers))  # the mean
    if TWICE:
        if MODELS > 0:
            for k in tl.static_range(MODELS):
                many, found, squares = _second(
                    inputs[k], origin, k, numbers, total, among, many, found, squares, METHOD
                )
        else:
            for k in range(count):
                x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F)
                many, found, squares = _second(
                    x, origin, k, numbers, total, among, many, found, squares, METHOD
                )
    result = _result(origin, own, total, among, many, found, squares, numbers, METHOD)
    if METHOD == "median":
        result = _median(
            inputs, models, origin, numbers, count, start, lane, mask, MODELS, ALIGNED, F
        )
    store(out + start, lane, mask, result)
