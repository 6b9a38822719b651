"""Marshals `compare_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.comparison import Comparison
from pymerge.ops.native.call import Call

__all__ = ["compare"]


def compare(
    begin: type[Call],
    sums: Any,
    counts: Any,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    start: int,
    every: int,
    wide: bool,
) -> None:
    """Write the sums of segments, and add to the counts."""
    call = begin(base)
    shape = Comparison(len(models), len(thresholds) // len(models))
    shape.check(sums, counts, call.numel, thresholds, start, every, call.NAME)
    call.native.compare(
        call.common(base, models, wide),
        thresholds,
        start,
        every,
        call.counters(sums, "float64"),
        shape.segments(call.numel),
        call.counters(counts),
    )
