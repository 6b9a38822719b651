"""Merges that look at each element of all models by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import Numbers, T, merges

__all__ = [
    "consensus_ta",
    "emr",
    "magmax",
    "median",
    "nearswap",
    "ram",
    "ramplus_tl",
    "tall_masks",
]


@merges("nearswap")
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
    ...


@merges("ram")
def ram(
    base: T,
    models: Sequence[T],
    *,
    epsilon: float = 1e-5,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Average, at each element, the task vectors of the models that changed it.

    Args:
        epsilon: magnitude above which an element counts as changed.
    """
    ...


@merges("ramplus_tl")
def ramplus_tl(
    base: T,
    models: Sequence[T],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """RAM, with what only one model changed scaled by 1 + r clip(shared / unique, 0, alpha).

    Args:
        r, alpha, epsilon: see above; epsilon is the magnitude from which an element is changed.
    """
    ...


@merges("magmax")
def magmax(
    base: T,
    models: Sequence[T],
    *,
    scale: float = 1.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Take each element from the task vector in which it is largest (Marczak et al. 2024)."""
    ...


@merges("median")
def median(
    models: Sequence[T],
    *,
    base: T | None = None,
    scale: float = 1.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Take the median of each element over the models, or over task vectors (Yin et al. 2018).

    theta_0 + scale * median_k tau_k; without a base, scale * median_k theta_k. Of an even number of
    models it is the mean of the middle two. With `nan="keep"`, an element is NaN if one model's is.
    """
    ...


@merges("consensus_ta")
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
    ...


@merges("tall_masks")
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
    ...


@merges("emr")
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
    ...
