"""The CPU's `packed_sum_` and `packed_dots_`: csrc/cpu/kernels_packed.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.array import Flat
from pymerge.backends.packed import check_packed, check_partials

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
    from pymerge.backends.cpu import _NOTHING, _address, _native

    told, chunks = _told(base, masks, values, offsets, wide)
    _native().packed(*told, _address(out, base.numel()), weights, _NOTHING, 0, chunks)


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
    from pymerge.backends.cpu import _NOTHING, _address, _counters, _native

    told, chunks = _told(base, masks, values, offsets, wide)
    check_partials(partials, len(masks), chunks, "cpu")
    if chunks == 0:
        return
    address, counters = _address(gradient, base.numel()), _counters(partials, "float64")
    _native().packed(*told, _NOTHING, [], address, counters, chunks)


def _told(
    base: Flat, masks: Sequence[Any], values: Sequence[Flat], offsets: Sequence[Any], wide: bool
) -> tuple[tuple[Any, ...], int]:
    """Return what both calls begin with, and the number of chunks."""
    from pymerge.backends.cpu import _address, _counters

    numel = base.numel()
    chunks = check_packed(masks, values, offsets, numel, "cpu")
    kept = [_address(own, own.numel()) for own in values]
    common = _address(base, numel), kept, numel, 3 if wide else 0, 0
    words = [_counters(mask, "int32") for mask in masks]
    return (common, words, [_counters(offset, "int64") for offset in offsets]), chunks
