"""Marshals `ties_` and `ties_signs_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.arguments import TIES_MERGE, WEIGHTING
from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["ties"]


def ties(
    begin: type[Call],
    out: Flat | None,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    weights: Sequence[float],
    weighting: str,
    merge: str,
    elect: str,
    zero_sign: int,
    scale: float,
    want_signs: bool,
    wide: bool,
) -> None:
    call = begin(base)
    call.native.ties(
        call.operand(out),
        call.counters(stats, least=3),
        call.operand(base),
        call.operands(models),
        thresholds,
        weights,
        WEIGHTING.index(weighting),
        TIES_MERGE.index(merge),
        elect == "count",
        zero_sign,
        scale,
        want_signs,
        *call.end(wide),
    )
