# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Sums over chunks of 1024 elements or over rows, in doubles and always in one order.

Element i of a chunk goes to lane i mod 16, each lane adds up in order, then the lanes are added, 0
to 15; a row's chunks are added in order. The twin of csrc/cpu/kernels_sums.h. No floats are added
by Triton's reductions, whose order is unspecified.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import exp32
from .pcb import scaled_product
from .sparse import keep, load_rank, load_rule, mask_mix
from .value import (
    INTERPRETED,
    ROW,
    absolute,
    align,
    divide,
    load,
    load_model,
    load_row,
    magnitude_key,
)

SUM_CHUNK = tl.constexpr(1024)  # pymerge/ops/constants.py has the same
LANES = tl.constexpr(16)


@triton.constexpr_function
def _ahead(rows: int) -> int:
    """Return how many steps load ahead without waiting: fewer if many sums fill the registers."""
    return 1 if INTERPRETED.value or rows > 20 else 2 if rows > 10 else 4


@triton.constexpr_function
def _how(kind: str, row: int) -> str:
    """Return how a row is reduced: "sum", "min" or "max"."""
    if kind == "pcb_extremes":
        return ("min", "max")[row % 2]
    if kind == "statistics":
        return ("min", "max", "sum", "sum")[row % 4]
    return "sum"


@triton.constexpr_function
def _vectors(kind: str, models: int) -> int:
    """Return how many vectors a program loads: all models, or those of one unit if it loops."""
    pair = kind in ("gram", "dots", "pcb_extremes", "pcb_exp")
    return models if models > 0 else 2 if pair else 1


@triton.jit
def _initial(
    ROWS: tl.constexpr, KIND: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Return the initial value of each row: sums are doubles."""
    rows = ()
    for row in tl.static_range(ROWS):
        if _how(KIND, row) == "min":
            value = tl.full([CHUNKS, WIDTH], float("inf"), F)
        elif _how(KIND, row) == "max":
            value = tl.full([CHUNKS, WIDTH], float("-inf"), F)
        else:
            value = tl.zeros([CHUNKS, WIDTH], tl.float64)
        rows = rows + (value,)  # noqa: RUF005  Triton has no unpacking
    return rows


@triton.jit
def _add(rows: tl.tuple, terms: tl.tuple, ROWS: tl.constexpr, KIND: tl.constexpr):
    added = ()
    for row in tl.static_range(ROWS):
        if _how(KIND, row) == "min":
            value = tl.minimum(rows[row], terms[row])
        elif _how(KIND, row) == "max":
            value = tl.maximum(rows[row], terms[row])
        else:
            value = rows[row] + terms[row]
        added = added + (value,)  # noqa: RUF005
    return added


@triton.jit
def in_order(lanes: tl.tensor):
    """Add up the lanes of each chunk, 0 to 15: [chunks, 1]."""
    parts = (lanes,)
    for level in tl.static_range(4):
        halves = ()
        for part in tl.static_range(1 << level):
            halved = tl.reshape(parts[part], [lanes.shape[0], 2, LANES >> (level + 1)])
            low, high = tl.split(tl.permute(halved, [0, 2, 1]))
            halves = halves + (low, high)  # noqa: RUF005
        parts = halves
    total = tl.zeros_like(parts[0])
    for lane in tl.static_range(LANES):
        total = total + parts[lane]
    return total


@triton.jit
def _chunk(rows: tl.tuple, ROWS: tl.constexpr, KIND: tl.constexpr):
    """Reduce the lanes of each chunk."""
    found = ()
    for row in tl.static_range(ROWS):
        if _how(KIND, row) == "min":
            value = tl.min(rows[row], axis=1, keep_dims=True) + 0.0  # no -0, which has no order
        elif _how(KIND, row) == "max":
            value = tl.max(rows[row], axis=1, keep_dims=True) + 0.0
        else:
            value = in_order(rows[row])
        found = found + (value,)  # noqa: RUF005
    return found


@triton.jit
def _gather(x: tl.tensor, total: tl.tensor, numbers: tl.tensor, KIND: tl.constexpr):
    """Add one model to the values made of all models: for ram_counts how many are active."""
    if KIND == "ram_counts":
        x = tl.where(absolute(x) > tl.load(numbers), 1.0, 0.0)
    return total + x


@triton.jit
def _gather_again(x: tl.tensor, total: tl.tensor, found: tl.tensor, KIND: tl.constexpr):
    """The same once the sum of all task vectors, or for sce their mean, is known."""
    if KIND == "emr":
        aligned = align(x, total > 0)
        found = tl.where(aligned > found, aligned, found)
    else:
        apart = x - total
        found = found + apart * apart
    return found


@triton.jit
def _together(
    xs: tl.tuple, origin: tl.tensor, models: tl.tuple | tl.tensor, start: tl.tensor,
    lane: tl.tensor, mask: tl.tensor, numbers: tl.tensor, count: int, MODELS: tl.constexpr,
    ALIGNED: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Return the values made of all models: for ram_counts, how many are active; for emr, the sum
    and the largest magnitude that agrees with it; for sce, the mean and the variance."""
    total = tl.zeros(lane.shape, F)
    found = total
    if MODELS > 0:
        for k in tl.static_range(MODELS):
            total = _gather(xs[k], total, numbers, KIND)
    else:
        for k in range(count):
            x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F) - origin
            total = _gather(x, total, numbers, KIND)
    if KIND == "sce":
        total = divide(total, tl.load(numbers))
    if KIND != "ram_counts":
        if MODELS > 0:
            for k in tl.static_range(MODELS):
                found = _gather_again(xs[k], total, found, KIND)
        else:
            for k in range(count):
                x = load_model(models, k, start, lane, mask, MODELS, ALIGNED, F) - origin
                found = _gather_again(x, total, found, KIND)
    if KIND == "sce":
        found = divide(found, tl.load(numbers))
    return total, found


