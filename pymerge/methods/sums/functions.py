"""Weighted sums: the average of models, and task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.merging.functions import T, merges

__all__ = ["linear", "task_arithmetic"]


@merges("linear")
def linear(
    models: Sequence[T],
    *,
    weights: float | Sequence[float] | None = None,
    normalize: bool = True,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Average models: sum_k w_k theta_k / sum_k w_k (Wortsman et al. 2022).

    Args:
        models: tensors, lists of tensors or state dicts, all alike; at least one.
        weights: one for each model, or one for all; default 1.
        normalize: divide by the sum of the weights, which then must not be 0.
        nan: "error" or "keep".
        backend, dtype: as in `merge`.

    Raises:
        RequestError: as in `merge`.

    >>> linear([torch.tensor([1.0]), torch.tensor([3.0])])
    tensor([2.])
    """
    ...


@merges("task_arithmetic")
def task_arithmetic(
    base: T,
    models: Sequence[T],
    *,
    weights: float | Sequence[float] | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    nan: str = "error",
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Add scaled task vectors (Ilharco et al. 2023).

    theta_0 + scale * sum_k w_k (theta_k - theta_0)

    A negative weight forgets a task; weights [1, 1, -1] make the analogy "C and B as A".

    Args:
        base, models: as in `merge`.
        weights: one for each model, or one for all; default 1.
        scale: the scaling coefficient (lambda).
        normalize: divide the sum by the sum of the weights, which then must not be 0.
        nan: "error" or "keep".
        backend, dtype: as in `merge`.

    Raises:
        RequestError: as in `merge`.

    >>> base = torch.zeros(2)
    >>> task_arithmetic(base, [base + 1.0], weights=-1.0, scale=0.5)
    tensor([-0.5000, -0.5000])
    """
    ...
