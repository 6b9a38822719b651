"""Metrics for the tests of searches, imported by name."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NOT_CALLABLE = 3


def total(tensors: Mapping[str, torch.Tensor]) -> float:
    """Return the sum of all elements of weights."""
    return sum(float(t.double().sum()) for t in tensors.values() if t.is_floating_point())


def near(tensors: Mapping[str, torch.Tensor], target: float = 1.5) -> float:
    """Return how near the mean is to a target."""
    values = torch.cat([t.flatten().double() for _, t in sorted(tensors.items())])
    return -abs(float(values.mean()) - target)


def of_folder(folder: Path, target: float = 1.5) -> float:
    """Return the same for a checkpoint."""
    assert (folder / "config.json").is_file()
    return near(load_file(folder / "model.safetensors"), target)


def named(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {"near": near(tensors), "total": total(tensors), "text": "no number"}


def by_data(tensors: Mapping[str, torch.Tensor], data: Any) -> float:
    return near(tensors, 1.5 if data.name == "validation" else 1.0)


def slow(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    time.sleep(0.05)
    return {"near": near(tensors), "pid": os.getpid()}


def moody(tensors: Mapping[str, torch.Tensor]) -> float:
    """Raise, return NaN, return a word, or return a score."""
    value = near(tensors)
    kind = int(abs(value) * 1e6) % 4
    if kind == 0:
        raise OSError("moody")
    return {1: float("nan"), 2: "word"}.get(kind, value)  # type: ignore[return-value]


def broken(tensors: Mapping[str, torch.Tensor]) -> float:
    raise KeyError("always")


def scribbles(tensors: Mapping[str, torch.Tensor]) -> float:
    next(iter(tensors.values())).zero_()
    return 0.0


_calls = [0]


def scribbles_and_raises(tensors: Mapping[str, torch.Tensor]) -> float:
    """Change the tensors, and raise every other time."""
    _calls[0] += 1
    if _calls[0] % 2:
        next(iter(tensors.values())).zero_()
        raise SystemExit(3)
    return near(tensors)


class Counts:
    """Created once; the object counts its calls, by process."""

    made = 0

    def __init__(self, target: float) -> None:
        Counts.made += 1
        self.target = target
        self.calls = 0

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
        self.calls += 1
        return {"near": near(tensors, self.target), "calls": self.calls, "pid": os.getpid()}


class Refuses:
    def __init__(self) -> None:
        raise RuntimeError("no model here")
