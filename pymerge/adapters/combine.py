"""Merges adapters exactly, by PEFT's combinations, or by any merge method on the deltas."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pymerge.adapters.arithmetic import (
    Whole,
    add,
    check_weights,
    concatenated,
    same_kind,
    saved_of,
    shared_targets,
    union,
)
from pymerge.adapters.decompose import LowRank, factor_matrix, factor_product
from pymerge.adapters.deltas import merge_deltas
from pymerge.adapters.dialects import (
    ON_DELTAS,
    ON_FACTORS,
    check_parameters,
    on_deltas,
    on_factors,
)
from pymerge.checkpoint.peft.adapter import Adapter, Module
from pymerge.checkpoint.peft.build import Factors, ia3, lora
from pymerge.checkpoint.peft.files import load
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Work
from pymerge.errors import RequestError, nearest
from pymerge.merging.tensors import MemorySink, MemorySource
from pymerge.methods import METHODS, MethodSpec

__all__ = ["ADAPTER_METHODS", "check_rank", "merge_adapters", "method_of"]

_WHERE = "merge_adapters"
_EXACT = ("cat", "svd")
_ALIASES = {"peft_cat": "cat", "peft_svd": "svd"}
ADAPTER_METHODS = (*_EXACT, *_ALIASES, *ON_FACTORS, *ON_DELTAS)

Resolve = Callable[[str], Mapping[str, Any]]


def merge_adapters(
    adapters: Sequence[Adapter | str | os.PathLike[str]],
    method: str = "svd",
    *,
    weights: float | Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    saved: Whole = "error",
    **parameters: Any,
) -> Adapter:
    """Merge adapters into one adapter.

    delta = merge(delta_1, ..., delta_K), with delta_k = scaling_k (B_k A_k), the sum of products
    weighted by `weights`; rsLoRA, rank_pattern and alpha_pattern are in the scaling of each module.
    A module that an adapter lacks counts as 0 there.

    Args:
        adapters: adapters or their directories, all LoRA or all IA3.
        method: "cat": sum_k w_k delta_k exactly; the factors are concatenated, so the rank is the
            sum of the ranks. "svd": the same sum, truncated to `rank`; exact if that is at least
            the sum of the ranks. It uses QR of the factors and never forms a delta. Any method of
            `pymerge.methods()` that needs no statistics, e.g. "ties", "pcb", "dare_linear": on the
            deltas as task vectors, one matrix at a time, then truncated to `rank`. PEFT's
            combinations are called "peft_linear", "peft_ties", "peft_dare_linear",
            "peft_dare_ties", "peft_magnitude_prune" (on A and B separately), "peft_cat",
            "peft_svd", and "peft_ties_svd" and so on.
        weights: one for each adapter, or one for all; default 1.
        rank: of the result, at least 1. Default: "svd" and "peft_*": the largest rank of the
            adapters, as in PEFT; other methods: the sum of the ranks. Not for "cat", nor for
            methods on factors.
        energy: instead of a rank, in (0, 1]: each module gets the least rank that keeps this share
            of the delta's squared norm.
        saved: whole tensors (modules_to_save) that several adapters have: "error" or "drop". Those
            of only one adapter are copied.
        parameters: the method's, e.g. `density`, `scale`, `seed`, `semantics`.

    Returns:
        An adapter with a scaling of 1; `captured` is the share of each delta that it holds. IA3
        adapters give an IA3 adapter; there the methods work on l - 1, and "peft_linear" is sum_k
        w_k l_k.

    Raises:
        RequestError: wrong names or values; adapters of different kinds, bases or, for methods on
            factors, ranks; NaN in an adapter.

    >>> from pymerge.checkpoint.peft.build import lora
    >>> one = lora({"fc": (np.ones((2, 1)), np.array([[1.0, 2.0, 3.0]]))})
    >>> two = lora({"fc": (np.ones((2, 1)), np.array([[-1.0, 2.0, 1.0]]))})
    >>> merge_adapters([one, two], "ties", density=1.0, rank=1).delta("fc")[0].round(3)
    array([1., 2., 2.], dtype=float32)
    """
    name = _ALIASES.get(method, method)
    check_rank(rank, energy, name, _WHERE)
    opened = [one if isinstance(one, Adapter) else load(one) for one in _listed(adapters)]
    try:
        if name not in ADAPTER_METHODS:
            from pymerge.merging.api import resolve_parameters

            spec = method_of(name, f"{_WHERE}: method")
            resolved = resolve_parameters(spec, _WHERE, len(opened), weights, parameters)
            return merge_by(spec, opened, lambda _: resolved, rank, energy, saved)
        given = _weights(weights, len(opened))
        return _by_name(name, opened, given, rank, energy, saved, parameters)
    finally:
        for one, adapter in zip(adapters, opened, strict=True):
            if one is not adapter:
                adapter.close()


def _listed(adapters: Any) -> Sequence[Any]:
    if isinstance(adapters, (str, os.PathLike, Adapter)) or not isinstance(adapters, Sequence):
        raise RequestError(
            f"{_WHERE}: adapters: expected a list of adapters or paths, got "
            f"{type(adapters).__name__}"
        )
    return adapters


def _weights(weights: float | Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    given = list(weights) if isinstance(weights, Sequence) else [weights] * count
    check_weights(given, count, _WHERE)
    return [float(weight) for weight in given]


def method_of(name: str, where: str) -> MethodSpec:
    """Return the record of a merge method that can run on deltas, or raise RequestError."""
    spec = METHODS.get(name)
    if spec is None:
        known = [*ADAPTER_METHODS, *METHODS]
        raise RequestError(
            f"{where}: unknown method {name!r}{nearest(name, known)} (known: "
            f"{', '.join(ADAPTER_METHODS)}, and the methods of `pymerge methods`)"
        )
    if spec.statistics is not None or spec.for_tensor is not None:
        raise RequestError(f"{where}: {name} does not work on the deltas of adapters")
    return spec


def check_rank(rank: int | None, energy: float | None, method: str, where: str) -> None:
    """Raise RequestError for a rank or an energy that is invalid, or that the method does not
    take."""
    problems: list[str] = []
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        problems.append(f"{where}: rank: expected an integer >= 1, got {rank!r}")
    number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
    if energy is not None and not (number and 0 < energy <= 1):
        problems.append(f"{where}: energy: expected a number in (0, 1], got {energy!r}")
    if rank is not None and energy is not None:
        problems.append(f"{where}: expected a rank or an energy, got both")
    if (rank is not None or energy is not None) and method in ("cat", *ON_FACTORS):
        problems.append(
            f"{where}: {method} takes no rank and no energy: its rank follows from the adapters"
        )
    if problems:
        raise RequestError(problems)


def _by_name(
    method: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int | None,
    energy: float | None,
    saved: Whole,
    given: dict[str, Any],
) -> Adapter:
    """Merge with a method of `ADAPTER_METHODS`."""
    kind = same_kind(adapters, _WHERE)
    values = check_parameters(method, given, _WHERE)
    if kind == "IA3":
        return _weighted_ia3(method, adapters, weights)
    whole = saved_of(adapters, saved, _WHERE)
    low: dict[str, LowRank] = {}
    factors: Mapping[str, Factors] = {}
    most = max(adapter.rank for adapter in adapters)
    wanted = most if rank is None and energy is None else rank
    if method == "svd":
        low = {
            name: factor_product(b, a, wanted, energy)
            for name, (b, a) in concatenated(adapters, weights).items()
        }
    elif method in ON_DELTAS:
        low = on_deltas(method, adapters, weights, values, wanted, energy)
    elif method in ON_FACTORS:
        factors = on_factors(method, adapters, weights, values)
    else:
        factors = concatenated(adapters, weights)
    return _result(adapters, factors, low, whole)


def merge_by(
    spec: MethodSpec,
    adapters: Sequence[Adapter],
    resolve: Resolve,
    rank: int | None,
    energy: float | None,
    saved: Whole,
    **options: Any,
) -> Adapter:
    """Merge with a record of `METHODS`; `resolve` returns the parameters of a tensor."""
    count, kind = len(adapters), same_kind(adapters, _WHERE)
    too_many = spec.max_models is not None and count > spec.max_models
    if count < spec.min_models or too_many:
        most = "" if spec.max_models is None else f" and at most {spec.max_models}"
        raise RequestError(
            f"{_WHERE}: {spec.name} needs at least {spec.min_models}{most} adapters, got {count}"
        )
    if kind == "IA3":
        return _merged_ia3(spec, adapters, resolve)
    whole = saved_of(adapters, saved, _WHERE)
    total = sum(adapter.rank for adapter in adapters)
    wanted = total if rank is None and energy is None else rank

    def finish(_module: Module, matrix: torch.Tensor) -> LowRank:
        return factor_matrix(matrix, wanted, energy)

    low = merge_deltas(spec, adapters, resolve, finish, **options)
    return _result(adapters, {}, low, whole)


def _result(
    adapters: Sequence[Adapter],
    factors: Mapping[str, Factors],
    low: Mapping[str, LowRank],
    whole: Any,
) -> Adapter:
    pairs = dict(factors) | {name: (one.b, one.a) for name, one in low.items()}
    return lora(
        pairs,
        patterns=union(adapters, _WHERE),
        config=adapters[0].config,
        saved=whole,
        target_modules=shared_targets(adapters),
        captured={name: one.energy for name, one in low.items()},
        label="merged adapter",
    )


def _weighted_ia3(method: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    if method != "peft_linear":
        raise RequestError(
            f"{_WHERE}: {method} is for LoRA, got IA3 adapters; they take peft_linear and the "
            "methods of `pymerge methods`"
        )
    # sum w l = 1 + sum w (l - 1) - (1 - sum w)
    rest = 1.0 - float(np.sum(np.asarray(weights, np.float64)))
    summed = add(adapters, weights)
    vectors = {name: summed.vector(name).astype(np.float64) - rest for name in summed.modules}
    return ia3(vectors, summed, "merged adapter")


def _merged_ia3(spec: MethodSpec, adapters: Sequence[Adapter], resolve: Resolve) -> Adapter:
    """Merge vectors with a method whose base is vectors of ones; missing modules count as ones."""
    modules = {module.weight: module for module in union(adapters, _WHERE).values()}
    ones = {name: torch.ones(module.shape) for name, module in modules.items()}
    models = [
        {
            name: torch.from_numpy(adapter.vector(module.name))
            if module.name in adapter.modules
            else ones[name]
            for name, module in modules.items()
        }
        for adapter in adapters
    ]
    works = [
        Work(name, vector.numel(), False, False, resolve(name), tuple(vector.shape))
        for name, vector in ones.items()
    ]
    results = {name: torch.empty_like(vector) for name, vector in ones.items()}
    source = MemorySource(
        [*(["ones"] if spec.with_base(True) else []), *(one.label for one in adapters)],
        ones if spec.with_base(True) else None,
        models,
        {name: f"the vector of tensor {name!r}" for name in modules},
    )
    execute(spec, works, source, MemorySink(results), Context())
    merged = {module.name: results[name].numpy() for name, module in modules.items()}
    return ia3(merged, add(adapters, saved="drop"), "merged adapter")
