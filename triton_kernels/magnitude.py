# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Counting kernels of the exact selection. They make a histogram of magnitudes over a bracket of
keys, and count the elements equal to one key, chunk by chunk.

The twin of csrc/cpu/kernels_magnitude.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .value import ROW, load, load_row, magnitude_key

HOT_CHUNK = tl.constexpr(1 << 16)  # csrc/kernel_table.h has the same


@triton.jit
def _count(
    key: tl.tensor, mask: tl.tensor, bracket: tl.tensor, counts: tl.tensor,
    hot_chunk: tl.tensor | None, bins: tl.tensor, GROUP: tl.constexpr,
):  # fmt: skip
    """Count the keys of one model. bracket: lo, span, shift, hot."""
    tl.static_assert(key.shape[0] < 1 << 16)
    lo = tl.load(bracket).to(key.dtype)
    # As unsigned numbers, keys below the bracket are beyond its span.
    unsigned = tl.uint64 if key.dtype == tl.int64 else tl.uint32
    offset = (key - lo).to(unsigned, bitcast=True)
    within = offset <= tl.load(bracket + 1).to(unsigned)
    is_hot = key == tl.load(bracket + 3).to(key.dtype)
    column = offset >> tl.load(bracket + 2).to(unsigned)
    # Keys inside the bracket are few. Those on its sides are added up first, with a field of 10
    # bits for each kind while that suffices, then two fields of 16.
    tl.atomic_add(counts + 1 + column, 1, mask=within & mask & (is_hot == 0), sem="relaxed")
    side = tl.where(within, 0, tl.where(key < lo, 1, 1 << 10))
    side = tl.where(mask, tl.where(is_hot, 1 << 20, side), 0)
    side = tl.sum(tl.reshape(side, [side.shape[0] // GROUP, GROUP]), axis=1)
    both = tl.sum((side & 0x3FF) + (side >> 20 << 16), axis=0)
    tl.atomic_add(counts, both & 0xFFFF, sem="relaxed")
    tl.atomic_add(counts + 1 + bins, tl.sum((side >> 10) & 0x3FF, axis=0), sem="relaxed")
    tl.atomic_add(counts + 2 + bins, both >> 16, sem="relaxed")
    if hot_chunk is not None:
        tl.atomic_add(hot_chunk, both >> 16, sem="relaxed")


@triton.jit
def magnitude_histogram_kernel(
    counts: tl.tensor,
    hot_chunks: tl.tensor | None,
    base: tl.tensor,
    models: tl.tuple | tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    bins: int,
    chunks: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to counts[k, 0 .. bins + 2] the number of keys below, in each bin of, and above a
    bracket, and of those equal to hot_k. hot_chunks[k, j], if given, must start at 0.

    models: MODELS pointers, or for MODELS = 0 a table of `count` rows.
    integers: [4 k ..] lo_k, span_k (the last key inside, less lo_k), shift_k, hot_k.
    numbers: only its dtype is used, the type to compute in.
    """
    tl.static_assert(HOT_CHUNK % BLOCK == 0)
    F = numbers.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(numel - start, BLOCK).to(tl.int32)
    origin = load(base + start, lane, mask, F)
    row = counts
    hot_chunk = hot_chunks
    if hot_chunks is not None:
        hot_chunk = hot_chunks + start // HOT_CHUNK
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            x = load(models[k] + start, lane, mask, F)
            _count(magnitude_key(x - origin), mask, integers + 4 * k, row, hot_chunk, bins, 8)
            row += bins + 3
            if hot_chunks is not None:
                hot_chunk += chunks
    else:
        for k in range(count):
            x = load_row(models + ROW * k, start, lane, mask, ALIGNED, F)
            _count(magnitude_key(x - origin), mask, integers + 4 * k, row, hot_chunk, bins, 8)
            row += bins + 3
            if hot_chunks is not None:
                hot_chunk += chunks


@triton.jit
def magnitude_equal_counts_kernel(
    counts: tl.tensor,
    base: tl.tensor,
    model: tl.tensor,
    integers: tl.tensor,
    numbers: tl.tensor,
    chunk: int,
    numel: int,
    BLOCK: tl.constexpr,
):
    """Set counts[j] to the number of keys in chunk j equal to integers[0]; one program per chunk.

    numbers: only its dtype is used, the type to compute in.
    """
    F = numbers.dtype.element_ty
    number = tl.program_id(0).to(tl.int64)
    begin = number * chunk
    end = begin + chunk
    lane = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, tl.minimum(end, numel), BLOCK):
        mask = (lane < end - start) & (lane < numel - start)
        origin = load(base + start, lane, mask, F)
        key = magnitude_key(load(model + start, lane, mask, F) - origin)
        equal = mask & (key == tl.load(integers).to(key.dtype))
        found += equal.to(tl.int32)
    tl.store(counts + number, tl.sum(found.to(tl.int64), axis=0))
