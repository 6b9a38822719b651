"""Task vectors that are made sparse, or weighed element by element: `merge` with named arguments.

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
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "magmax",
    "pcb_merge",
    "ram",
    "ramplus_tl",
    "sce",
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
    return _run(
        "pcb",
        base,
        models,
        coefficients,
        backend,
        dtype,
        ratio=ratio,
        scale=scale,
        variant=variant,
        scope=scope,
        nan=nan,
    )


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
    return _run(
        "dare_linear",
        base,
        models,
        weights,
        backend,
        dtype,
        density=density,
        rescale=rescale,
        scale=scale,
        normalize=normalize,
        seed=seed,
        nan=nan,
    )


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
    return _run(
        "dare_ties",
        base,
        models,
        weights,
        backend,
        dtype,
        density=density,
        rescale=rescale,
        scale=scale,
        normalize=normalize,
        trim=trim,
        trim_scope=trim_scope,
        seed=seed,
        nan=nan,
    )


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
    return _run(
        "breadcrumbs",
        base,
        models,
        weights,
        backend,
        dtype,
        density=density,
        gamma=gamma,
        scale=scale,
        normalize=normalize,
        scope=scope,
        nan=nan,
    )


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
    return _run(
        "breadcrumbs_ties",
        base,
        models,
        weights,
        backend,
        dtype,
        density=density,
        gamma=gamma,
        scale=scale,
        normalize=normalize,
        scope=scope,
        nan=nan,
    )


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
    return _run(
        "della",
        base,
        models,
        weights,
        backend,
        dtype,
        density=density,
        epsilon=epsilon,
        rescale=rescale,
        scale=scale,
        normalize=normalize,
        seed=seed,
        nan=nan,
    )


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
    return _run(
        "della_linear",
        base,
        models,
        weights,
        backend,
        dtype,
        density=density,
        epsilon=epsilon,
        rescale=rescale,
        scale=scale,
        normalize=normalize,
        seed=seed,
        nan=nan,
    )


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
    return _run(
        "sce",
        base,
        models,
        None,
        backend,
        dtype,
        select_topk=select_topk,
        mask=mask,
        nan=nan,
    )


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
    return _run(
        "ram",
        base,
        models,
        None,
        backend,
        dtype,
        epsilon=epsilon,
        nan=nan,
    )


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
    return _run(
        "ramplus_tl",
        base,
        models,
        None,
        backend,
        dtype,
        r=r,
        alpha=alpha,
        epsilon=epsilon,
        nan=nan,
    )


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
    return _run(
        "magmax",
        base,
        models,
        None,
        backend,
        dtype,
        scale=scale,
        nan=nan,
    )
