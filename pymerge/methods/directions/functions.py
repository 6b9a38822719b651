"""Directions, pairs and masks: `merge` with named arguments.

All take a base and models (tensors, lists of tensors or state dicts, all alike), return the merged
model in the structure of the base, and raise RequestError (a ValueError) as `merge` does. `weights`
is one number for each model, or one for all; `scale` is the scaling coefficient (lambda); `nan` is
"error" or "keep"; `backend` and `dtype` are as in `merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from pymerge.merging.api import Tensors, merge_by
from pymerge.methods import METHODS

__all__ = [
    "arcee_fusion",
    "consensus_ta",
    "emr",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "slerp",
    "tall_masks",
    "tsv_m",
]

T = TypeVar("T", bound=Tensors)
Numbers = float | Sequence[float]


def _run(
    method: str,
    base: Any,
    models: Any,
    weights: Any,
    backend: str | None,
    dtype: torch.dtype | None,
    **parameters: Any,
) -> Any:
    return merge_by(METHODS[method], method, base, models, weights, backend, dtype, parameters)


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
    return _run(
        "model_stock",
        base,
        models,
        None,
        backend,
        dtype,
        angle=angle,
        filter_wise=filter_wise,
        nan=nan,
    )


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
    return _run(
        "slerp",
        base,
        [model],
        None,
        backend,
        dtype,
        t=t,
        nan=nan,
    )


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
    return _run(
        "nuslerp",
        base,
        models,
        weights,
        backend,
        dtype,
        flatten=flatten,
        nan=nan,
    )


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
    return _run(
        "multislerp",
        base,
        models,
        weights,
        backend,
        dtype,
        normalize_weights=normalize_weights,
        epsilon=epsilon,
        nan=nan,
    )


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
    return _run(
        "karcher",
        None,
        models,
        None,
        backend,
        dtype,
        max_iter=max_iter,
        tol=tol,
        nan=nan,
    )


def nearswap(
    base: T,
    model: T,
    *,
    t: float,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Move the base towards a model where the two are near each other.

    w = clamp(t / max(|theta_0 - theta_1|, 1e-6), 0, 1); theta = w theta_1 + (1 - w) theta_0

    Args:
        t: distance up to which the model is taken as it is.
    """
    return _run(
        "nearswap",
        base,
        [model],
        None,
        backend,
        dtype,
        t=t,
        nan=nan,
    )


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
    return _run(
        "arcee_fusion",
        base,
        [model],
        None,
        backend,
        dtype,
        semantics=semantics,
        nan=nan,
    )


def consensus_ta(
    base: T,
    models: Sequence[T],
    *,
    scale: float = 0.3,
    threshold: Numbers = 0.4,
    need: int = 2,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Task arithmetic without what matters to fewer than `need` models (Wang et al. 2024).

    Args:
        threshold: lambda_k of the TALL mask of model k; one number or one for each model.
        need: how many models must claim an element.
    """
    return _run(
        "consensus_ta",
        base,
        models,
        None,
        backend,
        dtype,
        scale=scale,
        threshold=threshold,
        need=need,
        nan=nan,
    )


def tall_masks(
    base: T,
    models: Sequence[T],
    *,
    task: int,
    threshold: float = 0.4,
    scale: float = 0.3,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """The part of task arithmetic that belongs to one task (TALL masks, Wang et al. 2024).

    Args:
        task: number of the model, from 0.
        threshold: lambda of its mask.
    """
    return _run(
        "tall_masks",
        base,
        models,
        None,
        backend,
        dtype,
        task=task,
        threshold=threshold,
        scale=scale,
        nan=nan,
    )


def emr(
    base: T,
    models: Sequence[T],
    *,
    task: int | None = None,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """EMR-Merging (Huang et al. 2024): the unified model, or that of one task.

    Args:
        task: number of the model whose mask and rescaler are applied; None gives the unified one.
    """
    return _run(
        "emr",
        base,
        models,
        None,
        backend,
        dtype,
        task=task,
        nan=nan,
    )


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
    return _run(
        "tsv_m",
        base,
        models,
        None,
        backend,
        dtype,
        scale=scale,
        nan=nan,
    )


def passthrough(
    model: T,
    *,
    scale: float = 1.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Copy one model, times `scale`."""
    return _run(
        "passthrough",
        None,
        [model],
        None,
        backend,
        dtype,
        scale=scale,
        nan=nan,
    )
