"""Marshals `packed_sum_` and `packed_dots_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.native.call import NOTHING, Call
from pymerge.ops.packed import check_packed, check_partials

__all__ = ["packed_dots", "packed_sum"]


def packed_sum(
    begin: type[Call],
    out: Flat,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    weights: Sequence[float],
    wide: bool,
) -> None:
    """Compute out = base + sum_k weights[k] t_k."""
    call = begin(out)
    parts, chunks = _parts(call, base, masks, values, offsets, wide)
    call.native.packed(*parts, call.operand(out), weights, NOTHING, 0, chunks)


def packed_dots(
    begin: type[Call],
    partials: Any,
    gradient: Flat,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    wide: bool,
) -> None:
    """Compute partials[k, c] = <gradient, t_k> over chunk c."""
    call = begin(base)
    parts, chunks = _parts(call, base, masks, values, offsets, wide)
    check_partials(partials, len(masks), chunks, call.NAME)
    if chunks == 0:
        return
    counters = call.counters(partials, "float64")
    call.native.packed(*parts, NOTHING, [], call.operand(gradient), counters, chunks)


def _parts(
    call: Call,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    wide: bool,
) -> tuple[tuple[Any, ...], int]:
    """Return the arguments that come first in both calls, and the number of chunks."""
    chunks = check_packed(masks, values, offsets, base.numel(), call.NAME)
    kept = [call.operand(own, own.numel()) for own in values]
    common = call.operand(base), kept, *call.end(wide)
    words = [call.counters(mask, "int32") for mask in masks]
    return (common, words, [call.counters(offset) for offset in offsets]), chunks
