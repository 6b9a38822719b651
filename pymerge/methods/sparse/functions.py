"""Task vectors that are made sparse: DARE, Breadcrumbs, DELLA, Localize-and-Stitch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import Numbers, T, merges

__all__ = [
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "localize_and_stitch",
]


@merges("dare_linear")
def dare_linear(
    base: T,
    models: Sequence[T],
    *,
    weights: Numbers | None = None,
    density: Numbers = 0.5,
    rescale: str = "inv_keep",
    scale: float = 1.0,
    normalize: bool = False,
    seed: int = 0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Drop task vector elements at random, rescale the rest, add up (DARE, Yu et al. 2024).

    Args:
        density: share that is kept, in [0, 1].
        rescale: "inv_keep" (1 / density), "l1" (ratio of the L1 norms, per tensor) or "none".
        normalize: divide by the sum of the weights, which then must not be 0.
        seed: of the masks, which depend on it, on names, models and indices alone.
    """
    ...


@merges("dare_ties")
def dare_ties(
    base: T,
    models: Sequence[T],
    *,
    weights: Numbers | None = None,
    density: Numbers = 0.5,
    rescale: str = "inv_keep",
    scale: float = 1.0,
    normalize: bool = False,
    trim: float | None = None,
    trim_scope: str = "tensor",
    seed: int = 0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """DARE with TIES' election of signs (Yu et al. 2024), and with its trim if asked.

    Args:
        density, rescale, seed: as in `dare_linear`.
        normalize: divide by the weights of the models that agree.
        trim: share of the elements, in [0, 1], that is kept by magnitude after dropping, as the
            authors do; None: all that was drawn, as in mergekit and PEFT.
        trim_scope: "tensor" (exactly int(trim n) elements of each) or "global" (of all tensors
            together, all that equal the threshold; not with rescale="l1").
    """
    ...


@merges("breadcrumbs")
def breadcrumbs(
    base: T,
    models: Sequence[T],
    *,
    weights: Numbers | None = None,
    density: Numbers = 0.9,
    gamma: Numbers = 0.01,
    scale: float = 1.0,
    normalize: bool = False,
    scope: str = "tensor",
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Drop each tensor's largest and smallest elements (Davari & Belilovsky 2024), add up.

    Args:
        density: share that is kept, in [0, 1].
        gamma: share of the largest that is dropped, in [0, 1].
        normalize: divide by the sum of the weights, which then must not be 0.
        scope: shares of each "tensor" (mergekit), or of each "row", a vector of the last dimension
            (the authors' code); rows take equal magnitudes by index, the lower as the smaller.
    """
    ...


@merges("breadcrumbs_ties")
def breadcrumbs_ties(
    base: T,
    models: Sequence[T],
    *,
    weights: Numbers | None = None,
    density: Numbers = 0.9,
    gamma: Numbers = 0.01,
    scale: float = 1.0,
    normalize: bool = False,
    scope: str = "tensor",
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Model Breadcrumbs with TIES' election of signs.

    Args:
        density, gamma, scope: as in `breadcrumbs`.
        normalize: divide by the weights of the models that agree.
    """
    ...


@merges("della")
def della(
    base: T,
    models: Sequence[T],
    *,
    weights: Numbers | None = None,
    density: Numbers = 0.7,
    epsilon: Numbers = 0.07,
    rescale: str = "per_element",
    scale: float = 1.0,
    normalize: bool = True,
    seed: int = 0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Drop at random, small elements of a row more often; elect signs (DELLA, Deep et al. 2024).

    Args:
        density: mean probability with which an element is kept.
        epsilon: half the spread of the probabilities; density +- epsilon within (0, 1), or
            density 1.
        rescale: "per_element" (the authors'), "l1" (mergekit's) or "none".
        normalize: divide by the weights of the models that agree.
        seed: of the masks.
    """
    ...


@merges("della_linear")
def della_linear(
    base: T,
    models: Sequence[T],
    *,
    weights: Numbers | None = None,
    density: Numbers = 0.7,
    epsilon: Numbers = 0.07,
    rescale: str = "per_element",
    scale: float = 1.0,
    normalize: bool = False,
    seed: int = 0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """DELLA without election: adds up.

    Args:
        density, epsilon, rescale, seed: as in `della`.
        normalize: divide by the sum of the weights, which then must not be 0.
    """
    ...


@merges("localize_and_stitch")
def localize_and_stitch(
    base: T,
    models: Sequence[T],
    *,
    density: Numbers = 0.05,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Localize-and-Stitch without data (He et al. 2024).

    Each task vector keeps its int(density n) largest magnitudes of the whole model's n elements
    (among equal ones, those first in flat order); the base gets the mean of those that keep an
    element.

    Args:
        density: share that is kept, in [0, 1]; one number or one for each model.
    """
    ...
