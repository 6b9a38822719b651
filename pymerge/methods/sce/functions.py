"""SCE with named arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import T, merges

__all__ = ["sce"]


@merges("sce")
def sce(
    base: T,
    models: Sequence[T],
    *,
    select_topk: float = 1.0,
    mask: str = "weights",
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Weigh models by the energy of their task vectors where these differ most (Wan et al. 2024).

    Args:
        select_topk: share of the elements of nonzero variance that is selected, in [0, 1].
        mask: use the selection for the "weights" (the authors' code) or "everywhere" (mergekit).
    """
    ...
