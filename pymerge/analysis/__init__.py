"""Task vectors before a merge: norms, angles, sign conflicts, overlaps, spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from pymerge.analysis.advice import Advice, advise, averaging_coefficient
    from pymerge.analysis.api import analyze
    from pymerge.analysis.interference import Interference, predict_interference
    from pymerge.analysis.output import write_analysis

__all__ = [
    "Advice",
    "Analysis",
    "Facts",
    "Group",
    "Histogram",
    "Interference",
    "Model",
    "Quantiles",
    "Spectrum",
    "Tensor",
    "Trimmed",
    "advise",
    "analyze",
    "averaging_coefficient",
    "predict_interference",
    "write_analysis",
]

_LAZY = {
    "Advice": "advice",
    "advise": "advice",
    "averaging_coefficient": "advice",
    "Interference": "interference",
    "predict_interference": "interference",
    "analyze": "api",
    "write_analysis": "output",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pymerge.analysis' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pymerge.analysis.{_LAZY[name]}"), name)
