"""Sums over layers: the weighted sum and its adjoint, extremes, norms and dot products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pymerge.dtypes import is_float
from pymerge.ops import contract as contract  # declares torch.ops.pymerge
from pymerge.ops.arguments import sums_shape
from pymerge.ops.call import call
from pymerge.primitives.arguments import (
    backend_name,
    check,
    counters_on,
    flattened,
    is_wide,
    require,
)

__all__ = ["Statistics", "dots", "gram", "statistics", "weighted_sum"]

Tensor = torch.Tensor


def weighted_sum(
    base: Sequence[Tensor],
    models: Sequence[Sequence[Tensor]],
    coefficients: Tensor | Sequence[Sequence[float]],
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Return `theta_0^l + sum_k lambda_k^l (theta_k^l - theta_0^l)`, layer by layer.

    This is the forward pass of AdaMerging (Yang et al. 2024, eq. 3); `dots` is its adjoint.

    Args:
        base: L tensors. models: K sequences of L tensors.
        coefficients: lambda, [K, L].

    Returns: L tensors of the dtypes of `base`.
    """
    table = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
    _check_layers(base, models, table)
    merged = []
    for layer, origin in enumerate(base):
        own = [model[layer] for model in models]
        out = torch.empty_like(origin, memory_format=torch.contiguous_format)
        torch.ops.pymerge.task_arithmetic_(
            out.view(-1),
            torch.zeros(3, dtype=torch.int64, device=counters_on(origin, backend)),
            flattened(origin),
            [flattened(tensor) for tensor in own],
            table[:, layer].tolist(),
            1.0,
            1.0,
            wide=is_wide(origin, *own),
            backend=backend_name(backend, origin),
        )
        merged.append(out)
    return merged


def dots(
    gradients: Sequence[Tensor],
    base: Sequence[Tensor],
    models: Sequence[Sequence[Tensor]],
    *,
    backend: str | None = None,
) -> Tensor:
    """Return `<g^l, theta_k^l - theta_0^l>` for all models and layers: the adjoint of
    `weighted_sum`.

    Differences are computed element by element before they are multiplied; sums are in double
    precision, in an order that does not depend on the backend.

    Args:
        gradients, base: L tensors. models: K sequences of L tensors.

    Returns: float64 [K, L], on the CPU.
    """
    _check_layers(base, models, torch.empty(len(models), len(base)))
    require(len(gradients) == len(base), "gradients", f"{len(base)} tensors", f"{len(gradients)}")
    result = torch.zeros(len(models), len(base), dtype=torch.float64)
    for layer, (gradient, origin) in enumerate(zip(gradients, base, strict=True)):
        name, shape = f"gradients[{layer}]", tuple(origin.shape)
        floats = isinstance(gradient, Tensor) and is_float(gradient.dtype)
        require(floats, name, "a floating-point tensor", str(getattr(gradient, "dtype", None)))
        own = tuple(gradient.shape)
        require(own == shape, name, f"shape {shape} like base[{layer}]", f"{own}")
        tensors = [*(model[layer] for model in models), gradient]
        sums = _sums("dots", origin, tensors, 0, backend)
        result[:, layer] = torch.tensor([math.fsum(row) for row in sums], dtype=torch.float64)
    return result


@dataclass(frozen=True)
class Statistics:
    """Statistics of vectors; each a float64 tensor: [models], or [models, rows].

    least, largest: the extremes (NaN is ignored). l1: sum of magnitudes. l2: the Euclidean norm.
    """

    least: Tensor
    largest: Tensor
    l1: Tensor
    l2: Tensor


def statistics(
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    rows: bool = False,
    backend: str | None = None,
) -> Statistics:
    """Return extremes and norms of the models, or of their task vectors if there is a base.

    Args:
        rows: of each row, a vector of the last dimension, instead of each tensor.
    """
    require(len(models) > 0, "models", "at least one tensor", "none")
    check(models[0] if base is None else base, models)
    columns = models[0].shape[-1] if rows and models[0].dim() > 0 else 0
    require(not rows or columns > 0, "rows", "tensors whose last dimension is not empty", "none")
    table = _sums("statistics", base, models, columns, backend).reshape(len(models), 4, -1)
    if columns == 0:
        found = np.empty((len(models), 4))
        for k, own in enumerate(table):
            found[k, 0] = own[0].min(initial=math.inf)
            found[k, 1] = own[1].max(initial=-math.inf)
            found[k, 2:] = [math.fsum(row) for row in own[2:]]
        table = found
    least, largest, l1, squares = (torch.from_numpy(table[:, i].copy()) for i in range(4))
    return Statistics(least, largest, l1, squares.sqrt())


def gram(
    models: Sequence[Tensor], base: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Return the dot products of all pairs of models, or of their task vectors: float64 [K, K].

    Every input is read once.
    """
    require(len(models) > 0, "models", "at least one tensor", "none")
    check(models[0] if base is None else base, models)
    sums = iter(math.fsum(row) for row in _sums("gram", base, models, 0, backend))
    matrix = torch.zeros(len(models), len(models), dtype=torch.float64)
    for i in range(len(models)):
        for j in range(i, len(models)):
            matrix[i, j] = matrix[j, i] = next(sums)
    return matrix


def _sums(
    kind: str,
    base: Tensor | None,
    models: Sequence[Tensor],
    columns: int,
    backend: str | None,
) -> np.ndarray:
    """Return the sums of all chunks, or of rows: [sums, chunks]."""
    tensors = models if base is None else [base, *models]
    partials = np.zeros(sums_shape(kind, len(models), models[0].numel(), columns))
    call(
        "chunk_sums_",
        partials,
        None if base is None else flattened(base),
        [flattened(model) for model in models],
        kind,
        columns=columns,
        wide=is_wide(*tensors),
        backend=backend_name(backend, models[0]),
    )
    return partials


def _check_layers(
    base: Sequence[Tensor], models: Sequence[Sequence[Tensor]], table: Tensor
) -> None:
    for k, model in enumerate(models):
        expected = f"{len(base)} tensors like base"
        require(len(model) == len(base), f"models[{k}]", expected, f"{len(model)}")
    shape = (len(models), len(base))
    got = f"shape {tuple(table.shape)}"
    require(tuple(table.shape) == shape, "coefficients", f"shape {shape}", got)
    for layer, origin in enumerate(base):
        check(origin, [model[layer] for model in models])
