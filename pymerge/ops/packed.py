"""Checks of packed (trimmed) task vectors, shared by the backends; see `specs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.constants import SUM_CHUNK

__all__ = ["check_packed", "check_partials"]


def check_packed(
    masks: Sequence[Any], values: Sequence[Any], offsets: Sequence[Any], numel: int, backend: str
) -> int:
    """Return the number of chunks; raise ValueError unless every model's arrays fit `numel`.

    Args:
        masks: int32 words of each model, [ceil(numel / 32)] or more.
        values: the elements that each model keeps.
        offsets: int64, for each model [ceil(numel / 1024) + 1].
        numel: number of elements of the base.
        backend: name used in errors.
    """
    chunks = -(-numel // SUM_CHUNK)
    if not len(masks) == len(values) == len(offsets):
        raise ValueError(
            f"backend {backend!r}: expected masks, values and offsets of as many models, got "
            f"{len(masks)}, {len(values)} and {len(offsets)}"
        )
    for mask, offset in zip(masks, offsets, strict=True):
        if mask.numel() < -(-numel // 32) or offset.numel() != chunks + 1:
            raise ValueError(
                f"backend {backend!r}: a mask of {mask.numel()} words and {offset.numel()} offsets "
                f"do not fit {numel} elements"
            )
    return chunks


def check_partials(partials: Any, models: int, chunks: int, backend: str) -> None:
    """Raise ValueError unless there is one sum for each model and chunk."""
    if tuple(partials.shape) != (models, chunks):
        raise ValueError(
            f"backend {backend!r}: expected partials of shape {(models, chunks)}, got "
            f"{tuple(partials.shape)}"
        )
