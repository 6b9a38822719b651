"""The CPU's `compare_`: csrc/cpu/kernels_comparison.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.array import Flat
from pymerge.backends.comparison import Comparison

__all__ = ["compare"]


def compare(
    sums: Any,
    counts: Any,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    start: int,
    every: int,
    wide: bool,
) -> None:
    """Sums of segments, and counts that are added to."""
    from pymerge.backends.cpu import _common, _counters, _native

    shape = Comparison(len(models), len(thresholds) // len(models))
    shape.check(sums, counts, base.numel(), thresholds, start, every, "cpu")
    _native().compare(
        _common(base, models, wide),
        thresholds,
        start,
        every,
        _counters(sums, "float64"),
        shape.segments(base.numel()),
        _counters(counts),
    )
