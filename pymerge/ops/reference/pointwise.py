"""The reference of methods that look at each element alone, and what their kinds take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pymerge.ops.arguments import check_kind
from pymerge.ops.reference.value import Element, keys, scalar

__all__ = ["POINTWISE", "Kind", "check_reals", "pointwise"]


@dataclass(frozen=True)
class Kind:
    """A kind of `pointwise_`: a line of csrc/pointwise.def.

    Attributes:
        compute: (inputs, reals) -> the result.
        reals: how many numbers a call passes to it, beside `for_each` of them for every model.
        model: where among them the number of a model is, and the least that it may be.
    """

    compute: Callable[[Element, Sequence[float]], torch.Tensor]
    reals: int
    for_each: int = 0
    model: tuple[int, int] | None = None


def _nearswap(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """w b + (1 - w) a with w = clamp(t / max(|a - b|, 1e-6), 0, 1): mergekit's nearswap."""
    a, b = element.base, element.models[0]
    one, least = scalar(1.0, a), scalar(reals[1], a)
    distance = (a - b).abs()
    distance = torch.where(distance < least, least, distance)
    weight = scalar(reals[0], a) / distance
    weight = torch.where(weight > one, one, weight)
    weight = torch.where(weight < 0, torch.zeros_like(weight), weight)
    return weight * b + (one - weight) * a


def _ram(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """RAM: mean of the task vectors with |delta| > e_k; where one alone has, its own times f_k."""
    zero, one = element.zero, element.one
    total, scaled, count = zero, zero, zero
    models = len(element.deltas)
    for delta, least, factor in zip(element.deltas, reals[:models], reals[models:], strict=True):
        active = delta.abs() > scalar(least, delta)
        total = total + torch.where(active, delta, zero)
        scaled = scaled + torch.where(active, scalar(factor, delta) * delta, zero)
        count = count + torch.where(active, one, zero)
    mean = total / torch.where(count > one, count, one)
    return element.base + torch.where(count == one, scaled, mean)


def _magmax(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """MagMax (Marczak et al. 2024): each element of the task vector where it is largest."""
    best = element.zero
    for delta in element.deltas:
        best = torch.where(keys(delta) > keys(best), delta, best)
    return element.base + scalar(reals[0], best) * best


def _consensus_ta(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """Consensus TA (Wang et al. 2024): task arithmetic where >= need TALL masks are set."""
    total, count = element.total(), element.zero
    scale = scalar(reals[0], total)
    merged = element.base + scale * total
    for x, threshold in zip(element.models, reals[2:], strict=True):
        own = (x - element.base).abs() > scalar(threshold, x) * (merged - x).abs()
        count = count + torch.where(own, element.one, element.zero)
    return element.base + scale * torch.where(count >= reals[1], total, element.zero)


def _tall_masks(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """TALL masks (Wang et al. 2024): what of the merged task vector is one task's."""
    scaled = scalar(reals[0], element.base) * element.total()
    merged, x = element.base + scaled, element.models[int(reals[2])]
    own = (x - element.base).abs() > scalar(reals[1], x) * (merged - x).abs()
    return element.base + torch.where(own, scaled, element.zero)


def _emr(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """EMR-Merging (Huang et al. 2024): the unified vector, or its masked and rescaled part."""
    positive, largest = element.unified()
    unified = torch.where(positive, largest, -largest)
    if reals[0] < 0:
        return element.base + unified
    own = element.deltas[int(reals[0])]
    agrees = torch.where(positive, own, -own) > 0
    masked = torch.where(agrees, unified, element.zero)
    return element.base + scalar(reals[1], masked) * masked


def _sce(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """SCE (Wan et al. 2024), given the weights and the threshold of the variance."""
    everywhere, total = reals[0] != 0, element.total()
    positive, zero, one = total >= 0, element.zero, element.one
    merged, weights = zero, zero
    for delta, weight in zip(element.deltas, reals[2:], strict=True):
        agrees = torch.where(positive, delta, -delta) > 0
        merged = merged + torch.where(agrees, scalar(weight, delta) * delta, zero)
        weights = weights + torch.where(agrees, scalar(weight, delta) * one, zero)
    if everywhere:
        least = scalar(1e-6, zero)
        merged = merged / torch.where(weights < least, least, weights)
        merged = torch.where(element.variance() >= scalar(reals[1], zero), merged, zero)
    else:
        merged = merged / torch.where(weights == 0, one, weights)
    return element.base + torch.where(total.isnan(), total, merged)


def _median(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """The median of the models, or of their task vectors; of an even number the middle two's mean.

    NaN if one is NaN (Yin et al. 2018, coordinate-wise median).
    """
    origin = element.base if reals[1] != 0 else element.zero
    values, models = torch.stack(element.models), len(element.models)
    # Task vectors have the same order; of equal numbers the first model's comes first.
    ordered = values.sort(dim=0, stable=True).values
    lower, upper = ordered[(models - 1) // 2] - origin, ordered[models // 2] - origin
    half = scalar(0.5, lower)
    middle = torch.where(lower == upper, lower, half * lower + half * upper)
    nan = values.isnan().any(dim=0)
    return origin + scalar(reals[0], middle) * torch.where(nan, math.nan, middle)


POINTWISE: dict[str, Kind] = {
    "nearswap": Kind(_nearswap, reals=2),
    "ram": Kind(_ram, reals=0, for_each=2),
    "magmax": Kind(_magmax, reals=1),
    "consensus_ta": Kind(_consensus_ta, reals=2, for_each=1),
    "tall_masks": Kind(_tall_masks, reals=3, model=(2, 0)),
    "emr": Kind(_emr, reals=2, model=(0, -1)),
    "variance": Kind(lambda element, reals: element.variance(), reals=0),
    "sce": Kind(_sce, reals=2, for_each=1),
    "median": Kind(_median, reals=2),
}


def check_reals(method: str, reals: Sequence[float], count: int, backend: str) -> int:
    """Return the number of the model that a call names, or 0 where its kind takes none.

    Raises:
        ValueError: an unknown kind, another count of numbers than it takes, no such model.
    """
    check_kind("pointwise_", method, POINTWISE, backend)
    kind = POINTWISE[method]
    wanted = kind.reals + kind.for_each * count
    if len(reals) != wanted:
        raise ValueError(
            f"backend {backend!r}: {method}: expected {wanted} numbers for {count} models, got "
            f"{len(reals)}"
        )
    if kind.model is None:
        return 0
    at, least = kind.model
    if not least <= reals[at] < count:
        raise ValueError(
            f"backend {backend!r}: {method}: expected a model from {least} to {count - 1}, got "
            f"{reals[at]}"
        )
    return int(reals[at])


def pointwise(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    method: str,
    reals: Sequence[float],
    wide: bool,
) -> None:
    """A method that looks at each element alone."""
    check_reals(method, reals, len(models), "reference")
    stats[2] += int(not all(bool(torch.isfinite(tensor).all()) for tensor in (base, *models)))
    out.copy_(POINTWISE[method].compute(Element(base, models, wide), reals).to(out.dtype))
