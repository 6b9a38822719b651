"""The arithmetic of methods that weight by statistics, in torch: the definitions.

It is in float64 and rounds once, at the end. Squared gradients are as small as 1e-30 and below, so
their products would underflow in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pymerge.ops.constants import SOLVED_AT_ONCE

__all__ = ["RegMean", "Singular", "fisher", "gradient_matching"]

Tensor = torch.Tensor


def _mean(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(models[0], dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        total += model.double() * weight
    return total / float(sum(weights))


def fisher(
    models: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    coefficients: Sequence[float],
    floor: float,
    floor_rule: str,
) -> Tensor:
    """Fisher merging (Matena and Raffel 2022): sum c F theta / sum c F, per element.

    Where all c F are 0, the result is the weighted mean of the models.

    Args:
        coefficients: c_k, the weights divided by the norms.
    """
    above = torch.zeros_like(models[0], dtype=torch.float64)
    below = torch.zeros_like(above)
    for k, (model, own) in enumerate(zip(models, fishers, strict=True)):
        information = own.to(torch.float64, copy=True)
        if floor_rule == "add":
            information += floor
        elif floor_rule == "max" or k == 0:
            information.clamp_(min=floor)
        information *= coefficients[k]
        below += information
        above += information.mul_(model)  # float32 times float64 gives float64
    empty = below == 0
    if bool(empty.any()):
        return torch.where(empty, _mean(models, weights), above / below)
    return above / below


def gradient_matching(
    base: Tensor,
    models: Sequence[Tensor],
    fishers: Sequence[Tensor],
    base_fisher: Tensor | None,
    weights: Sequence[float],
    scale: float,
    base_weight: float,
    delta: float,
) -> Tensor:
    """Uncertainty-based gradient matching (Daheim et al. 2024), as in the authors' code.

    Where the preconditioner is 1 / 0, the result is the base plus `scale` times the weighted mean
    of the task vectors.
    """
    origin = base.double()
    shared = torch.full_like(origin, delta)
    if base_fisher is not None:
        shared += base_fisher.double() * base_weight
    below, above = shared.clone(), torch.zeros_like(origin)
    for model, own, weight in zip(models, fishers, weights, strict=True):
        information = own.double() * weight
        below += information * scale
        above += (information + shared) * (model.double() - origin)
    step = above / below
    empty = below == 0
    if bool(empty.any()):
        step = torch.where(empty, _mean(models, weights) - origin, step)
    return origin + step * scale


class Singular(Exception):
    """Raised when a sum of Gram matrices is not positive definite; the message says why."""


@dataclass(frozen=True)
class _Matrix:
    """A weighted Gram matrix: w (off_diagonal * G off, G on the diagonal + lift I)."""

    gram: Tensor  # [in, in]
    weight: float
    off_diagonal: float
    lift: float

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), symmetric to the last bit, in float64."""
        # Transposed in blocks first: striding through a matrix takes five times as long.
        mirrored = self.gram[:, start:stop].T.contiguous()
        part = self.gram[start:stop].to(torch.float64, copy=True).add_(mirrored).mul_(0.5)
        diagonal = part.diagonal(start).clone()
        if self.off_diagonal != 1.0:
            part *= self.off_diagonal
        part.diagonal(start)[:] = diagonal + self.lift
        return part.mul_(self.weight)


class RegMean:
    """RegMean (Jin et al. 2023): (sum w G)^-1 sum w G W, by Cholesky decomposition in float64.

    It is computed as W_0 + (sum w G)^-1 sum w G (W_k - W_0), which saves a product and maps equal
    models to themselves.
    """

    def __init__(
        self,
        grams: Sequence[Tensor],
        weights: Sequence[float],
        off_diagonal: float,
        ridge: float,
    ) -> None:
        """
        Args:
            grams: for each model [in, in].

        Raises:
            Singular: the sum of the Gram matrices is not positive definite.
        """
        self._inputs = inputs = grams[0].shape[0]
        self._weights = weights
        traces = [float(gram.diagonal().double().sum()) for gram in grams]
        share = sum(w * trace for w, trace in zip(weights, traces, strict=True)) / sum(weights)
        lift = ridge * share / max(1, inputs)
        self._matrices = [
            _Matrix(gram, weight, off_diagonal, lift)
            for gram, weight in zip(grams, weights, strict=True)
        ]
        # If no model was ever active, no model is preferred: take the mean.
        self._factor = _factor(self._matrices, inputs) if share != 0.0 else None

    def solve(self, models: Sequence[Tensor]) -> Tensor:
        """Return some outputs of the merged layer.

        Args:
            models: the same outputs of each model, [in, outputs]. Their number affects the bits of
                the result, because products of other sizes may be summed in another order.

        Returns:
            [in, outputs] in float64.
        """
        if self._factor is None:
            return _mean(models, self._weights)
        origin = models[0].double()
        right = torch.zeros_like(origin)
        for matrix, model in zip(self._matrices[1:], models[1:], strict=True):
            delta = model.double() - origin
            for first in range(0, self._inputs, SOLVED_AT_ONCE):
                last = min(first + SOLVED_AT_ONCE, self._inputs)
                right[first:last] += matrix.rows(first, last) @ delta
        # cholesky_solve would copy the factor.
        half = torch.linalg.solve_triangular(self._factor, right, upper=False)
        return torch.linalg.solve_triangular(self._factor.mT, half, upper=True).add_(origin)


def _factor(matrices: Sequence[_Matrix], inputs: int) -> Tensor:
    total = torch.zeros(inputs, inputs, dtype=torch.float64, device=matrices[0].gram.device)
    for matrix in matrices:
        for first in range(0, inputs, SOLVED_AT_ONCE):
            last = min(first + SOLVED_AT_ONCE, inputs)
            total[first:last] += matrix.rows(first, last)
    diagonal = total.diagonal().clone()
    factor, failed = torch.linalg.cholesky_ex(total)
    # A pivot that is rounding noise is as singular as 0: dividing by it gives noise.
    pivots = factor.diagonal().square()
    noise = pivots <= diagonal * (inputs * torch.finfo(torch.float64).eps)
    if int(failed) == 0 and not bool(noise.any()):
        return factor
    dead = (diagonal <= 0).nonzero().flatten()
    if len(dead):
        raise Singular(
            f"{len(dead)} of its {inputs} inputs were 0 in every example (the first: input "
            f"{int(dead[0])})"
        )
    raise Singular(f"its {inputs} inputs are linearly dependent (too few examples?)")
