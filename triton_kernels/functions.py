# type: ignore
# Kernels are written in Triton's language, whose types are not those of Python.
"""exp and tanh in single precision: the twin of csrc/math/functions.h, step by step."""

from __future__ import annotations

import triton
import triton.language as tl

from .value import absolute, divide, flip, sign_bit


@triton.jit
def exp32(x: tl.tensor):
    """e^x for |x| <= 87; x beyond is clamped."""
    x = tl.where(x > 87.0, 87.0, x)
    x = tl.where(x < -87.0, -87.0, x)
    # Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    y = p * (r * r) + r + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    return y * ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tanh32(x: tl.tensor):
    size = absolute(x)
    z = x * x
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    p = p * z + -5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z + -3.33332819422e-1
    near = p * z * x + x
    far = 1.0 - divide(tl.full(x.shape, 2.0, x.dtype), exp32(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, flip(absolute(far), sign_bit(x)))
