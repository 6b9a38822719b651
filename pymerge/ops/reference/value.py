"""Helpers of all reference ops: widened inputs, scalars of the same type, keys.

The counterpart of csrc/math/value.h in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Element", "infinity", "keys", "scalar", "widened"]

_LARGEST = 0x7FFFFFFF


def widened(tensor: torch.Tensor, wide: bool) -> torch.Tensor:
    return tensor.to(torch.float64 if wide else torch.float32)


def scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def keys(delta: torch.Tensor) -> torch.Tensor:
    """Return bits(|delta|) as int64; finite values have the order of |delta|."""
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return (delta.view(torch.int32) & _LARGEST).to(torch.int64)


def infinity(wide: bool) -> int:
    """Return the key of infinity."""
    return 0x7FF0000000000000 if wide else 0x7F800000


class Element:
    """The widened inputs and the task vectors, for the pointwise methods and the sums."""

    def __init__(
        self, base: torch.Tensor | None, models: Sequence[torch.Tensor], wide: bool
    ) -> None:
        self.models = [widened(model, wide) for model in models]
        self.base = torch.zeros_like(self.models[0]) if base is None else widened(base, wide)
        self.deltas = self.models if base is None else [x - self.base for x in self.models]
        self.zero, self.one = torch.zeros_like(self.base), torch.ones_like(self.base)

    def total(self) -> torch.Tensor:
        total = self.zero
        for delta in self.deltas:
            total = total + delta
        return total

    def variance(self) -> torch.Tensor:
        """Return the biased variance over the task vectors: mean first, then squares, in order."""
        many = scalar(float(len(self.deltas)), self.base)
        mean, squares = self.total() / many, self.zero
        for delta in self.deltas:
            apart = delta - mean
            squares = squares + apart * apart
        return squares / many

    def unified(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return EMR's (sign is +, largest magnitude that agrees); a sum of 0 elects -."""
        positive, largest = self.total() > 0, self.zero
        for delta in self.deltas:
            aligned = torch.where(positive, delta, -delta)
            largest = torch.where(aligned > largest, aligned, largest)
        return positive, largest
