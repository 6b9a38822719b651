"""The same operations in plain torch, as one would write them by hand, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["EAGER"]


def _linear(arguments: dict[str, Any]) -> torch.Tensor:
    first = arguments["models"][0]
    total = torch.zeros(first.shape, device=first.device)
    for model, weight in zip(arguments["models"], arguments["weights"], strict=True):
        total.add_(model, alpha=weight)
    return (total / arguments["divisor"]).to(first.dtype)


def _task_arithmetic(arguments: dict[str, Any]) -> torch.Tensor:
    base = arguments["base"].float()
    total = torch.zeros_like(base)
    for model, weight in zip(arguments["models"], arguments["weights"], strict=True):
        total.add_(model - base, alpha=weight)
    return (base + arguments["scale"] * total).to(arguments["base"].dtype)


def _ties_mean(arguments: dict[str, Any]) -> torch.Tensor:
    base = arguments["base"].float()
    deltas = torch.stack([model - base for model in arguments["models"]])
    limits = torch.tensor(arguments["thresholds"], dtype=torch.int32).view(torch.float32)
    limits = limits.to(base.device)
    deltas = torch.where(deltas.abs() >= limits[:, None], deltas, 0.0)
    elected = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = (deltas * elected) > 0
    merged = torch.where(agrees, deltas, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return (base + arguments["scale"] * merged).to(arguments["base"].dtype)


def _pcb_paper(arguments: dict[str, Any]) -> torch.Tensor:
    base = arguments["base"].float()
    taus = torch.stack([model - base for model in arguments["models"]])
    count, reals = len(taus), iter(arguments["reals"])
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    low, inverse, norm = ({pair: next(reals) for pair in pairs} for _ in range(3))
    own, cuts, weights = ([next(reals) for _ in range(count)] for _ in range(3))
    total, shares = torch.zeros_like(base), torch.zeros_like(base)
    for i in range(count):
        scaled = [
            (taus[i] * taus[j] - low[min(i, j), max(i, j)]) * inverse[min(i, j), max(i, j)]
            for j in range(count)
        ]
        inter = torch.zeros_like(base)
        for j in range(count):
            inter = inter + torch.exp(scaled[j]) * norm[min(i, j), max(i, j)]
        score = torch.exp(count * scaled[i]) * own[i] * inter
        share = torch.where(score >= cuts[i], score, 0.0)
        total = total + weights[i] * taus[i] * share
        shares = shares + share
    merged = total / shares.clamp(min=1e-12)
    return (base + next(reals) * merged).to(arguments["base"].dtype)


EAGER: dict[str, Callable[[dict[str, Any]], torch.Tensor]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties_mean": _ties_mean,
    "pcb_paper": _pcb_paper,
}
