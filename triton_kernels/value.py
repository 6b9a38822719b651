# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""Loading, storing and comparing values: the counterpart of csrc/math/value.h.

A kernel computes in F, float32 or float64: the type of its table of numbers. Sizes are 64-bit. A
program works on the BLOCK elements from `start`; `mask` is true for those that exist. The others
load as zeros, which count for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton decides this when a kernel is defined, for good.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Codes of dtypes in a table of models; a row of the table has an address and such a code.
CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
ROW = tl.constexpr(2)


@triton.jit
def magnitude_key(x: tl.tensor):
    """Return bits(|x|): for finite values, ordered as |x| is."""
    if x.dtype == tl.float64:
        key = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@triton.jit
def absolute(x: tl.tensor):
    """|x|, NaN included."""
    return magnitude_key(x).to(x.dtype, bitcast=True)


@triton.jit
def sign_bit(x: tl.tensor):
    """Return the sign of x, NaN included, as bits that `flip` takes."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        sign = bits ^ (bits & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = bits ^ (bits & 0x7FFFFFFF)
    return sign


@triton.jit
def flip(x: tl.tensor, sign: tl.tensor):
    """Return x, negated if the sign bit is set; Triton's `-x` need not turn +0 into -0."""
    return (x.to(sign.dtype, bitcast=True) ^ sign).to(x.dtype, bitcast=True)


@triton.jit
def align(x: tl.tensor, positive: tl.tensor):
    """x where positive, else -x."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        negated = bits ^ -0x8000000000000000
    else:
        bits = x.to(tl.int32, bitcast=True)
        negated = bits ^ -0x80000000
    return tl.where(positive, bits, negated).to(x.dtype, bitcast=True)


@triton.jit
def divide(x: tl.tensor, y: tl.tensor):
    """Return x / y, rounded as IEEE 754 requires; Triton's `/` of float32 is approximate."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.math.div_rn(x, y)
    return quotient


@triton.jit
def is_nonfinite(keys: tl.tensor):
    """Return whether any of the keys is that of infinity or NaN: one flag for the program."""
    worst = tl.max(keys, axis=0)
    if keys.dtype == tl.int64:
        found = worst >= 0x7FF0000000000000
    else:
        found = worst >= 0x7F800000
    return found


@triton.jit
def raise_flag(stat: tl.tensor, flag: tl.tensor, found: tl.tensor):
    """Add 1 to `stat` if found; `flag`, 0 when the kernel starts, limits this to once per call."""
    # An integer, not a float, so that the sum does not depend on the order.
    if found:
        before = tl.atomic_xchg(flag, 1, sem="relaxed")
        if before == 0:
            tl.atomic_add(stat, 1, sem="relaxed")


@triton.jit
def load(pointer: tl.tensor, lane: tl.tensor, mask: tl.tensor, F: tl.constexpr):
    """Load a block of any float dtype as F, which is exact."""
    x = tl.load(pointer + lane, mask=mask, other=0)
    if x.dtype == tl.bfloat16:
        # The interpreter converts subnormal bfloat16 wrongly; on hardware this is the conversion.
        wide = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = wide.to(tl.float32, bitcast=True).to(F)
    else:
        value = x.to(F)
    return value


@triton.jit
def _load_at(
    address: tl.tensor, start: tl.tensor, lane: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # Otherwise the values are loaded one by one.
        pointer = tl.multiple_of(pointer, 16)
    return load(pointer + start, lane, mask, F)


@triton.jit
def load_row(
    row: tl.tensor, start: tl.tensor, lane: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Load a block of the tensor that a row of a table of models describes."""
    address = tl.load(row)
    code = tl.load(row + 1)
    if code == 0:
        value = _load_at(address, start, lane, mask, ALIGNED, tl.float32, F)
    elif code == 1:
        value = _load_at(address, start, lane, mask, ALIGNED, tl.float16, F)
    elif code == 2:
        value = _load_at(address, start, lane, mask, ALIGNED, tl.bfloat16, F)
    else:
        value = _load_at(address, start, lane, mask, ALIGNED, tl.float64, F)
    return value


@triton.jit
def load_model(
    models: tl.tuple | tl.tensor, k: int, start: tl.tensor, lane: tl.tensor, mask: tl.tensor,
    MODELS: tl.constexpr, ALIGNED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Load a block of model k, from a tuple of MODELS pointers, or from a table if MODELS is 0."""
    if MODELS > 0:
        value = load(models[k] + start, lane, mask, F)
    else:
        value = load_row(models + ROW * k, start, lane, mask, ALIGNED, F)
    return value


@triton.jit
def store(pointer: tl.tensor, lane: tl.tensor, mask: tl.tensor, x: tl.tensor):
    """Store a block, rounded once to nearest even; float64 is converted to 16 bits through
    float32."""
    to = pointer.dtype.element_ty
    if to != tl.float64 and to != tl.float32:
        x = x.to(tl.float32)
    if INTERPRETED and to == tl.bfloat16:
        # The interpreter would truncate the bits that the hardware rounds.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16)
        y = rounded.to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(to)
    tl.store(pointer + lane, y, mask=mask)
