"""AdaMerging: coefficients learned without labels (Yang et al. 2024)."""

from __future__ import annotations

from pymerge.adamerging.coefficients import Coefficients
from pymerge.adamerging.correlations import TaskCorrelation, correlations, next_tokens
from pymerge.adamerging.entry_point import AdaSetup
from pymerge.adamerging.fit import FitResult, fit
from pymerge.adamerging.losses import entropy, entropy_of_each
from pymerge.adamerging.module import AdaMerging
from pymerge.adamerging.ops import merged_layer, merged_packed_layer
from pymerge.adamerging.packed import Packed, pack_trimmed
from pymerge.adamerging.presets import PRESETS, Preset
from pymerge.adamerging.run import run_ada

__all__ = [
    "PRESETS",
    "AdaMerging",
    "AdaSetup",
    "Coefficients",
    "FitResult",
    "Packed",
    "Preset",
    "TaskCorrelation",
    "correlations",
    "entropy",
    "entropy_of_each",
    "fit",
    "merged_layer",
    "merged_packed_layer",
    "next_tokens",
    "pack_trimmed",
    "run_ada",
]
