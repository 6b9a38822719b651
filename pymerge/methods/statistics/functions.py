"""Merges that weigh parameters by statistics of data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import Collected, Numbers, T, merges

__all__ = ["fisher_merge", "gradient_matching", "regmean_merge"]


@merges("fisher")
def fisher_merge(
    models: Sequence[T],
    fishers: Sequence[Collected],
    *,
    weights: Numbers | None = None,
    semantics: str = "official",
    floor: float | None = None,
    floor_rule: str | None = None,
    normalize: bool | str | None = None,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Average models, each parameter by its Fisher information (Matena and Raffel 2022).

    sum_k c_k F_k theta_k / sum_k c_k F_k,  c_k = weight_k / |F_k|

    Args:
        models: tensors, lists of tensors or state dicts, all alike; at least one.
        fishers: for each model what `collect_fisher` or `load_statistics` gave, or a structure of
            tensors like it: finite, not negative, of the parameters' shapes. Parameters that none
            of them has (buffers, frozen ones) are averaged by `weights`.
        weights: one for each model, or one for all, not negative; default 1.
        semantics: "official", "mergelm" (the same as "fusionbench") or "mats"; gives the defaults
            of the next three. docs/methods.md lists the differences.
        floor: least Fisher information, or what is added to it. Default 1e-6; "mats" 1e-8.
        floor_rule: "max_first" takes max(F, floor) of the first model only, the target (official);
            "max" of all (mats); "add" adds it to all, and to the norms (mergelm).
        normalize: divide each model's by its L2 norm over the whole model ("global", True), over
            each tensor ("tensor"), or not ("none", False).
        nan, backend, dtype: as in `merge`.

    An element of which all c_k F_k are 0 (with floor 0) takes the mean of the models by `weights`.
    A model whose Fisher information is 0 everywhere is not divided by its norm.

    Raises:
        RequestError: as in `merge`, and statistics that do not fit the models, are not finite or
            are negative, and weights that are all 0.

    >>> fisher_merge([torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])],
    ...              [torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])], normalize=False)
    tensor([3., 3.])
    """
    ...


@merges("regmean")
def regmean_merge(
    models: Sequence[T],
    grams: Sequence[Collected],
    *,
    weights: Numbers | None = None,
    semantics: str = "official",
    off_diagonal: float | None = None,
    ridge: float = 0.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Merge linear layers so that they act on each model's inputs as that model does; convolutions
    too, where they were asked for.

    W = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k,  G_k = X_k^T X_k    (Jin et al. 2023)

    W is [in, out], the transpose of `nn.Linear.weight`; the weight of a convolution, [out, in,
    *kernel], is taken for one of [out, in * prod(kernel)], X being the patches of its input. It
    minimises sum_k w_k |X_k W - X_k W_k|^2, X_k^T X_k being a mean over rows. Parameters without a
    Gram matrix (biases, embeddings, norms) are averaged by `weights`.

    Args:
        models: as in `fisher_merge`.
        grams: for each model what `collect_gram` or `load_statistics` gave, or a dictionary of
            symmetric matrices [in, in] by the name of the weight, of any that has two dimensions or
            more. `nn.Linear`'s [out, in] is taken for granted in a dictionary; what `collect_gram`
            gives knows of transformers' Conv1D.
        weights: one for each model, or one for all, not negative; default 1.
        semantics: "official", "mergelm" or "fusionbench"; gives the default of `off_diagonal`.
        off_diagonal: factor of the elements off the diagonal, in [0, 1]; 0 leaves the diagonal.
            Default 1, "fusionbench" 0.95; the authors' configurations have 0.9 and 0.1.
        ridge: added to the diagonal of every Gram matrix, on both sides of the equation, as a share
            of their mean diagonal; it draws towards the average of the models. Default 0.
        nan, backend, dtype: as in `merge`.

    Solved by Cholesky in float64, on one thread. Where all Gram matrices are 0 the weight is
    averaged.

    Raises:
        RequestError: as in `fisher_merge`; a Gram matrix that is not finite or not symmetric; a sum
            of them that is singular (inputs that are always 0, or fewer examples than inputs).

    >>> gram = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> a, b = {"w": torch.tensor([[0.0, 2.0]])}, {"w": torch.tensor([[3.0, 0.0]])}
    >>> regmean_merge([a, b], [{"w": gram}, {"w": torch.eye(2)}])
    {'w': tensor([[1., 1.]])}
    """
    ...


@merges("gradient_matching")
def gradient_matching(
    base: T,
    models: Sequence[T],
    fishers: Sequence[Collected],
    *,
    base_fisher: Collected | None = None,
    weights: Numbers | None = None,
    scale: float = 1.0,
    base_weight: float = 1.0,
    delta: float = 0.0,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Add task vectors, preconditioned by squared gradients (Daheim et al. 2024).

    theta_0 + s sum_k (a_k H_k + s_0 H_0 + d) (theta_k - theta_0) / (sum_k s a_k H_k + s_0 H_0 + d)

    As in the authors' code, s stands beside a_k below and not above.

    Args:
        base, models: as in `merge`.
        fishers: H_k, as in `fisher_merge`; the authors take
            `collect_fisher(..., estimator="batch", labels="sampled")`.
        base_fisher: H_0, the base's; None is 0.
        weights: a_k, one for each model, or one for all, not negative; default 1. The authors'
            example has the sizes of the data sets.
        scale: s, not negative.
        base_weight: s_0, not negative.
        delta: d (delta_0), not negative; the authors' example has 1e-12.
        nan, backend, dtype: as in `merge`.

    Where the divisor is 0, and for parameters that no statistics have, the result is theta_0 + s
    times the mean task vector by `weights`. Without H_0 and d, and with s = 1, this is Fisher
    merging without norms and floor.

    Raises:
        RequestError: as in `fisher_merge`.

    >>> base = torch.zeros(2)
    >>> gradient_matching(base, [base + 1.0, base + 3.0], [base + 1.0, base + 1.0], delta=2.0)
    tensor([3., 3.])
    """
    ...
