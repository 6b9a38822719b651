"""Merges of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import T, merges

__all__ = ["iso_c", "iso_cts", "tsv_m"]


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


@merges("iso_c")
def iso_c(
    base: T,
    models: Sequence[T],
    *,
    scale: float = 1.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Merge isotropically in the common subspace (Iso-C, Marczak et al. 2025, algorithm 1).

    Of each matrix, the task vectors are added up: U S V = sum_k tau_k. All singular values become
    their mean: theta = theta_0 + scale * mean(S) U V. Other tensors get the mean task vector.

    >>> base = torch.zeros(2, 2)
    >>> iso_c(base, [torch.tensor([[3.0, 0.0], [0.0, 1.0]])])
    tensor([[2., 0.],
            [0., 2.]])
    """
    ...


@merges("iso_cts")
def iso_cts(
    base: T,
    models: Sequence[T],
    *,
    scale: float = 1.0,
    common_fraction: float = 0.8,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Merge isotropically in common and task-specific subspaces (Iso-CTS, Marczak et al. 2025).

    As `iso_c`, but only a share of the singular vectors of the sum is kept. Each model adds as many
    of its own as are left, from what of its task vector is outside of those (algorithm 2).

    Args:
        common_fraction: share of the rank that the sum keeps, in [0, 1]; 1 is `iso_c`. What is left
            is divided among the models without a remainder, as in the authors' code.
    """
    ...
