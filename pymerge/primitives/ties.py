"""The steps of TIES: thresholds, trimmed task vectors, elected signs, the disjoint merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.engine.select import KEEP_NONE, order_statistics
from pymerge.engine.trim import TrimTarget
from pymerge.ops import contract as contract  # declares torch.ops.pymerge
from pymerge.primitives.arguments import (
    backend_name,
    check,
    check_count,
    counters_on,
    delta_dtype,
    flattened,
    is_wide,
    require,
)

__all__ = ["disjoint_merge", "elect_signs", "magnitude_thresholds", "task_vector", "trim"]

Tensor = torch.Tensor


def task_vector(base: Tensor, model: Tensor, *, backend: str | None = None) -> Tensor:
    """Return `model - base`, computed without float32 copies of either.

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

    A key is `bits(|delta|)`, which has the same order as `|delta|`. A sequence of tensors is one
    vector: the threshold is over all of them together (Yadav et al. 2023, whole-model trim).
    Nothing is sorted and no task vector is stored.

    Args:
        density: share of the elements in [0, 1] that are at or above the threshold, for all models
            or for each; `int(density * n)` elements, and all that equal the last of them.

    Returns: a key for each model, to be passed to `trim`, `elect_signs` and `disjoint_merge`.
    """
    layers = [base] if isinstance(base, Tensor) else list(base)
    stacks = [[m] if isinstance(m, Tensor) else list(m) for m in models]
    for k, stack in enumerate(stacks):
        require(
            len(stack) == len(layers),
            f"models[{k}]",
            f"{len(layers)} tensors like base",
            f"{len(stack)}",
        )
    shares = [density] * len(stacks) if isinstance(density, (int, float)) else list(density)
    require(len(shares) == len(stacks), "density", f"{len(stacks)} numbers", f"{len(shares)}")
    for share in shares:
        require(0 <= share <= 1, "density", "numbers in [0, 1]", f"{share}")
    columns = [[stack[i] for stack in stacks] for i in range(len(layers))]
    for own, others in zip(layers, columns, strict=True):
        check(own, others)
    total = sum(layer.numel() for layer in layers)
    wide = is_wide(*layers, *(tensor for stack in stacks for tensor in stack))
    targets = []
    for share in shares:
        kept = int(share * total)
        keep = TrimTarget("rank", total - kept + 1) if kept else TrimTarget("none")
        targets.append(keep)
    parts = [
        (i, flattened(a), [flattened(m) for m in ms])
        for i, (a, ms) in enumerate(zip(layers, columns, strict=True))
    ]
    name = backend_name(backend, layers[0])
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
            (Breadcrumbs), or all except the largest ones.

    Returns: float32 (float64 if an input is), one for each model.
    """
    check(base, models)
    check_count("thresholds", thresholds, models)
    tops = [KEEP_NONE] * len(models) if last is None else list(last)
    check_count("last", tops, models)
    wide = is_wide(base, *models)
    result = []
    for model, low, high in zip(models, thresholds, tops, strict=True):
        out = torch.empty_like(base, dtype=delta_dtype(wide), memory_format=torch.contiguous_format)
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
        torch.zeros(3, dtype=torch.int64, device=counters_on(base, backend)),
        flattened(base),
        [flattened(model) for model in models],
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
        backend=backend_name(backend, base),
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
    check(base, models)
    lo = [0] * len(models) if thresholds is None else list(thresholds)
    own = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    check_count("thresholds", lo, models)
    check_count("weights", own, models)
    wide = is_wide(base, *models)
    out = torch.empty_like(base, dtype=delta_dtype(wide), memory_format=torch.contiguous_format)
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
    """Return `base + scale * merge of the values that agree with the elected sign`, as in TIES.

    Args:
        merge: "mean", "sum" or "max".
        zero_sign: what a sum of 0 elects: 1, -1, or 0 for nothing.

    Returns: the dtype and shape of `base`.
    """
    check(base, models)
    lo = [0] * len(models) if thresholds is None else list(thresholds)
    check_count("thresholds", lo, models)
    rules = {"mean": "mean_of_count", "sum": "sum", "max": "max"}
    require(merge in rules, "merge", f"one of {', '.join(rules)}", repr(merge))
    require(zero_sign in (-1, 0, 1), "zero_sign", "-1, 0 or 1", repr(zero_sign))
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    torch.ops.pymerge.ties_(
        out.view(-1),
        torch.zeros(3, dtype=torch.int64, device=counters_on(base, backend)),
        flattened(base),
        [flattened(model) for model in models],
        lo,
        [],
        "none",
        rules[merge],
        "mass",
        zero_sign,
        scale,
        False,
        wide=is_wide(base, *models),
        backend=backend_name(backend, base),
    )
    return out
