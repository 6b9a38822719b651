"""Marshals `sparse_merge_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.arguments import Kept, SparseMerge
from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["sparse_merge"]


def sparse_merge(
    begin: type[Call],
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    call = begin(out)
    call.native.sparse_merge(
        call.common(base, models, wide),
        call.operand(out),
        call.counters(stats, least=3),
        *kept.numbers(),
        how.factors,
        how.weights,
        how.elect,
        how.divide,
        how.divisor,
        how.scale,
        kept.start,
        how.bare,
        call.rows("ranks", kept.ranks, len(models), "int32"),
        kept.chances,
        kept.per_element,
    )
