"""The combinations of adapters in PEFT 0.21.2 (`add_weighted_adapter`), as `peft_` and their name.

Most of them combine A and B separately: the product of the sums has cross terms, and is not the sum
of the products. They are here for comparison, and correct where PEFT is not: the result's scaling
is 1 with rsLoRA too (PEFT makes it sqrt(r)), and a density of 0 keeps nothing (PEFT divides by it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pymerge.adapters.arithmetic import union
from pymerge.adapters.decompose import LowRank, factor_matrix
from pymerge.checkpoint.peft.adapter import Adapter
from pymerge.checkpoint.peft.build import Factors
from pymerge.errors import RequestError
from pymerge.methods.spec import Parameter

__all__ = ["ON_DELTAS", "ON_FACTORS", "PARAMETERS", "check_parameters", "on_deltas", "on_factors"]

_DENSITY = Parameter(
    "density",
    "float",
    None,
    "Share of the elements of each factor or delta that is kept.",
    minimum=0.0,
    maximum=1.0,
    per_tensor=False,
)
_MAJORITY = Parameter(
    "majority_sign_method",
    "str",
    "total",
    "Elect by the sum, or by the number of signs.",
    choices=("total", "frequency"),
    per_tensor=False,
)
_SEED = Parameter("seed", "int", 0, "Of what DARE drops.", minimum=0, per_tensor=False)


@dataclass(frozen=True)
class Combination:
    """One of PEFT's ways to combine factors or deltas.

    drops: elements are dropped at random, as in DARE. trims: each is trimmed separately. elects:
    signs are elected, as in TIES, which trims first unless elements were dropped.
    """

    drops: bool = False
    trims: bool = False
    elects: bool = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters that it takes."""
        found: list[Parameter] = [_DENSITY] if self.drops or self.trims or self.elects else []
        found += [_MAJORITY] if self.elects else []
        return (*found, *([_SEED] if self.drops else []))


ON_FACTORS = {
    "peft_linear": Combination(),
    "peft_ties": Combination(elects=True),
    "peft_dare_linear": Combination(drops=True),
    "peft_dare_ties": Combination(drops=True, elects=True),
    "peft_magnitude_prune": Combination(trims=True),
}
# Those that PEFT has for deltas, too: the factors come from a singular value decomposition.
ON_DELTAS = {
    f"{name}_svd": combination
    for name, combination in ON_FACTORS.items()
    if combination != Combination()
}
PARAMETERS = {name: one.parameters for name, one in (ON_FACTORS | ON_DELTAS).items()}


def check_parameters(method: str, given: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of one of PEFT's methods, with defaults; or raise RequestError."""
    known = {parameter.name: parameter for parameter in PARAMETERS.get(method, ())}
    problems = [
        f"{where}: unknown parameter {name!r} of method {method} (known: {', '.join(known)})"
        for name in given
        if name not in known
    ]
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        value = given.get(name)
        if value is None and name == "density":
            problems.append(f"{where}: density is required: {parameter.expected}")
            continue
        try:
            shown = f"{where}: {name}"
            values[name] = parameter.default if value is None else parameter.check(value, shown)
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    return values


def on_factors(
    method: str, adapters: Sequence[Adapter], weights: Sequence[float], parameters: dict[str, Any]
) -> dict[str, Factors]:
    """Return (B, A) of each module by a method of `ON_FACTORS`.

    w s, weight times scaling, is split between the factors: A is multiplied by sqrt(|w s|) with the
    sign, B without it. For a module, adapters that lack it are left out. All ranks must be equal.
    """
    factors: dict[str, Factors] = {}
    problems: list[str] = []
    for name in union(adapters, "merge_adapters"):
        owners = [
            (adapter, weight * adapter.modules[name].scaling)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        ranks = [adapter.modules[name].rank for adapter, _ in owners]
        if len(set(ranks)) > 1:
            shown = ", ".join(f"{a.label} {r}" for (a, _), r in zip(owners, ranks, strict=True))
            problems.append(
                f"merge_adapters: {method} combines factors, and needs one rank of module "
                f"'{name}', got {shown}; cat and svd take any"
            )
            continue
        pairs = [adapter.factors(name) for adapter, _ in owners]
        roots = [math.sqrt(abs(weight)) for _, weight in owners]
        signed = [math.copysign(root, w) for root, (_, w) in zip(roots, owners, strict=True)]
        combine = _combiner(ON_FACTORS[method], parameters)
        a = combine([pair[1] for pair in pairs], signed, f"{name}.lora_A.weight")
        b = combine([pair[0] for pair in pairs], roots, f"{name}.lora_B.weight")
        factors[name] = b.numpy(), a.numpy()
    if problems:
        raise RequestError(problems)
    return factors


def on_deltas(
    method: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    parameters: dict[str, Any],
    rank: int | None,
    energy: float | None,
) -> dict[str, LowRank]:
    """Return the factors of each module by a method of `ON_DELTAS`: combines deltas, then an
    SVD."""
    combine = _combiner(ON_DELTAS[method], parameters)
    found: dict[str, LowRank] = {}
    for name, module in union(adapters, "merge_adapters").items():
        owners = [
            (adapter.delta(name).reshape(module.matrix), weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        merged = combine([one[0] for one in owners], [one[1] for one in owners], module.weight)
        found[name] = factor_matrix(merged.T if module.transposed else merged, rank, energy)
    return found


Combine = Callable[[Sequence[np.ndarray], Sequence[float], str], torch.Tensor]


def _combiner(method: Combination, parameters: dict[str, Any]) -> Combine:
    from pymerge import dare_linear, task_arithmetic, ties_merge

    density: Any = parameters.get("density")
    elect = "count" if parameters.get("majority_sign_method") == "frequency" else "mass"

    def combine(values: Sequence[np.ndarray], weights: Sequence[float], name: str) -> torch.Tensor:
        tensors = [torch.from_numpy(one) for one in values]
        zero = torch.zeros_like(tensors[0])
        if method.drops:
            # A mask depends on the name, so each adapter has a different one.
            tensors = [
                dare_linear(
                    {f"{name}.{k}": zero},
                    [{f"{name}.{k}": one}],
                    density=density,
                    seed=parameters["seed"],
                )[f"{name}.{k}"]
                for k, one in enumerate(tensors)
            ]
        elif method.trims:
            tensors = [
                ties_merge(zero, [one], density=density, semantics="peft") for one in tensors
            ]
        if not method.elects:
            return task_arithmetic(zero, tensors, weights=list(weights))
        kept = 1.0 if method.drops else density
        return ties_merge(
            zero, tensors, density=kept, weights=list(weights), semantics="peft", elect=elect
        )

    return combine
