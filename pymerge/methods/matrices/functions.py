"""Merges of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import T, merges

__all__ = ["tsv_m"]


@merges("tsv_m")
def tsv_m(
    base: T,
    models: Sequence[T],
    *,
    scale: float = 1.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """TSV-M (Gargiulo et al. 2025): leading singular vectors of each task, made orthogonal."""
    ...
