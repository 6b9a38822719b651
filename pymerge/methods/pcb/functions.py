"""PCB-Merging with named arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import Numbers, T, merges

__all__ = ["pcb_merge"]


@merges("pcb")
def pcb_merge(
    base: T,
    models: Sequence[T],
    *,
    ratio: float | None = None,
    scale: float = 1.0,
    variant: str = "paper",
    coefficients: Numbers | None = None,
    scope: str = "global",
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Merge by parameter competition balancing (PCB-Merging, Du et al. 2024).

    beta_i = softmax(K norm(tau_i^2)) * sum_j softmax(norm(tau_i tau_j)), with min-max as norm, over
    all elements of the scope; the share `ratio` of each task vector with the largest beta_i is
    kept, and theta = theta_0 + scale * sum_i c_i beta_i tau_i / sum_i beta_i.

    Args:
        ratio: share that is kept, in [0, 1]; default the variant's (0.1; vision, vision_es 0.05).
        variant: "paper", or one of the authors' codes, which differ from it and from each other:
            "root", "vision", "vision_es", "nlp" (docs/methods.md).
        coefficients: c_i, one for each model or one for all; default 1 ("vision": 1.2).
        scope: "global" (the whole model) or "tensor".

    >>> base = torch.zeros(4)
    >>> pcb_merge(base, [torch.tensor([1.0, 0.1, 0.0, -2.0])], ratio=0.25, variant="paper")
    tensor([ 0.,  0.,  0., -2.])
    """
    ...
