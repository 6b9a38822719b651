"""Marshals `pointwise_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["pointwise"]


def pointwise(
    begin: type[Call],
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    method: str,
    reals: Sequence[float],
    wide: bool,
) -> None:
    call = begin(out)
    common = call.common(base, models, wide)
    counters = call.counters(stats, least=3)
    call.native.pointwise(common, call.operand(out), counters, method, reals)
