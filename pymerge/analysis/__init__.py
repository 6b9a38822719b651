"""Task vectors before a merge: norms, angles, sign conflicts, overlaps, spectra."""

from __future__ import annotations

from pymerge.analysis.records import (
    Analysis,
    Facts,
    Group,
    Histogram,
    Model,
    Quantiles,
    Spectrum,
    Tensor,
    Trimmed,
)

__all__ = [
    "Analysis",
    "Facts",
    "Group",
    "Histogram",
    "Model",
    "Quantiles",
    "Spectrum",
    "Tensor",
    "Trimmed",
]
