"""Arguments and outputs of the case table's rows whose ops write a merged tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pymerge.ops.reference.pointwise import POINTWISE
from tests.case import Case, columns_of, padded, thresholds, weights_of
from tests.packing import pack


def tensor_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    out = torch.full(base.shape, float("nan"), dtype=dtype)
    return {"out": out, "stats": torch.zeros(3, dtype=torch.int64)}


def linear(divisor: str) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        weights = weights_of(len(models))
        return {
            "models": models,
            "weights": weights,
            "divisor": sum(weights) if divisor == "sum" else 1.0,
        }

    return arguments


def task_arithmetic(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    weights = weights_of(len(models))
    return {"base": base, "models": models, "weights": weights, "scale": 0.4, "divisor": 1.0}


def ties(
    weighting: str, merge: str, elect: str, zero_sign: int, want_signs: bool, scale: float = 0.7
) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        return {
            "base": base,
            "models": models,
            "thresholds": thresholds(base, models),
            "weights": [] if weighting == "none" else weights_of(len(models)),
            "weighting": weighting,
            "merge": merge,
            "elect": elect,
            "zero_sign": zero_sign,
            "scale": scale,
            "want_signs": want_signs,
        }

    return arguments


def bands(
    base: torch.Tensor, models: list[torch.Tensor], drawn: bool, band: bool
) -> dict[str, list[int]]:
    """Return lo, last, seeds, limits: the middle magnitudes, two thirds of them at random."""
    count = len(models)
    none = 2**63 - 1
    seeds = [(12345 + 2654435761 * i) % 2**32 for i in range(2 * count)]
    return {
        "lo": thresholds(base, models, 0.3) if band else [0] * count,
        "last": thresholds(base, models, 0.9) if band else [none] * count,
        "seeds": seeds if drawn else [],
        "limits": [2**32 * 2 // 3 + k for k in range(count)] if drawn else [],
    }


def sparse(
    drawn: bool, band: bool, elect: bool, divide: bool = False, divisor: float = 1.0
) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        return {
            "base": base,
            "models": models,
            **bands(base, models, drawn, band),
            "factors": [1.5 + 0.1 * k for k in range(len(models))],
            "weights": weights_of(len(models)),
            "elect": elect,
            "divide": divide,
            "divisor": divisor,
            "scale": 0.7,
            "start": 5 << 10,
        }

    return arguments


def ranks_of(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """Return ranks within rows, as computed by `row_ranks_`."""
    ranks = torch.zeros(len(models), padded(base.numel()), dtype=torch.int32)
    columns = columns_of(base.numel())
    for k, model in enumerate(models):
        size = (model.double() - base.double()).abs().view(-1, columns)
        order = size.argsort(dim=1, stable=True)
        places = torch.arange(columns).expand_as(order)
        found = torch.empty_like(order).scatter_(1, order, places)
        ranks[k, : base.numel()] = found.reshape(-1)
    return ranks


def ranked(mode: str, elect: bool, factors: bool = True) -> Callable[..., dict[str, Any]]:
    """Return the arguments of DELLA ("chance", "per_element") or Breadcrumbs by rows ("band")."""

    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        count, columns = len(models), columns_of(base.numel())
        ranked = sparse(mode != "band", False, elect, divide=elect)(base, models)
        ranked["ranks"] = ranks_of(base, models)
        if not factors:  # as in DELLA when it divides by probabilities
            ranked["factors"] = [1.0] * count
        if mode == "band":
            ranked["lo"], ranked["last"] = [columns // 3] * count, [columns - 2] * count
        else:
            ranked["limits"] = []
            ranked["chances"] = [x for k in range(count) for x in (0.2 + 0.01 * k, 0.6 / columns)]
            ranked["per_element"] = mode == "per_element"
            ranked["limits"] = [0] * count
        return ranked

    return arguments


def bare(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {**sparse(True, True, False)(base, models), "bare": True}


def pointwise(
    method: str,
    *reals: float,
    name: str = "",
    models: int = 17,
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Case:
    """Return a row of a kind, given the numbers of a call but for those of each model."""

    def arguments(base: torch.Tensor, tensors: list[torch.Tensor]) -> dict[str, Any]:
        kind, numbers = POINTWISE[method], list(reals)
        for block in range(kind.for_each):  # the first of two are small, as task vectors are
            unit = 0.02 if kind.for_each - block == 2 else 1.0
            numbers += [unit * (0.2 + 0.1 * (k % 5)) for k in range(len(tensors))]
        if kind.model is not None:
            at = kind.model[0]
            numbers[at] = min(numbers[at], len(tensors) - 1)
        own = tensors[:models]
        return {"base": base, "models": own, "method": method, "reals": numbers}

    return Case(name or method, "pointwise_", arguments, tensor_out, oracle=oracle, slow=True)


def row_sum(with_base: bool) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        columns = columns_of(base.numel())
        rows = torch.arange(base.numel() // columns, dtype=torch.float64)
        weights = torch.stack([0.3 * w + 0.01 * (rows % 7) for w in weights_of(len(models))])
        return {
            "base": base if with_base else None,
            "models": models,
            "weights": weights,
            "columns": columns,
        }

    return arguments


def importance(threshold: float | None) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        columns = columns_of(base.numel())
        rows = torch.arange(base.numel() // columns, dtype=torch.float64)
        divergences = 1e-3 + 1e-4 * (rows % 5)
        return {
            "base": base,
            "model": models[0],
            "divergences": divergences,
            "columns": columns,
            "threshold": threshold,
        }

    return arguments


# The share of each model that is kept, in turn: as trims do, or also nothing, everything and half.
TRIMMED, ANY = (0.2,), (0.2, 0.0, 1.0, 0.5)


def packed(
    shares: Sequence[float], base: torch.Tensor, models: list[torch.Tensor]
) -> dict[str, Any]:
    kept = pack(models, [shares[k % len(shares)] for k in range(len(models))])
    return {"base": base, **kept}


def packed_sum(shares: Sequence[float]) -> Callable[..., dict[str, Any]]:
    return lambda base, models: {
        **packed(shares, base, models),
        "weights": weights_of(len(models)),
    }


def only_tensor_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"out": torch.full(base.shape, float("nan"), dtype=dtype)}
