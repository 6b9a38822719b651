"""The reference of the counts of magnitudes that thresholds are selected from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.reference.value import keys, widened

__all__ = ["magnitude_equal_counts", "magnitude_histogram", "slots"]


def slots() -> int:
    """Return the number of counter slots that `magnitude_histogram` can use at once."""
    return 1


def magnitude_histogram(
    counts: torch.Tensor,
    hot_chunks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    wide: bool,
) -> None:
    """Count the keys below, in and above a bracket of bins; keys equal to `hot` are counted
    separately."""
    bins = counts.shape[2] - 3
    origin = widened(base, wide)
    for k, model in enumerate(models):
        key = keys(widened(model, wide) - origin)
        column = torch.where(key < lo[k], -1, ((key - lo[k]) >> shift[k]).clamp(max=bins)) + 1
        column = torch.where(key == hot[k], bins + 2, column)
        counts[0, k] += torch.bincount(column, minlength=bins + 3).to(counts)
        if hot_chunks.shape[1] > 0:
            for j, part in enumerate((key == hot[k]).split(HOT_CHUNK)):
                hot_chunks[k, j] = int(part.sum())


def magnitude_equal_counts(
    counts: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    """Count the elements of each chunk whose key equals `key`."""
    equal = keys(widened(model, wide) - widened(base, wide)) == key
    for j in range(counts.numel()):
        counts[j] = int(equal[j * chunk : (j + 1) * chunk].sum())
