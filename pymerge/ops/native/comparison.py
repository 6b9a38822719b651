"""The CPU's `compare_`: csrc/cpu/kernels_comparison.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.comparison import Comparison
from pymerge.ops.native.host import common_arguments, counters_at, native

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
    shape = Comparison(len(models), len(thresholds) // len(models))
    shape.check(sums, counts, base.numel(), thresholds, start, every, "cpu")
    native().compare(
        common_arguments(base, models, wide),
        thresholds,
        start,
        every,
        counters_at(sums, "float64"),
        shape.segments(base.numel()),
        counters_at(counts),
    )
