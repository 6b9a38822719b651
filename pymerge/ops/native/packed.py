"""The CPU's `packed_sum_` and `packed_dots_`: csrc/cpu/kernels_packed.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.native.host import NOTHING, counters_at, native, operand
from pymerge.ops.packed import check_packed, check_partials

__all__ = ["packed_dots", "packed_sum"]


def packed_sum(
    out: Flat,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    weights: Sequence[float],
    wide: bool,
) -> None:
    """out = base + sum_k weights[k] t_k."""
    told, chunks = _told(base, masks, values, offsets, wide)
    native().packed(*told, operand(out, base.numel()), weights, NOTHING, 0, chunks)


def packed_dots(
    partials: Any,
    gradient: Flat,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    wide: bool,
) -> None:
    """partials[k, c] = <gradient, t_k> over chunk c."""
    told, chunks = _told(base, masks, values, offsets, wide)
    check_partials(partials, len(masks), chunks, "cpu")
    if chunks == 0:
        return
    address, counters = operand(gradient, base.numel()), counters_at(partials, "float64")
    native().packed(*told, NOTHING, [], address, counters, chunks)


def _told(
    base: Flat, masks: Sequence[Any], values: Sequence[Flat], offsets: Sequence[Any], wide: bool
) -> tuple[tuple[Any, ...], int]:
    """Return what both calls begin with, and the number of chunks."""
    numel = base.numel()
    chunks = check_packed(masks, values, offsets, numel, "cpu")
    kept = [operand(own, own.numel()) for own in values]
    common = operand(base, numel), kept, numel, 3 if wide else 0, 0
    words = [counters_at(mask, "int32") for mask in masks]
    return (common, words, [counters_at(offset, "int64") for offset in offsets]), chunks
