"""The same operations in plain torch, as one would write them by hand: for scale."""

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


EAGER: dict[str, Callable[[dict[str, Any]], torch.Tensor]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties_mean": _ties_mean,
}
