"""Merges by norms and angles of whole tensors, and the copy of one model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import Numbers, T, merges

__all__ = ["karcher", "model_stock", "multislerp", "nuslerp", "passthrough", "slerp"]


@merges("model_stock")
def model_stock(
    base: T,
    models: Sequence[T],
    *,
    angle: str = "cosine",
    filter_wise: bool = False,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Interpolate between base and average by the angle of task vectors (Jang et al. 2024).

    Args:
        angle: mean over pairs of the "cosine" (mergekit) or of the "angle" (FusionBench).
        filter_wise: one ratio for each row, a vector of the last dimension.
    """
    ...


@merges("slerp")
def slerp(
    base: T,
    model: T,
    *,
    t: float,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Interpolate between the base and one model along the arc between them, tensor by tensor.

    Args:
        t: 0 gives the base, 1 the model.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), t=0.5)
    tensor([0.7071, 0.7071])
    """
    ...


@merges("nuslerp")
def nuslerp(
    models: Sequence[T],
    *,
    base: T | None = None,
    weights: Numbers | None = None,
    flatten: bool = True,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """SLERP of two models by weights; of their task vectors where a base is given.

    Args:
        weights: t is w_2 / (w_1 + w_2).
        flatten: one angle for a whole tensor; False: one for each row, a vector of the last
            dimension.
    """
    ...


@merges("multislerp")
def multislerp(
    models: Sequence[T],
    *,
    base: T | None = None,
    weights: Numbers | None = None,
    normalize_weights: bool = True,
    epsilon: float = 1e-8,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Weighted mean of directions by one step in the tangent space of the sphere.

    Args:
        normalize_weights: divide the weights by their sum, which then must not be 0.
        epsilon: floor of norms.
    """
    ...


@merges("karcher")
def karcher(
    models: Sequence[T],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Karcher mean of the models' directions, times the mean of their norms, tensor by tensor.

    Args:
        max_iter, tol: of the iteration; it ends when a step is shorter than tol.
    """
    ...


@merges("passthrough")
def passthrough(
    model: T,
    *,
    scale: float = 1.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Copy one model, times `scale`."""
    ...
