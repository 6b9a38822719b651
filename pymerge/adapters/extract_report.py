"""The record of an extraction: how close each module is, and which tensors were left out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["ExtractReport", "Extracted"]


@dataclass(frozen=True)
class Extracted:
    """A module of an extracted LoRA.

    energy: share of the squared norm of the weight's change in its singular values. error: norm of
    the residual, relative to that of the change, measured with the factors as written. norm: of the
    change. exact: by a full decomposition rather than by random projections.
    """

    rank: int
    energy: float
    error: float
    norm: float
    exact: bool


@dataclass
class ExtractReport:
    """The result of an extraction, and what it lacks.

    modules: by name. unchanged: modules that are equal in both models, which get no factors.
    left_out: changed tensors that the adapter does not have, with the norms of their changes.
    saved: tensors that it stores whole. captured: the share of the squared norm of all changes that
    the adapter holds.
    """

    out: str
    base: str
    model: str
    modules: dict[str, Extracted] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    captured: float = 1.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def summary(self) -> str:
        """Return a human-readable summary of a few lines."""
        ranks = [one.rank for one in self.modules.values()]
        energies = sorted(one.energy for one in self.modules.values())
        worst = max(self.modules, key=lambda name: self.modules[name].error)
        lines = [
            f"extract-lora: {len(ranks)} modules of rank {_span(ranks)} -> {self.out}, "
            f"{self.seconds:.1f} s",
            f"  energy: least {energies[0]:.4f}, median {energies[len(energies) // 2]:.4f}; of all "
            f"that changed, the adapter has {self.captured:.4f}",
            f"  largest error: {self.modules[worst].error:.3g} of the change of '{worst}'",
        ]
        if self.unchanged:
            lines.append(f"  unchanged: {len(self.unchanged)} modules")
        if self.saved:
            lines.append(f"  in whole: {len(self.saved)} tensors")
        if self.left_out:
            first = max(self.left_out, key=lambda name: self.left_out[name])
            lines.append(
                f"  left out: {len(self.left_out)} tensors that changed, the most '{first}' (norm "
                f"{self.left_out[first]:.3g})"
            )
        return "\n".join(lines)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
