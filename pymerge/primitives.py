"""The operations that the methods are made of, over tensors: for methods of one's own.

All run on any backend and give the same bits on each. A *task vector* (delta) is `model - base`, in
float32 (float64 if an input is), and is never stored where it need not be. Inputs are tensors of
one shape, on one device, of dtypes float32, float16, bfloat16 or float64 in any mixture; where
tensors are asked for as a sequence, each layer is one of them.

Example:
    >>> import torch
    >>> from pymerge import primitives
    >>> base, tuned = torch.zeros(4), [torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.ones(4)]
    >>> cuts = primitives.magnitude_thresholds(base, tuned, density=0.5)
    >>> primitives.elect_signs(base, tuned, cuts)
    tensor([ 1., -1.,  1.,  1.])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pymerge import _ops as _ops  # declares torch.ops.pymerge
from pymerge._calls import call
from pymerge.backends import resolve
from pymerge.backends.arguments import padded, sums_shape
from pymerge.errors import RequestError
from pymerge.masks import keep_limit, seed_words
from pymerge.methods.ties import TrimTarget
from pymerge.select import KEEP_NONE, order_statistics

__all__ = [
    "Statistics",
    "disjoint_merge",
    "dots",
    "elect_signs",
    "gram",
    "magnitude_thresholds",
    "random_mask",
    "row_ranks",
    "statistics",
    "task_vector",
    "trim",
    "weighted_sum",
]

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def task_vector(base: Tensor, model: Tensor, *, backend: str | None = None) -> Tensor:
    """Return `model - base`, computed without copies of either in float32.

    Returns: float32, or float64 if an input is; of the inputs' shape.
    """
    return trim(base, [model], [0], backend=backend)[0]


def magnitude_thresholds(
    base: Tensor | Sequence[Tensor],
    models: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    density: float | Sequence[float],
    *,
    backend: str | None = None,
) -> list[int]:
    """Return the keys at which each task vector's largest elements begin: exact order statistics.

    A key is `bits(|delta|)`, which is ordered as `|delta|` is. Sequences of tensors are one vector:
    the threshold is over all of them together (Yadav et al. 2023, whole-model trim). Nothing is
    sorted and no task vector is held.

    Args:
        density: share of the elements in [0, 1] that are at or above the threshold, for all models
            or for each; `int(density * n)` elements, and all that equal the last of them.

    Returns: a key for each model, to be given to `trim`, `elect_signs` and `disjoint_merge`.
    """
    layers = [base] if isinstance(base, Tensor) else list(base)
    stacks = [[m] if isinstance(m, Tensor) else list(m) for m in models]
    for k, stack in enumerate(stacks):
        _require(
            len(stack) == len(layers),
            f"models[{k}]",
            f"{len(layers)} tensors like base",
            f"{len(stack)}",
        )
    shares = [density] * len(stacks) if isinstance(density, (int, float)) else list(density)
    _require(len(shares) == len(stacks), "density", f"{len(stacks)} numbers", f"{len(shares)}")
    for share in shares:
        _require(0 <= share <= 1, "density", "numbers in [0, 1]", f"{share}")
    columns = [[stack[i] for stack in stacks] for i in range(len(layers))]
    for own, others in zip(layers, columns, strict=True):
        _check(own, others)
    total = sum(layer.numel() for layer in layers)
    wide = _wide(*layers, *(tensor for stack in stacks for tensor in stack))
    targets = []
    for share in shares:
        kept = int(share * total)
        keep = TrimTarget("rank", total - kept + 1) if kept else TrimTarget("none")
        targets.append(keep)
    parts = [
        (i, _flat(a), [_flat(m) for m in ms])
        for i, (a, ms) in enumerate(zip(layers, columns, strict=True))
    ]
    name = _backend(backend, layers[0])
    cuts, _ = order_statistics(lambda: iter(parts), targets, total, wide=wide, backend=name)
    return [cut.key for cut in cuts]


def trim(
    base: Tensor,
    models: Sequence[Tensor],
    thresholds: Sequence[int],
    *,
    last: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Return the task vectors with zeros where `bits(|delta|)` is below the threshold.

    Args:
        thresholds: a key for each model.
        last: the largest key that is kept, for each model; with it, a band of magnitudes is kept
            (Breadcrumbs), or all but the largest ones.

    Returns: float32 (float64 if an input is), one for each model.
    """
    _check(base, models)
    _check_count("thresholds", thresholds, models)
    tops = [KEEP_NONE] * len(models) if last is None else list(last)
    _check_count("last", tops, models)
    wide = _wide(base, *models)
    result = []
    for model, low, high in zip(models, thresholds, tops, strict=True):
        out = torch.empty_like(base, dtype=_dtype(wide), memory_format=torch.contiguous_format)
        _sparse(out, base, [model], [low], [high], [1.0], wide, backend)
        result.append(out)
    return result


