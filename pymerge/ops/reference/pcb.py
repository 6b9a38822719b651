"""The reference of PCB-Merging and its exp and tanh; csrc/math/pcb.h and functions.h in torch.

exp and tanh are the same single-precision polynomials as in the kernels, so that every backend
gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["exp32", "pcb_merge", "pcb_rows", "pcb_scores", "tanh32"]

_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)


def _f(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _horner(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    p = _f(coefficients[0], x)
    for coefficient in coefficients[1:]:
        p = p * x + _f(coefficient, x)
    return p


def exp32(x: torch.Tensor) -> torch.Tensor:
    """Return e^x in float32, within 2 units in the last place; x is clamped to |x| <= 87."""
    top, magic = _f(87.0, x), _f(12582912.0, x)
    x = torch.where(x > top, top, x)
    x = torch.where(x < -top, -top, x)
    shifted = x * _f(1.44269504088896341, x) + magic
    n = shifted - magic
    r = x - n * _f(0.693359375, x)
    r = r - n * _f(-2.12194440e-4, x)
    y = _horner(_EXP, r) * (r * r) + r + _f(1.0, x)
    exponent = shifted.view(torch.int32) - magic.view(torch.int32)
    return y * ((exponent + 127) << 23).view(torch.float32)


def tanh32(x: torch.Tensor) -> torch.Tensor:
    """Return tanh in float32, within 2 units in the last place."""
    one, two = _f(1.0, x), _f(2.0, x)
    size, z = x.abs(), x * x
    near = _horner(_TANH, z) * z * x + x
    far = one - two / (exp32(two * size) + one)
    return torch.where(size < _f(0.625, x), near, torch.copysign(far, x))


def _taus(base: torch.Tensor, models: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [model.to(torch.float32) - base.to(torch.float32) for model in models]


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


class _Call:
    """The `reals` of a call, in the order of csrc/kernel_table.h (PcbArgs)."""

    def __init__(self, variant: int, reals: Sequence[float], count: int) -> None:
        self.variant = variant
        self.count = count
        self.pair_row = {pair: row for row, pair in enumerate(_pairs(count))}
        numbers = iter(reals)

        def take(many: int) -> list[float]:
            return [next(numbers) for _ in range(many)]

        if variant == 0:
            rows = len(self.pair_row)
            self.pair_min, self.pair_inv, self.pair_norm = take(rows), take(rows), take(rows)
            self.norm = take(count)
        else:
            self.lo, self.hi, self.inv = take(count), take(count), take(count)
        self.q = take(count)
        if variant != 0:
            self.top, self.top_inv = take(count), take(count)
        self.weights = take(count)
        self.scale = next(numbers)

    def product(self, taus: Sequence[torch.Tensor], i: int, j: int) -> torch.Tensor:
        row = self.pair_row[min(i, j), max(i, j)]
        x = taus[i] * taus[j] - _f(self.pair_min[row], taus[i])
        return x * _f(self.pair_inv[row], taus[i])

    def magnitude(self, tau: torch.Tensor, i: int) -> torch.Tensor:
        lo, hi = _f(self.lo[i], tau), _f(self.hi[i], tau)
        size = tau.abs()
        size = torch.where(size < lo, lo, size)
        return torch.where(size > hi, hi, size)

    def normal(self, tau: torch.Tensor, i: int) -> torch.Tensor:
        n = (self.magnitude(tau, i) - _f(self.lo[i], tau)) * _f(self.inv[i], tau)
        return _sign(tau) * n

    def scores(self, taus: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        many = _f(float(self.count), taus[0])
        zero = torch.zeros_like(taus[0])
        found = []
        if self.variant == 0:
            for i in range(self.count):
                inter = zero
                for j in range(self.count):
                    z = _f(self.pair_norm[self.pair_row[min(i, j), max(i, j)]], zero)
                    inter = inter + exp32(self.product(taus, i, j)) * z
                intra = exp32(many * self.product(taus, i, i)) * _f(self.norm[i], zero)
                found.append(intra * inter)
            return found
        total = zero
        for j, tau in enumerate(taus):
            total = total + (tau if self.variant == 1 else self.normal(tau, j))
        for i, tau in enumerate(taus):
            n = self.normal(tau, i)
            intra = exp32(many * (n * n))
            if self.variant == 3:
                inter = zero
                for j, other in enumerate(taus):
                    inter = inter + tanh32(n * self.normal(other, j))
            else:
                inter = tanh32(tau * total)
            found.append(intra * inter)
        return found


def _sign(x: torch.Tensor) -> torch.Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.where(x > 0, one, zero) - torch.where(x < 0, one, zero)


def pcb_scores(
    scores: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    """scores[k, :numel] = max(scale x, 0), x = beta_k (paper) or b_k (the authors' codes)."""
    taus = _taus(base, models)
    stats[2] += int(not all(bool(torch.isfinite(tau).all()) for tau in taus))
    call = _Call(variant, reals, len(models))
    for k, found in enumerate(call.scores(taus)):
        scaled = _f(call.scale, found) * found
        scores[k, : base.numel()] = torch.where(scaled > 0, scaled, torch.zeros_like(scaled))


def pcb_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    """PCB-Merging (Du et al. 2024) given the statistics of the scope."""
    call = _Call(variant, reals, len(models))
    taus = _taus(base, models)
    stats[2] += int(not all(bool(torch.isfinite(tau).all()) for tau in taus))
    total, weight = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for i, (tau, score) in enumerate(zip(taus, call.scores(taus), strict=True)):
        q, value = _f(call.q[i], tau), tau
        if variant == 0:
            share = torch.where(score >= q, score, torch.zeros_like(score))
        else:
            top = _f(call.top[i], tau)
            b = torch.where(score < q, q, score)
            b = torch.where(b > top, top, b)
            share = (b - q) * _f(call.top_inv[i], tau)
            if call.top_inv[i] == 0:
                share = torch.ones_like(tau)
            value = _sign(tau) * call.magnitude(tau, i)
        total = total + (_f(call.weights[i], tau) * value) * share
        weight = weight + share
    least = _f(1e-12, total)
    merged = total / torch.where(weight < least, least, weight)
    out.copy_((base.to(torch.float32) + _f(call.scale, merged) * merged).to(out.dtype))


def pcb_rows(
    kind: str,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
) -> list[tuple[str, torch.Tensor]]:
    """Return the rows that the paper's softmax needs. They are the extremes of each pair's products
    (least, largest), or exp(x_ij) for each pair, then exp(K x_kk). reals: the minimum and the
    inverse range of each pair."""
    taus = _taus(base, models)
    pairs = _pairs(len(taus))
    if kind == "pcb_extremes":
        rows = []
        for i, j in pairs:
            product = taus[i] * taus[j]
            # Non-finite products must not spoil the finite ones.
            clean = torch.where(product.isfinite(), product, _f(math.nan, product))
            rows += [("min", clean), ("max", clean)]
        return rows
    sums, own = [], []
    for row, (i, j) in enumerate(pairs):
        x = taus[i] * taus[j] - _f(reals[row], taus[i])
        x = x * _f(reals[len(pairs) + row], x)
        sums.append(("sum", _known(exp32(x))))
        if i == j:
            own.append(("sum", _known(exp32(_f(float(len(taus)), x) * x))))
    return sums + own


def _known(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), torch.zeros_like(x), x)
