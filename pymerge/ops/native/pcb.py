"""Marshals `pcb_scores_` and `pcb_merge_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.native.call import NOTHING, Call

__all__ = ["pcb_merge", "pcb_scores"]


def pcb_scores(
    begin: type[Call],
    scores: Any,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
) -> None:
    call = begin(base)
    common = call.common(base, models, False)
    place = call.rows("scores", scores, len(models), "float32")
    call.native.pcb(common, NOTHING, call.counters(stats, least=3), *place, variant, reals)


def pcb_merge(
    begin: type[Call],
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
) -> None:
    call = begin(out)
    common = call.common(base, models, False)
    counters = call.counters(stats, least=3)
    call.native.pcb(common, call.operand(out), counters, *NOTHING, variant, reals)