@triton.jit
def _product(a: tl.tensor, b: tl.tensor):
    """Return the product, which is exact for floats."""
    return a.to(tl.float64) * b.to(tl.float64)


@triton.jit
def _extremes(x: tl.tensor, counts: tl.tensor):
    """Return x where it counts, for the smallest and for the largest value."""
    return tl.where(counts, x, float("inf")), tl.where(counts, x, float("-inf"))


@triton.jit
def _known(x: tl.tensor, mask: tl.tensor):
    """Return x as a double; NaN and elements past the end are left out."""
    return tl.where(mask & (x == x), x, 0.0).to(tl.float64)


@triton.jit
def _own_terms(
    x: tl.tensor, mask: tl.tensor, mixed: tl.tensor, rank: tl.tensor, rule: tl.tuple,
    total: tl.tensor, found: tl.tensor, integers: tl.tensor, numbers: tl.tensor,
    KIND: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Return the terms that one model adds to its rows. total, found: values made of all models."""
    if KIND == "sparse":
        kept = keep(x, mixed, rank, rule, KEEP)
        terms = (absolute(x).to(tl.float64), absolute(kept).to(tl.float64))
    elif KIND == "statistics":
        least, most = _extremes(x, mask & (x == x))
        terms = (least, most, absolute(x).to(tl.float64), _product(x, x))
    elif KIND == "ram_counts":
        active = absolute(x) > tl.load(numbers)
        alone = tl.where(active & (total == 1.0), 1.0, 0.0).to(tl.float64)
        terms = (alone, tl.where(active & (total > 1.0), 1.0, 0.0).to(tl.float64))
    elif KIND == "emr":
        masked = tl.where(align(x, total > 0) > 0, found, 0.0)
        terms = (absolute(x).to(tl.float64), masked.to(tl.float64))
    else:
        chosen = magnitude_key(found).to(tl.int64) >= tl.load(integers + 1)
        x = tl.where(chosen, x, 0.0)
        terms = (_product(x, x),)
    return terms


@triton.jit
def _pair_terms(
    xs: tl.tuple, mask: tl.tensor, numbers: tl.tensor, pairs: int, first: int,
    COUNT: tl.constexpr, ALONE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Return the terms that products add to their rows. With ALONE only x_0 x_1 is computed, pair
    `first` of `pairs`."""
    terms = ()
    own = ()
    if KIND == "dots":
        for k in tl.static_range(COUNT - 1):
            terms = terms + (_product(xs[COUNT - 1], xs[k]),)  # noqa: RUF005
    else:
        for i in tl.static_range(1 if ALONE else COUNT):
            for j in tl.static_range(1 if ALONE else i, COUNT):
                if KIND == "gram":
                    terms = terms + (_product(xs[i], xs[j]),)  # noqa: RUF005
                elif KIND == "pcb_extremes":
                    # Non-finite products are left out: they must not spoil the rest.
                    product = xs[i] * xs[j]
                    finite = mask & (magnitude_key(product) < 0x7F800000)
                    terms = terms + _extremes(product, finite)
                else:
                    at = numbers + 1 + first
                    if not ALONE:
                        at += i * COUNT - i * (i - 1) // 2 + j - i
                    x = scaled_product(xs[i], xs[j], tl.load(at), tl.load(at + pairs))
                    terms = terms + (_known(exp32(x), mask),)  # noqa: RUF005
                    if ALONE or i == j:
                        own = own + (_known(exp32(tl.load(numbers) * x), mask),)  # noqa: RUF005
    return terms + own


@triton.jit
def _step(
    step: tl.tensor, place: tl.tensor, there: tl.tensor, within: tl.tensor, start: tl.tensor,
    base: tl.tensor | None, models: tl.tuple | tl.tensor, ranks: tl.tensor | None,
    integers: tl.tensor, numbers: tl.tensor, rules: tl.tuple, own: tl.tensor, count: int,
    stride: int, unit: int, pairs: int, MODELS: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, KEEP: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Return the terms that one step of all lanes adds to each row."""
    COUNT: tl.constexpr = _vectors(KIND, MODELS)
    PAIRED: tl.constexpr = _vectors(KIND, 0) == 2
    SHARED: tl.constexpr = KIND == "ram_counts" or KIND == "emr" or KIND == "sce"
    lane = place + step
    mask = there & (step + tl.arange(0, LANES)[None, :] < within)
    origin = tl.zeros(lane.shape, F)
    if base is not None:
        origin = load(base + start, lane, mask, F)
    xs = ()
    for k in tl.static_range(COUNT):
        if MODELS > 0:
            x = load(models[k] + start, lane, mask, F)
        else:
            which = unit
            if PAIRED:
                which = tl.load(integers + 1 + 2 * unit + k)
            elif KIND == "emr":
                which = own
            x = load_row(models + ROW * which, start, lane, mask, ALIGNED, F)
        # The last vector of dots is a gradient, not a model.
        if base is not None and not (KIND == "dots" and k == COUNT - 1):
            x = x - origin
        xs = xs + (x,)  # noqa: RUF005
    if PAIRED:
        terms = _pair_terms(xs, mask, numbers, pairs, unit, COUNT, MODELS == 0, KIND)
    else:
        total = origin
        found = origin
        if SHARED:
            total, found = _together(
                xs, origin, models, start, lane, mask, numbers, count, MODELS,
                ALIGNED, KIND, F,
            )  # fmt: skip
        mixed = mask_mix((lane + own + start).to(tl.uint32))
        terms = ()
        if KIND == "emr":
            x = xs[0]
            for k in tl.static_range(1, COUNT):
                x = tl.where(own == k, xs[k], x)
            terms = _own_terms(
                x, mask, mixed, mixed, rules, total, found, integers, numbers, KIND,
                KEEP,
            )  # fmt: skip
        else:
            for k in tl.static_range(COUNT):
                rule = rules
                rank = mixed
                if KIND == "sparse":
                    rule = rules[k]
                    rank = load_rank(ranks, stride, unit + k, start, lane, mask)
                terms = terms + _own_terms(
                    xs[k], mask, mixed, rank, rule, total, found, integers, numbers,
                    KIND, KEEP,
                )  # fmt: skip
    return terms


@triton.jit
def chunk_sums_kernel(
    partials: tl.tensor,
    base: tl.tensor | None,
    models: tl.tuple | tl.tensor,
    ranks: tl.tensor | None,
    integers: tl.tensor,
    numbers: tl.tensor,
    count: int,
    numel: int,
    lines: int,
    length: int,
    stride: int,
    units: int,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute partials[row, c] = sum, min or max over line c of `length` elements, a chunk or a
    row.

    KIND, and its rows: see SumsArgs in csrc/kernel_table.h.
    models: MODELS pointers, and a program makes all rows; or for MODELS = 0 a table of `count`
    rows, and a program makes the ROWS of one of `units` models or pairs of them.
    ranks: rows `stride` apart. LONG: lines are longer than a chunk.
    integers: [0] flat index of the first element, or for emr the model in question; [1 ..] sparse:
    the rules; sce: the smallest key; gram, dots and pcb, if MODELS is 0: the models of each pair.
    numbers: sparse: chances; ram_counts: epsilon; sce: K; pcb_exp: K, min[P], inv[P].
    """
    F = numbers.dtype.element_ty
    CHUNKS: tl.constexpr = BLOCK // SUM_CHUNK
    AHEAD: tl.constexpr = _ahead(ROWS)
    program = tl.program_id(0)
    unit = 0
    pairs = MODELS * (MODELS + 1) // 2
    if MODELS == 0:
        unit = program % units
        program = program // units
        pairs = units
    first = program.to(tl.int64) * CHUNKS
    start = first * length
    line = tl.arange(0, CHUNKS)[:, None]
    there = line < lines - first
    begins = line * (tl.full([], 1, tl.int64) * length)
    place = begins + tl.arange(0, LANES)[None, :]
    # The last chunk may be shorter than the others.
    longest = tl.minimum(numel - start, length)
    within = tl.minimum(numel - start - begins, length)
    own = tl.load(integers)
    rules = ()
    if KIND == "sparse":
        for k in tl.static_range(_vectors(KIND, MODELS)):
            rules = rules + (load_rule(integers + 1, numbers, unit + k),)  # noqa: RUF005
    totals = _initial(ROWS, KIND, CHUNKS, 1, F)
    for chunk in range(0, longest if LONG else 1, SUM_CHUNK):
        rows = _initial(ROWS, KIND, CHUNKS, LANES, F)
        for begin in range(0, tl.minimum(longest - chunk, SUM_CHUNK), AHEAD * LANES):
            for ahead in tl.static_range(AHEAD):
                terms = _step(
                    chunk + begin + ahead * LANES, place, there, within, start, base, models, ranks,
                    integers, numbers, rules, own, count, stride, unit, pairs, MODELS, ALIGNED,
                    KIND, KEEP, F,
                )  # fmt: skip
                rows = _add(rows, terms, ROWS, KIND)
        totals = _add(totals, _chunk(rows, ROWS, KIND), ROWS, KIND)
    to = partials + first + line
    columns = tl.full([], 1, tl.int64) * lines
    for row in tl.static_range(ROWS):
        at = ROWS * unit + row
        mask = there
        if KIND == "pcb_exp" and MODELS == 0:
            # For each pair the row of exp(x_ij); for a model with itself, the row of exp(K x_kk).
            i, j = tl.load(integers + 1 + 2 * unit), tl.load(integers + 2 + 2 * unit)
            at = unit
            if row == 1:
                at = pairs + i
                mask = there & (line * 0 + i == j)
        tl.store(to + at * columns, totals[row].to(tl.float64), mask=mask)
