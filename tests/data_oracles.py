"""Fisher merging, gradient matching and RegMean from their definitions, in float64 and, where that
is simple, element by element. They share no code with pymerge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor
State = dict[str, Tensor]


def fisher(
    models: Sequence[State],
    fishers: Sequence[State],
    weights: Sequence[float],
    *,
    floor: float,
    rule: str,
    normalize: str,
) -> State:
    """Merge by Fisher information; tensors without it get the weighted mean."""
    names = fishers[0].keys()
    merged: State = {}
    for name in models[0]:
        values = torch.stack([model[name].double() for model in models])
        own = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * (values.dim() - 1))
        if name not in names:
            merged[name] = (own * values).sum(0) / own.sum()
            continue
        information = torch.stack([fisher[name].double() for fisher in fishers])
        norms = []
        for each in fishers:
            of = [each[name]] if normalize == "tensor" else [each[n] for n in names]
            norm = torch.cat([part.double().flatten() for part in of]).norm()
            norms.append(norm + (floor if rule == "add" else 0.0))
        if normalize != "none":
            own = own / torch.stack(norms).reshape(own.shape)
        if rule == "add":
            information = information + floor
        elif rule == "max":
            information = torch.maximum(information, torch.tensor(floor, dtype=torch.float64))
        else:
            information[0] = torch.maximum(information[0], torch.tensor(floor, dtype=torch.float64))
        counted = own * information
        merged[name] = (counted * values).sum(0) / counted.sum(0)
    return merged


def gradient_matching(
    base: Tensor,
    models: Sequence[Tensor],
    hessians: Sequence[Tensor],
    base_hessian: Tensor | float,
    weights: Sequence[float],
    s: float,
    s0: float,
    d: float,
) -> Tensor:
    """Run the authors' loop: the inverse of the common part, then the tasks' own parts."""
    base = base.double()
    common = s0 * base_hessian + d
    divisor = common + sum(s * a * h.double() for a, h in zip(weights, hessians, strict=True))
    steps = [
        (a * h.double() + common) / divisor * (model.double() - base)
        for a, h, model in zip(weights, hessians, models, strict=True)
    ]
    return base + s * sum(steps)


def least_squares(
    inputs: Sequence[Tensor], models: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Return argmin_W sum_k w_k / rows_k |X_k W^T - X_k W_k^T|^2 by QR of the stacked system."""
    left, right = [], []
    for x, model, weight in zip(inputs, models, weights, strict=True):
        factor = (weight / len(x)) ** 0.5
        left.append(factor * x.double())
        right.append(factor * x.double() @ model.double().T)
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T


def regmean(
    models: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], off: float
) -> Tensor:
    """Return (sum w G)^-1 sum w G W^T by an inverse, like the authors; weights [out, in]."""
    scaled = []
    for gram, weight in zip(grams, weights, strict=True):
        factor = torch.full_like(gram.double(), off)
        factor.fill_diagonal_(1.0)
        scaled.append(weight * gram.double() * factor)
    total = sum(g @ model.double().T for g, model in zip(scaled, models, strict=True))
    return (torch.inverse(sum(scaled)) @ total).T
