"""Marshals `weighted_sum_`, `task_arithmetic_`, and a plain streaming loop for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["streaming_floor", "weighted_sum"]


def weighted_sum(
    begin: type[Call],
    out: Flat,
    stats: Any,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    wide: bool,
) -> None:
    call = begin(out)
    call.native.weighted_sum(
        call.operand(out),
        call.operand(base),
        call.operands(models),
        weights,
        scale,
        divisor,
        *call.end(wide),
        call.counters(stats, least=1),
    )


def streaming_floor(
    begin: type[Call], out: Flat, base: Flat | None, models: Sequence[Flat], threads: int = 0
) -> None:
    """Read base and models and write `out` without computing: the floor that benchmarks compare
    with."""
    call = begin(out)
    operands = call.operand(out), call.operand(base), call.operands(models)
    call.native.streaming_floor(*operands, [1.0] * len(models), 1.0, 1.0, *call.end(False, threads))
