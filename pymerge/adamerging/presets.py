"""Presets: the defaults of published implementations of AdaMerging."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """The defaults of one implementation.

    Attributes:
        clamp: the range that coefficients are clamped to wherever they are used, or None.
        only_trainable: merge only parameters that require a gradient, else all.
        batches_per_task, steps, lr, entropy: defaults of `fit`.
    """

    clamp: tuple[float, float] | None
    only_trainable: bool
    batches_per_task: int
    steps: int
    lr: float
    entropy: str


PRESETS = {
    # EnnengYang/AdaMerging, src/main_layer_wise_adamerging.py and its variants
    "official": Preset((0.0, 1.0), False, 2, 500, 1e-3, "exact"),
    # FusionBench 0.2.33, config/method/adamerging/clip.yaml
    "fusion_bench": Preset(None, True, 1, 1000, 1e-3, "fusion_bench"),
}
