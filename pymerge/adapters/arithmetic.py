"""Arithmetic on the effects of adapters on weights, as in PEM composition (Zhang et al. 2023).

By default results are exact: the delta of the result is the sum of the deltas. PEM's own code works
on each LoRA factor separately; that is `semantics="pem"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pymerge.checkpoint.peft.adapter import Adapter, Module
from pymerge.checkpoint.peft.build import Factors, ia3, lora
from pymerge.errors import RequestError
from pymerge.ops.array import Array

__all__ = [
    "Whole",
    "add",
    "analogy",
    "check_weights",
    "concatenated",
    "negate",
    "same_kind",
    "saved_of",
    "scale",
    "shared_targets",
    "union",
]

Semantics = Literal["exact", "pem"]
Whole = Literal["error", "drop"]


def add(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    semantics: Semantics = "exact",
    saved: Whole = "error",
) -> Adapter:
    """Add adapters: delta = sum_k w_k delta_k (PEM's addition, Zhang et al. 2023, equation 2).

    Args:
        adapters: one or more, all LoRA or all IA3.
        weights: one for each; default 1 / K each, as in PEM.
        semantics: "exact": LoRA factors are concatenated, so the rank is the sum of the ranks; IA3
            vectors are 1 + sum_k w_k (l_k - 1). "pem": weights are divided by their sum; A and B
            are averaged separately, which mixes them, and all adapters need the same modules, ranks
            and scalings; IA3 vectors are averaged.
        saved: what to do with whole tensors (modules_to_save) that several adapters have: "error",
            or "drop". Those of only one adapter are copied.

    Returns:
        An adapter with a scaling of 1.

    Raises:
        RequestError: adapters of different kinds or shapes; wrong weights.

    >>> from pymerge.checkpoint.peft.build import lora
    >>> one = lora({"fc": (np.ones((2, 1)), np.ones((1, 2)))})
    >>> add([one, one], [1.0, 2.0]).delta("fc")[0]
    array([3., 3.], dtype=float32)
    """
    where = "add"
    kind = same_kind(adapters, where)
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    check_weights(weights, len(adapters), where)
    _check_semantics(semantics, where)
    if semantics == "pem":
        total = math.fsum(weights)
        if total == 0:
            raise RequestError(f"{where}: weights sum to 0, and PEM divides by their sum")
        weights = [weight / total for weight in weights]
    if kind == "IA3":
        return _combined_ia3(adapters, weights, where)
    kept = saved_of(adapters, saved, where)
    if semantics == "pem":
        return _mixed(adapters, weights, weights, where, kept)
    return _lora(adapters, concatenated(adapters, weights), kept)


def negate(adapter: Adapter, factor: float = 1.0) -> Adapter:
    """Negate an adapter: delta = -factor * its delta (PEM's negation, equation 3).

    For LoRA, B changes its sign; IA3 vectors become 2 - l, or with a factor s (1 + s) - s l. These
    are PEM's rules, and exact.

    Args:
        adapter: without whole tensors (modules_to_save), which cannot be negated.
        factor: finite factor of the negated delta.

    >>> from pymerge.checkpoint.peft.build import lora
    >>> negate(lora({"fc": (np.ones((2, 1)), np.ones((1, 2)))})).delta("fc")[0]
    array([-1., -1.], dtype=float32)
    """
    return _scaled(adapter, -_finite(factor, "negate: factor"), "negate")


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Scale an adapter: delta = factor * its delta.

    For LoRA, B is scaled; IA3 vectors become 1 + factor * (l - 1).

    Args:
        adapter: without whole tensors (modules_to_save).
        factor: finite.

    >>> from pymerge.checkpoint.peft.build import lora
    >>> scale(lora({"fc": (np.ones((2, 1)), np.ones((1, 2)))}), 0.5).delta("fc")[0]
    array([0.5, 0.5], dtype=float32)
    """
    return _scaled(adapter, _finite(factor, "scale: factor"), "scale")


def analogy(
    task: Adapter,
    target: Adapter,
    source: Adapter,
    weights: tuple[float, float] = (0.5, 0.5),
    *,
    semantics: Semantics = "exact",
) -> Adapter:
    """Transfer a task to another domain: "task is to source as the result is to target".

    delta = c0 delta_task + c1 (delta_target - delta_source): PEM's domain transfer, where `task`
    is a classifier of the source domain, and the others are language models of both domains.

    Args:
        task, target, source: all LoRA or all IA3.
        weights: (c0, c1).
        semantics: "exact", or "pem": A = c0 A_task + c1 A_target + c1 A_source (with a plus, as in
            the authors' code) and B = c0 B_task + c1 B_target - c1 B_source, whose product is not
            the linear analogy; ranks and scalings must be equal.

    >>> from pymerge.checkpoint.peft.build import lora
    >>> one, two = (lora({"fc": (np.full((1, 1), x), np.ones((1, 1)))}) for x in (1.0, 5.0))
    >>> analogy(one, two, one, (1, 1)).delta("fc")
    array([[5.]], dtype=float32)
    """
    where = "analogy"
    adapters = [task, target, source]
    kind = same_kind(adapters, where)
    check_weights(weights, 2, where)
    _check_semantics(semantics, where)
    for adapter in adapters:
        _without_saved(adapter, where)
    first, second = weights
    signed = [first, second, -second]
    if kind == "IA3":
        return _combined_ia3(adapters, signed, where)
    if semantics == "pem":
        return _mixed(adapters, [first, second, second], signed, where, {})
    return _lora(adapters, concatenated(adapters, signed), {})


def same_kind(adapters: Sequence[Adapter], where: str) -> str:
    """Return the common type of adapters that must fit each other; raise if they do not."""
    if isinstance(adapters, (Adapter, str)) or not isinstance(adapters, Sequence):
        raise RequestError(
            f"{where}: adapters: expected a list of adapters, got {type(adapters).__name__}"
        )
    if not adapters:
        raise RequestError(f"{where}: adapters: expected at least one, got none")
    for number, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise RequestError(
                f"{where}: adapters[{number}]: expected an Adapter (pymerge.adapters.load), got "
                f"{type(adapter).__name__}"
            )
    kinds = {adapter.peft_type for adapter in adapters}
    if len(kinds) > 1:
        shown = ", ".join(f"{adapter.label} {adapter.peft_type}" for adapter in adapters)
        raise RequestError(f"{where}: expected adapters of one type, got {shown}")
    union(adapters, where)
    return adapters[0].peft_type


def union(adapters: Sequence[Adapter], where: str) -> dict[str, Module]:
    """Return the modules of all adapters, each from the first that has it; raise if they differ."""
    found: dict[str, tuple[Module, Adapter]] = {}
    problems: list[str] = []
    for adapter in adapters:
        for name, module in adapter.modules.items():
            first, owner = found.setdefault(name, (module, adapter))
            alike = (first.kind, first.shape, first.transposed, first.feedforward)
            if (module.kind, module.shape, module.transposed, module.feedforward) != alike:
                problems.append(
                    f"{where}: {adapter.label}: module '{name}' is {module.kind} of shape "
                    f"{module.shape}, expected {first.kind} of shape {first.shape} like "
                    f"{owner.label}; the adapters are of different bases"
                )
    if problems:
        raise RequestError(problems)
    return {name: found[name][0] for name in sorted(found)}


def check_weights(weights: Sequence[float], count: int, where: str) -> None:
    if len(weights) != count:
        raise RequestError(f"{where}: weights: expected {count}, got {len(weights)}")
    for number, weight in enumerate(weights):
        _finite(weight, f"{where}: weights[{number}]")


def _finite(value: float, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise RequestError(f"{where}: expected a finite number, got {value!r}")
    return float(value)


def _check_semantics(semantics: str, where: str) -> None:
    if semantics not in ("exact", "pem"):
        raise RequestError(f"{where}: semantics: expected 'exact' or 'pem', got {semantics!r}")


def concatenated(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """Return factors whose product is sum_k w_k delta_k: A scaled and stacked, B concatenated."""
    factors: dict[str, Factors] = {}
    for name in union(adapters, "adapters"):
        left, right = [], []
        for adapter, weight in zip(adapters, weights, strict=True):
            module = adapter.modules.get(name)
            if module is not None:
                b, a = adapter.factors(name)
                left.append(b)
                right.append((a.astype(np.float64) * (weight * module.scaling)).astype(np.float32))
        factors[name] = np.concatenate(left, 1), np.concatenate(right, 0)
    return factors


def saved_of(
    adapters: Sequence[Adapter], saved: Whole, where: str
) -> dict[str, tuple[Array, tuple[int, ...]]]:
    """Return the whole tensors that only one adapter has; shared ones are treated as `saved`
    says."""
    if saved not in ("error", "drop"):
        raise RequestError(f"{where}: saved: expected 'error' or 'drop', got {saved!r}")
    owners: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for name in adapter.saved:
            owners.setdefault(name, []).append(adapter)
    several = [name for name, own in owners.items() if len(own) > 1]
    if several and saved == "error":
        labels = ", ".join(adapter.label for adapter in owners[several[0]])
        more = f" and {len(several) - 1} more" if len(several) > 1 else ""
        raise RequestError(
            f"{where}: several adapters have '{several[0]}'{more} in whole (modules_to_save), "
            f"which has no delta to merge: {labels}; saved='drop' leaves such tensors out, or "
            "merge models with their adapters (MODEL+ADAPTER)"
        )
    return {
        name: (own[0].array(own[0].saved[name].key), own[0].saved[name].shape)
        for name, own in owners.items()
        if len(own) == 1
    }


def shared_targets(adapters: Sequence[Adapter]) -> list[str] | str | None:
    """Return target_modules that all configs have, if all adapters have the same modules."""
    first = adapters[0]
    targets = first.config.get("target_modules")
    same = all(
        adapter.modules.keys() == first.modules.keys()
        and adapter.config.get("target_modules") == targets
        for adapter in adapters
    )
    return targets if same else None


def _lora(
    adapters: Sequence[Adapter],
    factors: Mapping[str, Factors],
    saved: dict[str, tuple[Array, tuple[int, ...]]],
) -> Adapter:
    return lora(
        factors,
        patterns=union(adapters, "adapters"),
        config=adapters[0].config,
        saved=saved,
        target_modules=shared_targets(adapters),
    )


def _mixed(
    adapters: Sequence[Adapter],
    of_a: Sequence[float],
    of_b: Sequence[float],
    where: str,
    saved: dict[str, tuple[Array, tuple[int, ...]]],
) -> Adapter:
    """Return PEM's mixture: A and B are summed separately."""
    first = adapters[0]
    factors: dict[str, Factors] = {}
    problems: list[str] = []
    for name in union(adapters, where):
        found = [adapter.modules.get(name) for adapter in adapters]
        kinds = {None if m is None else (m.rank, m.scaling) for m in found}
        if len(kinds) > 1 or None in kinds:
            shown = ", ".join(
                f"{adapter.label} "
                + ("none" if m is None else f"rank {m.rank} scaling {m.scaling:g}")
                for adapter, m in zip(adapters, found, strict=True)
            )
            problems.append(
                f"{where}: module '{name}': semantics 'pem' adds factors up and needs the same "
                f"rank and scaling in all adapters, got {shown}"
            )
            continue
        pairs = [adapter.factors(name) for adapter in adapters]
        b = sum(w * pair[0].astype(np.float64) for w, pair in zip(of_b, pairs, strict=True))
        a = sum(w * pair[1].astype(np.float64) for w, pair in zip(of_a, pairs, strict=True))
        factors[name] = np.asarray(b) * first.modules[name].scaling, np.asarray(a)
    if problems:
        raise RequestError(problems)
    return _lora(adapters, factors, saved)


def _combined_ia3(adapters: Sequence[Adapter], weights: Sequence[float], where: str) -> Adapter:
    """Return l = 1 + sum_k w_k (l_k - 1); a module that an adapter lacks has l = 1 there."""
    for adapter in adapters:
        _without_saved(adapter, where)
    modules = union(adapters, where)
    vectors: dict[str, np.ndarray] = {}
    for name in modules:
        total: np.ndarray | float = 1.0
        for adapter, weight in zip(adapters, weights, strict=True):
            if name in adapter.modules:
                total = total + weight * (adapter.vector(name).astype(np.float64) - 1.0)
        vectors[name] = np.asarray(total)
    return ia3(vectors, _with_modules(adapters, modules))


def _with_modules(adapters: Sequence[Adapter], modules: Mapping[str, Module]) -> Adapter:
    """Return an adapter whose config lists all of these modules."""
    first = adapters[0]
    if shared_targets(adapters) is not None:
        return first
    config = {
        **first.config,
        "target_modules": sorted(modules),
        "feedforward_modules": sorted(n for n, module in modules.items() if module.feedforward),
    }
    return Adapter("IA3", config, modules, first.array, label=first.label)


def _scaled(adapter: Adapter, factor: float, where: str) -> Adapter:
    same_kind([adapter], where)
    _without_saved(adapter, where)
    if adapter.peft_type == "IA3":
        return _combined_ia3([adapter], [factor], where)
    factors: dict[str, Factors] = {}
    for name, module in adapter.modules.items():
        b, a = adapter.factors(name)
        factors[name] = b.astype(np.float64) * (factor * module.scaling), a
    return _lora([adapter], factors, {})


def _without_saved(adapter: Adapter, where: str) -> None:
    if adapter.saved:
        name = next(iter(adapter.saved))
        raise RequestError(
            f"{where}: {adapter.label} has '{name}' in whole (modules_to_save), whose delta is "
            "unknown without the base; arithmetic is on adapters without such tensors"
        )
