"""The reference of divergences of rows, and of the values weighted by them.

It is written out step by step, because csrc/math/divergence.h and triton_kernels/divergence.py
repeat the same steps.
"""

from __future__ import annotations

import math

import torch

from pymerge.ops.arguments import DIVERGENCE, DIVERGENCE_STEPS, check_kind
from pymerge.ops.reference.sums import added, chunks_of, extremes
from pymerge.ops.reference.value import scalar, widened

__all__ = ["divergence_sums", "row_importance"]

Tensor = torch.Tensor

FLOOR = 1e-8  # mergekit adds it to every probability
_NEAR = 0.34  # up to this |t|, e^t - 1 needs no range reduction: less than ln(2) / 2
_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LN2 = 0.6931471805599453
_SQRT_HALF = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
_EXP = [1 / math.factorial(k) for k in range(13, 1, -1)]
_LOG = [1 / k for k in range(21, 1, -2)]


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _expm1(r: Tensor) -> Tensor:
    """Return e^r - 1 for |r| <= ln(2) / 2."""
    return r + (r * r) * _polynomial(r, _EXP)


def _exp(x: Tensor) -> Tensor:
    """Return e^x; x is clamped to |x| <= 708."""
    x = torch.where(x > 708.0, 708.0, x)
    x = torch.where(x < -708.0, -708.0, x)
    shifted = x * 1.4426950408889634 + _MAGIC
    n = shifted - _MAGIC
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    exponent = shifted.view(torch.int64) - scalar(_MAGIC, x).view(torch.int64)
    return (_expm1(r) + 1.0) * ((exponent + 1023) << 52).view(torch.float64)


def _split(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and m such that v = 2^k m and m is in [sqrt(1/2), sqrt(2)], for v >= 2^-100."""
    bits = v.view(torch.int64)
    k = ((bits - _SQRT_HALF + (128 << 52)) >> 52) - 128
    return k, (bits - (k << 52)).view(torch.float64)


def _excess(f: Tensor) -> Tensor:
    """Return f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]."""
    s = f / (f + 2.0)
    z = s * s
    return s * (f - (z + z) * _polynomial(z, _LOG))


def _term(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """Return P log(P / Q) - P + Q, where P = p + FLOOR, Q = q + FLOOR and t = log(q / p).

    No term is negative. Over a row the sum equals that of P log(P / Q), because the sums of P and
    of Q are equal.
    """
    own = p + FLOOR
    u = p * _expm1(t)
    s = u / ((own + own) + u)
    z = s * s
    near = s * (u - (own + own) * (z * _polynomial(z, _LOG)))
    u = q - p
    w = u / own
    k, m = _split((q + FLOOR) / own)
    f = torch.where(k == 0, w, m - 1.0)
    far = own * (((w - f) - k.to(torch.float64) * _LN2) + _excess(f))
    return torch.where(t.abs() <= _NEAR, near, far)


def divergence_sums(
    table: Tensor, base: Tensor, model: Tensor, kind: str, columns: int, wide: bool
) -> None:
    """Compute, row by row or chunk by chunk: maxima, sums of exp(x - maximum), then the divergence
    KL(softmax(model) || softmax(base)) with 1e-8 added to each probability."""
    check_kind("divergence_sums_", kind, DIVERGENCE, "reference")
    if base.numel() == 0:
        return
    if kind == "all":
        for step in DIVERGENCE_STEPS:
            divergence_sums(table, base, model, step, columns, wide)
        return
    x, y = (widened(tensor, wide).to(torch.float64) for tensor in (model, base))
    if kind == "maxima":
        table[0] = extremes(x, "max", columns)
        table[1] = extremes(y, "max", columns)
        return
    rows = [chunks_of(row, columns) for row in (x, y)]
    # The table may be in host memory while the tensors are on a device.
    x_max, y_max, x_sum, y_sum = (row.view(-1, 1, 1) for row in table[:4].to(x.device))
    there = chunks_of(torch.ones_like(x), columns) != 0
    x_exp, y_exp = _exp(rows[0] - x_max), _exp(rows[1] - y_max)
    zero = torch.zeros_like(x_exp)
    if kind == "exp":
        table[2] = added(torch.where(there, x_exp, zero))
        table[3] = added(torch.where(there, y_exp, zero))
        return
    k, m = _split(x_sum / y_sum)
    f = m - 1.0
    shift = (x_max - y_max) + (k.to(torch.float64) * _LN2 + (f - _excess(f)))
    term = _term(x_exp * (1.0 / x_sum), y_exp * (1.0 / y_sum), shift - (rows[0] - rows[1]))
    table[4] = added(torch.where(there, term, zero))


def row_importance(
    out: Tensor,
    stats: Tensor,
    base: Tensor,
    model: Tensor,
    divergences: Tensor,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    """Compute |model - base| D_r in row r; with a threshold, the base plus the delta where this
    importance is at least the threshold: Arcee Fusion (mergekit)."""
    stats[2] += int(not all(bool(torch.isfinite(tensor).all()) for tensor in (base, model)))
    origin = widened(base, wide)
    delta = widened(model, wide) - origin
    weights = divergences.to(delta.device).repeat_interleave(columns)
    result = (delta.abs().to(torch.float64) * weights).to(delta.dtype)
    if threshold is not None:
        kept = result >= scalar(threshold, delta)
        result = torch.where(kept, origin + delta, origin)
    out.copy_(result.to(out.dtype))