def _sparse(
    out: Tensor,
    base: Tensor,
    models: Sequence[Tensor],
    lo: Sequence[int],
    last: Sequence[int],
    weights: Sequence[float],
    wide: bool,
    backend: str | None,
) -> None:
    torch.ops.pymerge.sparse_merge_(
        out.view(-1),
        torch.zeros(3, dtype=torch.int64, device=_counters_on(base, backend)),
        _flat(base),
        [_flat(model) for model in models],
        lo,
        last,
        [],
        [],
        [1.0] * len(models),
        weights,
        False,
        False,
        1.0,
        1.0,
        0,
        bare=True,
        wide=wide,
        backend=_backend(backend, base),
    )


def elect_signs(
    base: Tensor,
    models: Sequence[Tensor],
    thresholds: Sequence[int] | None = None,
    *,
    weights: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the sign of the sum of the (trimmed, weighted) task vectors: -1, 0 or 1.

    TIES (Yadav et al. 2023), "mass". Returns: float32, or float64 if an input is.
    """
    _check(base, models)
    lo = [0] * len(models) if thresholds is None else list(thresholds)
    own = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    _check_count("thresholds", lo, models)
    _check_count("weights", own, models)
    wide = _wide(base, *models)
    out = torch.empty_like(base, dtype=_dtype(wide), memory_format=torch.contiguous_format)
    _sparse(out, base, models, lo, [KEEP_NONE] * len(lo), own, wide, backend)
    return out.sign_()


def disjoint_merge(
    base: Tensor,
    models: Sequence[Tensor],
    thresholds: Sequence[int] | None = None,
    *,
    merge: str = "mean",
    zero_sign: int = 1,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Return `base + scale * merge of what agrees with the elected sign`: TIES, thresholds given.

    Args:
        merge: "mean", "sum" or "max".
        zero_sign: what a sum of 0 elects: 1, -1, or 0 for nothing.

    Returns: the dtype and shape of `base`.
    """
    _check(base, models)
    lo = [0] * len(models) if thresholds is None else list(thresholds)
    _check_count("thresholds", lo, models)
    rules = {"mean": "mean_of_count", "sum": "sum", "max": "max"}
    _require(merge in rules, "merge", f"one of {', '.join(rules)}", repr(merge))
    _require(zero_sign in (-1, 0, 1), "zero_sign", "-1, 0 or 1", repr(zero_sign))
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    torch.ops.pymerge.ties_(
        out.view(-1),
        torch.zeros(3, dtype=torch.int64, device=_counters_on(base, backend)),
        _flat(base),
        [_flat(model) for model in models],
        lo,
        [],
        "none",
        rules[merge],
        "mass",
        zero_sign,
        scale,
        False,
        wide=_wide(base, *models),
        backend=_backend(backend, base),
    )
    return out


def weighted_sum(
    base: Sequence[Tensor],
    models: Sequence[Sequence[Tensor]],
    coefficients: Tensor | Sequence[Sequence[float]],
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Return `theta_0^l + sum_k lambda_k^l (theta_k^l - theta_0^l)`, layer by layer.

    The forward pass of AdaMerging (Yang et al. 2024, eq. 3); `dots` is its adjoint.

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
            torch.zeros(3, dtype=torch.int64, device=_counters_on(origin, backend)),
            _flat(origin),
            [_flat(tensor) for tensor in own],
            table[:, layer].tolist(),
            1.0,
            1.0,
            wide=_wide(origin, *own),
            backend=_backend(backend, origin),
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

    Differences are taken element by element before they are multiplied; sums are of doubles, in an
    order that does not depend on the backend.

    Args:
        gradients, base: L tensors. models: K sequences of L tensors.

    Returns: float64 [K, L], on the CPU.
    """
    _check_layers(base, models, torch.empty(len(models), len(base)))
    _require(len(gradients) == len(base), "gradients", f"{len(base)} tensors", f"{len(gradients)}")
    result = torch.zeros(len(models), len(base), dtype=torch.float64)
    for layer, (gradient, origin) in enumerate(zip(gradients, base, strict=True)):
        name, shape = f"gradients[{layer}]", tuple(origin.shape)
        floats = isinstance(gradient, Tensor) and gradient.dtype in _FLOATS
        _require(floats, name, "a floating-point tensor", str(getattr(gradient, "dtype", None)))
        own = tuple(gradient.shape)
        _require(own == shape, name, f"shape {shape} like base[{layer}]", f"{own}")
        tensors = [*(model[layer] for model in models), gradient]
        sums = _sums("dots", origin, tensors, 0, backend)
        result[:, layer] = torch.tensor([math.fsum(row) for row in sums], dtype=torch.float64)
    return result


@dataclass(frozen=True)
class Statistics:
    """Statistics of vectors; each a float64 tensor: [models], or [models, rows].

    least, largest: the extremes (NaN counts for nothing). l1: sum of magnitudes. l2: the Euclidean
    norm.
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
    """Return extremes and norms of the models, or of their task vectors where there is a base.

    Args:
        rows: of each row, a vector of the last dimension, instead of each tensor.
    """
    _require(len(models) > 0, "models", "at least one tensor", "none")
    _check(models[0] if base is None else base, models)
    columns = models[0].shape[-1] if rows and models[0].dim() > 0 else 0
    _require(not rows or columns > 0, "rows", "tensors whose last dimension is not empty", "none")
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
    _require(len(models) > 0, "models", "at least one tensor", "none")
    _check(models[0] if base is None else base, models)
    sums = iter(math.fsum(row) for row in _sums("gram", base, models, 0, backend))
    matrix = torch.zeros(len(models), len(models), dtype=torch.float64)
    for i in range(len(models)):
        for j in range(i, len(models)):
            matrix[i, j] = matrix[j, i] = next(sums)
    return matrix


def row_ranks(base: Tensor, models: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Return the rank of each `|delta|` within its row, from 0; equal magnitudes by index.

    Returns: int32 [models, *shape].
    """
    _check(base, models)
    columns = base.shape[-1] if base.dim() > 0 else 1
    ranks = np.zeros((len(models), padded(base.numel())), np.int32)
    if base.numel() > 0:
        wide = _wide(base, *models)
        flat = _flat(base), [_flat(model) for model in models]
        call("row_ranks_", ranks, *flat, columns, wide=wide, backend=_backend(backend, base))
    return torch.from_numpy(ranks[:, : base.numel()].copy()).reshape(len(models), *base.shape)


def random_mask(
    shape: Sequence[int], density: float, *, seed: int = 0, name: str = "", model: int = 0
) -> Tensor:
    """Return the mask that DARE draws: a hash of (seed, name, model, flat index), on any backend.

    Args:
        density: probability that an element is kept, in [0, 1].
        name: the tensor's name; model: the model's number, from 0.

    Returns: bool, of that shape.
    """
    _require(0 <= density <= 1, "density", "a number in [0, 1]", f"{density}")
    numel, limit = math.prod(shape), keep_limit(density)
    if limit < 0 or numel == 0:
        return torch.zeros(tuple(shape), dtype=torch.bool)
    seeds = seed_words(seed, name, model + 1)[2 * model :]
    out = torch.empty(numel)
    torch.ops.pymerge.sparse_merge_(
        out,
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(numel),
        [torch.ones(numel)],
        [0],
        [KEEP_NONE],
        seeds,
        [limit],
        [1.0],
        [1.0],
        False,
        False,
        1.0,
        1.0,
        0,
        bare=True,
    )
    return out.reshape(tuple(shape)) != 0


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
        None if base is None else _flat(base),
        [_flat(model) for model in models],
        kind,
        columns=columns,
        wide=_wide(*tensors),
        backend=_backend(backend, models[0]),
    )
    return partials


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1)


def _wide(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _dtype(wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _backend(name: str | None, tensor: Tensor) -> str:
    return resolve(name, tensor.device).NAME


def _counters_on(tensor: Tensor, backend: str | None) -> torch.device | str:
    return "cpu" if _backend(backend, tensor) == "reference" else tensor.device


def _require(holds: bool, argument: str, expected: str, got: str) -> None:
    if not holds:
        raise RequestError(f"{argument}: expected {expected}; got {got}")


def _check_count(name: str, values: Sequence[object], models: Sequence[Tensor]) -> None:
    _require(len(values) == len(models), name, f"{len(models)}, one a model", f"{len(values)}")


def _check(base: Tensor, models: Sequence[Tensor]) -> None:
    _require(len(models) > 0, "models", "at least one tensor", "none")
    for label, tensor in [("base", base), *((f"models[{k}]", m) for k, m in enumerate(models))]:
        _require(isinstance(tensor, Tensor), label, "a tensor", type(tensor).__name__)
        _require(tensor.dtype in _FLOATS, label, "a floating-point tensor", f"{tensor.dtype}")
        _require(
            tensor.shape == base.shape,
            label,
            f"shape {tuple(base.shape)} like base",
            f"{tuple(tensor.shape)}",
        )
        same = tensor.device == base.device
        _require(same, label, f"a tensor on {base.device} like base", f"{tensor.device}")


def _check_layers(
    base: Sequence[Tensor], models: Sequence[Sequence[Tensor]], table: Tensor
) -> None:
    for k, model in enumerate(models):
        expected = f"{len(base)} tensors like base"
        _require(len(model) == len(base), f"models[{k}]", expected, f"{len(model)}")
    shape = (len(models), len(base))
    got = f"shape {tuple(table.shape)}"
    _require(tuple(table.shape) == shape, "coefficients", f"shape {shape}", got)
    for layer, origin in enumerate(base):
        _check(origin, [model[layer] for model in models])
