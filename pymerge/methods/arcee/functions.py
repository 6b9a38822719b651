"""Arcee Fusion with named arguments."""

from __future__ import annotations

import torch

from pymerge.merging.functions import T, merges

__all__ = ["arcee_fusion"]


@merges("arcee_fusion")
def arcee_fusion(
    base: T,
    model: T,
    *,
    semantics: str = "mergekit",
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Take the elements of a model that changed most and matter most (mergekit's arcee_fusion).

    importance = |tau| KL(softmax(theta_1) || softmax(theta_0)), the divergence of each row with
    1e-8 added to each probability; theta_0 + tau where it is at least median + 1.5 (upper - lower
    quartile), else theta_0. Quantiles are exact.

    Args:
        semantics: "mergekit" computes the divergence as mergekit does, in float32, on torch and on
            whole tensors; for small changes that is mostly rounding errors (docs/methods.md).
            "exact" computes it without them, on every backend, in bounded memory.

    Example:
        >>> base = torch.zeros(2, 4)
        >>> model = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
        >>> arcee_fusion(base, model, semantics="exact")
        tensor([[4., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    ...
