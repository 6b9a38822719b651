"""TIES with named arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import T, merges

__all__ = ["ties_merge"]


@merges("ties")
def ties_merge(
    base: T,
    models: Sequence[T],
    *,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    weights: float | Sequence[float] | None = None,
    semantics: str = "official",
    scope: str | None = None,
    merge: str | None = None,
    exact_k: bool | None = None,
    nan: str = "error",
    backend: str | None = None,
    elect: str | None = None,
    normalize: bool | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Merge by TIES: trim, elect a sign per element, merge what agrees (Yadav et al. 2023).

    Args:
        base, models: as in `merge`.
        density: share of each task vector that is kept, in [0, 1]; one number or one for each
            model.
        scale: the scaling coefficient (lambda).
        weights: one for each model, or one for all; default 1. They scale the trimmed task vectors
            before the election ("mergekit", and as an extension the dialects that know no weights),
            or only what is summed ("peft").
        semantics: whose TIES: "official", "mergekit", "peft", "mergelm", "adamerging" (the same as
            "fusionbench"), "sd_mecha". docs/methods.md lists the differences.
        scope, merge, exact_k, elect: single details that override the semantics: "global" or
            "tensor"; "mean", "sum" or "max"; keep exactly k or all at the threshold; "mass" or
            "count".
        normalize: mergekit's word for merge="mean" (True) or "sum" (False).
        nan: "error" or "keep".
        backend, dtype: as in `merge`.

    Raises:
        RequestError: as in `merge`.

    >>> base = torch.zeros(4)
    >>> ties_merge(base, [torch.tensor([4.0, 1.0, -2.0, 0.5]), torch.tensor([2.0, -3.0, 1.0, 0.5])],
    ...            density=0.25)
    tensor([ 3., -3., -2.,  0.])
    """
    ...
