"""Marshals `magnitude_histogram_` and `magnitude_equal_counts_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.native.call import Call

__all__ = ["magnitude_equal_counts", "magnitude_histogram"]


def magnitude_histogram(
    begin: type[Call],
    counts: Any,
    hot_chunks: Any,
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    wide: bool,
) -> None:
    call = begin(base)
    slots, count, columns = counts.shape
    if count != len(models):
        raise ValueError(
            f"backend {call.NAME!r}: expected counts of {len(models)} models, got {count}"
        )
    chunks = hot_chunks.shape[1]
    if hot_chunks.shape[0] != count or 0 < chunks < -(-call.numel // HOT_CHUNK):
        raise ValueError(
            f"backend {call.NAME!r}: hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    call.native.magnitude_histogram(
        call.counters(counts, "int32"),
        call.counters(hot_chunks, "int32"),
        chunks,
        call.operand(base),
        call.operands(models),
        lo,
        shift,
        hot,
        slots,
        columns - 3,
        *call.end(wide),
    )


def magnitude_equal_counts(
    begin: type[Call], counts: Any, base: Flat, model: Flat, key: int, chunk: int, wide: bool
) -> None:
    call = begin(base)
    expected, got = -(-call.numel // chunk), counts.shape[0]
    if got != expected:
        raise ValueError(f"backend {call.NAME!r}: expected {expected} counts, got {got}")
    call.native.magnitude_equal_counts(
        call.counters(counts),
        call.operand(base),
        call.operand(model),
        key,
        chunk,
        *call.end(wide),
    )
