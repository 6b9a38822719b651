"""The Triton backend's counts of magnitudes: triton_kernels/magnitude.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.triton.library import (
    check,
    check_counters,
    kernels,
    largest,
    run,
    tables,
)

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
    numel = base.numel()
    count, columns = counts.shape[1:]
    needed, chunks = max(1, -(-numel // HOT_CHUNK)), hot_chunks.shape[1]
    if count != len(models):
        raise ValueError(f"backend 'triton': expected counts of {len(models)} models, got {count}")
    if hot_chunks.shape[0] != count or 0 < chunks < needed:
        raise ValueError(
            f"backend 'triton': hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    if not all(0 <= key <= largest(wide) for key in lo):
        raise ValueError(f"backend 'triton': lo: expected keys, got {list(lo)}")
    if not all(0 <= bits < (64 if wide else 32) for bits in shift):
        raise ValueError(f"backend 'triton': shift: expected bits of a key, got {list(shift)}")
    check(numel, base, *models)
    check_counters(counts, torch.int32)
    check_counters(hot_chunks, torch.int32)
    if chunks > 0:
        hot_chunks[:, :needed].zero_()
    if numel == 0:
        return
    # -1 never equals a key.
    guesses = [key if 0 <= key <= largest(wide) else -1 for key in hot]
    bins = columns - 3
    spans = [
        min(bins << bits, largest(wide) - key + 1) - 1 for key, bits in zip(lo, shift, strict=True)
    ]
    brackets = [number for row in zip(lo, spans, shift, guesses, strict=True) for number in row]
    arguments = {
        "counts": counts,
        "hot_chunks": hot_chunks if chunks > 0 else None,
        "bins": bins,
        "chunks": chunks,
    }
    run(
        "magnitude_histogram",
        base,
        models,
        arguments,
        brackets,
        [0.0],
        wide,
        scratch=("counts", "hot_chunks"),
    )


def magnitude_equal_counts(
    counts: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    numel = base.numel()
    if chunk < 1 or counts.numel() != -(-numel // chunk):
        raise ValueError(
            f"backend 'triton': expected one count for each {chunk} of {numel} elements, got "
            f"{counts.numel()}"
        )
    check(numel, base, model)
    check_counters(counts, torch.int64)
    if numel == 0:
        return
    if not 0 <= key <= largest(wide):
        counts.zero_()
        return
    module = kernels()
    integers, _, numbers = tables(base.device, [key], [], [0.0], wide)
    module.run(
        module.Launch(
            "magnitude_equal_counts",
            {
                "counts": counts,
                "base": base,
                "model": model,
                "integers": integers,
                "numbers": numbers,
                "chunk": chunk,
                "numel": numel,
            },
            numel=numel,
            models=1,
            device=base.device,
            dtypes=(base.dtype, model.dtype),
            programs=counts.numel(),
        )
    )
