"""Trimmed task vectors as bit masks and values, by the CPU's kernels: kernels_packed.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.array import Flat
from pymerge.backends.cpu import _NOTHING, _address, _counters, _native
from pymerge.backends.sizes import SUM_CHUNK

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
    _call(base, masks, values, offsets, wide, _address(out, base.numel()), weights, _NOTHING, 0)


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
    address = _address(gradient, base.numel())
    counters = _counters(partials, "float64")
    _call(base, masks, values, offsets, wide, _NOTHING, [], address, counters)


def _call(
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    wide: bool,
    out: tuple[int, int],
    weights: Sequence[float],
    gradient: tuple[int, int],
    partials: int,
) -> None:
    numel = base.numel()
    chunks = -(-numel // SUM_CHUNK)
    for mask, offset in zip(masks, offsets, strict=True):
        if mask.numel() < -(-numel // 32) or offset.numel() != chunks + 1:
            raise ValueError(
                f"backend 'cpu': a mask of {mask.numel()} words and {offset.numel()} offsets do "
                f"not fit {numel} elements"
            )
    _native().packed(
        _address(base, numel),
        [_address(own, own.numel()) for own in values],
        [_counters(mask, "int32") for mask in masks],
        [_counters(offset, "int64") for offset in offsets],
        numel,
        3 if wide else 0,
        out,
        weights,
        gradient,
        partials,
        chunks,
    )
