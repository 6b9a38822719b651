# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Divergences of rows and the ops that use them as weights: the twin of csrc/math/divergence.h,
step by step, summed in the order of `sums.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import LANES, SUM_CHUNK, in_order
from .value import absolute, divide, is_nonfinite, load, magnitude_key, raise_flag, store

FLOOR = tl.constexpr(1e-8)
NEAR = tl.constexpr(0.34)
ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: adding it rounds to an integer
ROUNDER_BITS = tl.constexpr(0x4338000000000000)
SQRT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(6.93147180369123816490e-01)
LN2_LOW = tl.constexpr(1.90821492927058770002e-10)


@triton.jit
def _expm1(r: tl.tensor):
    """e^r - 1 for |r| <= ln(2) / 2."""
    p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0)
    p = p * r + (1.0 / 39916800.0)
    p = p * r + (1.0 / 3628800.0)
    p = p * r + (1.0 / 362880.0)
    p = p * r + (1.0 / 40320.0)
    p = p * r + (1.0 / 5040.0)
    p = p * r + (1.0 / 720.0)
    p = p * r + (1.0 / 120.0)
    p = p * r + (1.0 / 24.0)
    p = p * r + (1.0 / 6.0)
    p = p * r + (1.0 / 2.0)
    return r + (r * r) * p


@triton.jit
def _log_tail(z: tl.tensor):
    p = z * (1.0 / 21.0) + (1.0 / 19.0)
    p = p * z + (1.0 / 17.0)
    p = p * z + (1.0 / 15.0)
    p = p * z + (1.0 / 13.0)
    p = p * z + (1.0 / 11.0)
    p = p * z + (1.0 / 9.0)
    p = p * z + (1.0 / 7.0)
    p = p * z + (1.0 / 5.0)
    return p * z + (1.0 / 3.0)


@triton.jit
def exp64(x: tl.tensor):
    """e^x for |x| <= 708; x beyond is clamped."""
    x = tl.where(x > 708.0, 708.0, x)
    x = tl.where(x < -708.0, -708.0, x)
    shifted = x * 1.4426950408889634 + ROUNDER
    n = shifted - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    power = (((shifted.to(tl.int64, bitcast=True) & 0xFFF) + 1023) & 0x7FF) << 52
    return (_expm1(r) + 1.0) * power.to(tl.float64, bitcast=True)


@triton.jit
def _split(v: tl.tensor):
    """v = 2^k m with m from sqrt(1/2) to sqrt(2), for v from 2^-100 on: k and m."""
    bits = magnitude_key(v)
    # Nothing that is shifted is negative.
    biased = (bits - (SQRT_HALF_BITS - 0x0800000000000000)) >> 52
    m = bits - (biased << 52) + 0x0800000000000000
    return biased - 128, m.to(tl.float64, bitcast=True)


@triton.jit
def _small_integer(k: tl.tensor):
    return (k + ROUNDER_BITS).to(tl.float64, bitcast=True) - ROUNDER


@triton.jit
def _log_excess(f: tl.tensor):
    """f - log(1 + f) for 1 + f from sqrt(1/2) to sqrt(2)."""
    s = divide(f, f + 2.0)
    z = s * s
    return s * (f - (z + z) * _log_tail(z))


@triton.jit
def _log64(v: tl.tensor):
    k, m = _split(v)
    f = m - 1.0
    return _small_integer(k) * LN2 + (f - _log_excess(f))


@triton.jit
def _point(
    x: tl.tensor, y: tl.tensor, x_max: tl.tensor, y_max: tl.tensor, x_scale: tl.tensor,
    y_scale: tl.tensor, shift: tl.tensor,
):  # fmt: skip
    """Return P log(P / Q) - P + Q of each element."""
    t = shift - (x - y)
    p = exp64(x - x_max) * x_scale
    own = p + FLOOR
    change = p * _expm1(t)
    s = divide(change, (own + own) + change)
    z = s * s
    near = s * (change - (own + own) * (z * _log_tail(z)))
    q = exp64(y - y_max) * y_scale
    u = q - p
    w = divide(u, own)
    k, m = _split(divide(q + FLOOR, own))
    f = tl.where(k == 0, w, m - 1.0)
    far = own * (((w - f) - _small_integer(k) * LN2) + _log_excess(f))
    return tl.where((t <= NEAR) & (t >= -NEAR), near, far)


@triton.jit
def divergence_sums_kernel(
    table: tl.tensor,
    base: tl.tensor,
    models: tl.tuple,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    lines: int,
    length: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a kind of `divergence_sums_` over lines of `length` elements, chunks or rows.

    table: doubles [5, lines]. numbers: only its dtype is used, the type to compute in. LONG: lines
    are longer than a chunk.
    """
    F = numbers.dtype.element_ty
    CHUNKS: tl.constexpr = BLOCK // SUM_CHUNK
    first = tl.program_id(0).to(tl.int64) * CHUNKS
    start = first * length
    line = tl.arange(0, CHUNKS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    there = line < lines - first
    begins = line * (tl.full([], 1, tl.int64) * length)
    # The last chunk may be shorter than the others.
    longest = tl.minimum(numel - start, length)
    within = tl.minimum(numel - start - begins, length)
    column = table + first + line
    stride = tl.full([], 1, tl.int64) * lines
    if KIND != "maxima":
        x_max = tl.load(column, mask=there, other=0.0)
        y_max = tl.load(column + stride, mask=there, other=0.0)
    if KIND == "divergence":
        x_sum = tl.load(column + 2 * stride, mask=there, other=1.0)
        y_sum = tl.load(column + 3 * stride, mask=there, other=1.0)
        one = tl.full([CHUNKS, 1], 1.0, tl.float64)
        x_scale = divide(one, x_sum)
        y_scale = divide(one, y_sum)
        shift = (x_max - y_max) + _log64(divide(x_sum, y_sum))
    if KIND == "maxima":
        x_total = tl.full([CHUNKS, 1], float("-inf"), tl.float64)
    else:
        x_total = tl.zeros([CHUNKS, 1], tl.float64)
    y_total = x_total
    for chunk in range(0, longest if LONG else 1, SUM_CHUNK):
        if KIND == "maxima":
            x_lanes = tl.full([CHUNKS, LANES], float("-inf"), tl.float64)
        else:
            x_lanes = tl.zeros([CHUNKS, LANES], tl.float64)
        y_lanes = x_lanes
        for step in range(0, tl.minimum(longest - chunk, SUM_CHUNK), LANES):
            place = chunk + step + lane
            mask = there & (place < within)
            x = load(models[0] + start, begins + place, mask, F).to(tl.float64)
            y = load(base + start, begins + place, mask, F).to(tl.float64)
            if KIND == "maxima":
                x_lanes = tl.where(mask & (x > x_lanes), x, x_lanes)  # NaN is left out
                y_lanes = tl.where(mask & (y > y_lanes), y, y_lanes)
            elif KIND == "exp":
                x_lanes = x_lanes + tl.where(mask, exp64(x - x_max), 0.0)
                y_lanes = y_lanes + tl.where(mask, exp64(y - y_max), 0.0)
            else:
                term = _point(x, y, x_max, y_max, x_scale, y_scale, shift)
                x_lanes = x_lanes + tl.where(mask, term, 0.0)
        if KIND == "maxima":
            x_total = tl.maximum(x_total, tl.max(x_lanes, axis=1, keep_dims=True))
            y_total = tl.maximum(y_total, tl.max(y_lanes, axis=1, keep_dims=True))
        else:
            x_total = x_total + in_order(x_lanes)
            if KIND == "exp":
                y_total = y_total + in_order(y_lanes)
    if KIND == "maxima":
        tl.store(column, x_total + 0.0, mask=there)  # no -0, which has no order
        tl.store(column + stride, y_total + 0.0, mask=there)
    elif KIND == "exp":
        tl.store(column + 2 * stride, x_total, mask=there)
        tl.store(column + 3 * stride, y_total, mask=there)
    else:
        tl.store(column + 4 * stride, x_total, mask=there)


@triton.jit
def row_importance_kernel(
    out: tl.tensor,
    stats: tl.tensor,
    base: tl.tensor,
    models: tl.tuple,
    divergences: tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    columns: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MERGE: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute |model - base| D_r in row r of `columns` elements; with MERGE the base plus the
    deltas for which that is at least the threshold.

    divergences: doubles [rows]. LONG: rows have BLOCK elements or more. integers: [0] the flag of
    `raise_flag`. numbers: [0] the threshold; its dtype is the type to compute in.
    """
    F = numbers.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    first = start // columns
    # 64-bit division is slow: the program does one, and uses 32 bits otherwise.
    if LONG:
        row = (lane >= (first + 1) * columns - start).to(tl.int32)
    else:
        row = ((start - first * columns).to(tl.int32) + lane) // columns
    origin = load(base + start, lane, mask, F)
    x = load(models[0] + start, lane, mask, F)
    delta = x - origin
    weight = tl.load(divergences + first + row, mask=mask, other=0.0)
    result = (absolute(delta).to(tl.float64) * weight).to(F)
    if MERGE:
        result = tl.where(result >= tl.load(numbers), origin + delta, origin)
    worst = tl.maximum(magnitude_key(origin), magnitude_key(x))
    raise_flag(stats + 2, integers, is_nonfinite(worst))
    store(out + start, lane, mask, result)
