# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Trimmed task vectors as bit masks and values: their weighted sum, and dot products with them.

Bit i of word j of a mask is set if element 32 j + i is kept; `offsets` has the number of kept
elements before each chunk of 1024 elements. The place of a value is its chunk's offset, plus the
number of bits set in the words before, plus that of the bits below in its own word. The twin of
csrc/cpu/kernels_packed.h: elements that are not kept add nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import LANES, SUM_CHUNK, in_order
from .value import load, load_row, store

WORD = tl.constexpr(32)  # elements
WORDS = tl.constexpr(32)  # of a chunk
# A row of a table of models: address and dtype of the values, addresses of mask and offsets.
PACKED_ROW = tl.constexpr(4)


@triton.jit
def bits_in(word: tl.tensor):
    """Return how many bits of each word are set, by adding up ever wider fields."""
    x = word - ((word >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bits_below(word: tl.tensor, bit: tl.tensor):
    """Return how many bits of each word are set below a bit."""
    return bits_in(word & ((tl.full(bit.shape, 1, tl.uint32) << bit) - 1))


@triton.jit
def _model(
    values: tl.tuple | tl.tensor, masks: tl.tuple | None, offsets: tl.tuple | None, k: int,
    unit: int, MODELS: tl.constexpr,
):  # fmt: skip
    """Return the values, mask and offsets of model k. For MODELS = 0 it is model `unit` + k, and
    the table row of the values takes their place."""
    if MODELS > 0:
        found = (values[k], masks[k], offsets[k])
    else:
        row = values + PACKED_ROW * (unit + k)
        mask = tl.load(row + 2).to(tl.pointer_type(tl.int32))
        found = (row, mask, tl.load(row + 3).to(tl.pointer_type(tl.int64)))
    return found


@triton.jit
def _values(
    values: tl.tensor, place: tl.tensor, kept: tl.tensor, MODELS: tl.constexpr, F: tl.constexpr
):
    """Return the kept value at each place."""
    if MODELS > 0:
        value = load(values, place, kept, F)
    else:
        value = load_row(values, 0, place, kept, False, F)
    return value


@triton.jit
def _load_words(mask: tl.tensor, at: tl.tensor, there: tl.tensor):
    return tl.load(mask + at, mask=there, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _add_kept(
    total: tl.tensor, origin: tl.tensor, mask: tl.tensor, chunk: tl.tensor, left: tl.tensor,
    values: tl.tuple | tl.tensor, masks: tl.tuple | None, offsets: tl.tuple | None,
    weight: tl.tensor, k: int, MODELS: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Return total plus what model k adds. total, origin: [words, 32]. left: elements from here
    on."""
    own, bits, starts = _model(values, masks, offsets, k, 0, MODELS)
    ROWS: tl.constexpr = total.shape[0]
    row = tl.arange(0, ROWS)
    there = row * WORD < left
    words = _load_words(bits + chunk * WORDS, row, there)
    counts = bits_in(words)
    # The number of kept elements in the previous words of the same chunk.
    in_chunks = tl.reshape(counts, [ROWS // WORDS, WORDS])
    before = tl.reshape(tl.cumsum(in_chunks, axis=1) - in_chunks, [ROWS])
    first = tl.load(starts + chunk + row // WORDS, mask=there, other=0)
    word = words[:, None]
    bit = tl.arange(0, WORD).to(tl.uint32)[None, :]
    kept = (((word >> bit) & 1) != 0) & mask
    place = (first + before)[:, None] + bits_below(word, bit + tl.zeros_like(word))
    x = _values(own, place, kept, MODELS, F)
    return tl.where(kept, total + weight * (x - origin), total)


@triton.jit
def packed_sum_kernel(
    out: tl.tensor,
    base: tl.tensor,
    values: tl.tuple | tl.tensor,
    masks: tl.tuple | None,
    offsets: tl.tuple | None,
    numbers: tl.tensor,
    count: int,
    numel: int,
    MODELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out = base + sum_k w_k (x_k - base), over the elements that each model keeps.

    values, masks, offsets: MODELS pointers each, or for MODELS = 0 `values` is a table of `count`
    rows. numbers: [k] w_k.
    """
    F = numbers.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    chunk = program * (BLOCK // SUM_CHUNK)
    lane = tl.arange(0, BLOCK // WORD)[:, None] * WORD + tl.arange(0, WORD)[None, :]
    mask = lane < left
    origin = load(base + start, lane, mask, F)
    total = tl.zeros([BLOCK // WORD, WORD], F)
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            total = _add_kept(
                total, origin, mask, chunk, left, values, masks, offsets,
                tl.load(numbers + k), k, MODELS, F,
            )  # fmt: skip
    else:
        for k in range(count):
            total = _add_kept(
                total, origin, mask, chunk, left, values, masks, offsets,
                tl.load(numbers + k), k, MODELS, F,
            )  # fmt: skip
    store(out + start, lane, mask, origin + total)


@triton.jit
def packed_dots_kernel(
    partials: tl.tensor,
    gradient: tl.tensor,
    base: tl.tensor,
    values: tl.tuple | tl.tensor,
    masks: tl.tuple | None,
    offsets: tl.tuple | None,
    numbers: tl.tensor,
    numel: int,
    chunks: int,
    units: int,
    MODELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute partials[k, c] = sum of g (x_k - base) over the elements of chunk c that model k
    keeps, in the order of triton_kernels/sums.py.

    values, masks, offsets: MODELS pointers each, and a program makes all rows. For MODELS = 0
    `values` is a table, and a program makes the row of one of `units` models. numbers: only its
    dtype is used, the type to compute in.
    """
    F = numbers.dtype.element_ty
    CHUNKS: tl.constexpr = BLOCK // SUM_CHUNK
    ROWS: tl.constexpr = MODELS if MODELS > 0 else 1
    program = tl.program_id(0)
    unit = 0
    if MODELS == 0:
        unit = program % units
        program = program // units
    first = program.to(tl.int64) * CHUNKS
    start = first * SUM_CHUNK
    chunk = tl.arange(0, CHUNKS)[:, None]
    there = chunk < chunks - first
    lane = tl.arange(0, LANES)[None, :]
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    totals = ()
    places = ()
    for k in tl.static_range(ROWS):
        starts = _model(values, masks, offsets, k, unit, MODELS)[2]
        totals = totals + (tl.zeros([CHUNKS, LANES], tl.float64),)  # noqa: RUF005
        places = places + (tl.load(starts + first + chunk, mask=there, other=0),)  # noqa: RUF005
    for word in range((tl.minimum(left, SUM_CHUNK) + WORD - 1) // WORD):
        # Each word is two steps of all lanes.
        element = chunk * SUM_CHUNK + word * WORD + lane
        mask = (element < left, element + LANES < left)
        g = ()
        origin = ()
        for half in tl.static_range(2):
            at = element + half * LANES
            g = g + (load(gradient + start, at, mask[half], F),)  # noqa: RUF005
            origin = origin + (load(base + start, at, mask[half], F),)  # noqa: RUF005
        added = ()
        moved = ()
        for k in tl.static_range(ROWS):
            model = _model(values, masks, offsets, k, unit, MODELS)
            at = chunk * WORDS + word
            words = _load_words(model[1] + first * WORDS, at, at * WORD < left)
            total = totals[k]
            for half in tl.static_range(2):
                bit = (lane + half * LANES).to(tl.uint32) + tl.zeros_like(words)
                kept = (((words >> bit) & 1) != 0) & mask[half]
                x = _values(model[0], places[k] + bits_below(words, bit), kept, MODELS, F)
                product = g[half].to(tl.float64) * (x - origin[half]).to(tl.float64)
                total = tl.where(kept, total + product, total)
            added = added + (total,)  # noqa: RUF005
            moved = moved + (places[k] + bits_in(words),)  # noqa: RUF005
        totals = added
        places = moved
    columns = tl.full([], 1, tl.int64) * chunks
    for k in tl.static_range(ROWS):
        to = partials + first + chunk + (k + unit) * columns
        tl.store(to, in_order(totals[k]), mask=there)
