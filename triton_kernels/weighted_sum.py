# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Weighted sums of models (averaging, linear) and of task vectors (task arithmetic).

The twin of csrc/math/weighted_sum.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .value import (
    ROW,
    divide,
    is_nonfinite,
    load,
    load_model,
    load_row,
    magnitude_key,
    raise_flag,
    store,
)


@triton.jit
def weighted_sum_kernel(
    out: tl.tensor,
    stats: tl.tensor,
    base: tl.tensor | None,
    models: tl.tuple | tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute sum_k w_k x_k / divisor, or base + scale * (sum_k w_k (x_k - base) / divisor).

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows.
    integers: [0] the flag of `raise_flag`. numbers: [0] scale, [1] divisor, [2 + k] w_k.
    """
    F = numbers.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    total = tl.zeros([BLOCK], F)
    origin = total
    if base is not None:
        origin = load(base + start, lane, mask, F)
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            x = load(models[k] + start, lane, mask, F)
            if base is not None:
                x = x - origin
            total = total + tl.load(numbers + 2 + k) * x
    else:
        for k in range(count):
            x = load_row(models + ROW * k, start, lane, mask, ALIGNED, F)
            if base is not None:
                x = x - origin
            total = total + tl.load(numbers + 2 + k) * x
    if DIVIDE:
        total = divide(total, tl.load(numbers + 1))
    if base is not None:
        total = origin + tl.load(numbers) * total
    raise_flag(stats, integers, is_nonfinite(magnitude_key(total)))
    store(out + start, lane, mask, total)


@triton.jit
def _row_term(x: tl.tensor, origin: tl.tensor, weights: tl.tensor, row: tl.tensor, mask: tl.tensor):
    """Return what one model adds to each element, with the weights of its rows."""
    return tl.load(weights + row, mask=mask, other=0).to(x.dtype) * (x - origin)


@triton.jit
def row_weighted_sum_kernel(
    out: tl.tensor,
    stats: tl.tensor,
    base: tl.tensor | None,
    models: tl.tuple | tl.tensor,
    weights: tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    columns: int,
    rows: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute sum_k w_kr x_k, or base + sum_k w_kr (x_k - base), in row r of `columns` elements.

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows. weights: doubles [K, rows].
    LONG: rows have BLOCK elements or more. integers: [0] the flag of `raise_flag`. numbers: only
    its dtype is used, the type to compute in.
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
    total = tl.zeros([BLOCK], F)
    origin = total
    if base is not None:
        origin = load(base + start, lane, mask, F)
    weights += first
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F)
            total = total + _row_term(x, origin, weights, row, mask)
            weights += rows
    else:
        for k in range(count):
            x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F)
            total = total + _row_term(x, origin, weights, row, mask)
            weights += rows
    if base is not None:
        total = origin + total
    raise_flag(stats, integers, is_nonfinite(magnitude_key(total)))
    store(out + start, lane, mask, total)
