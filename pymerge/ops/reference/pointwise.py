"""The reference of sparse merges, pointwise methods and rows: see `merges`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pymerge.ops.arguments import Kept, SparseMerge

__all__ = ["Element", "keys", "pointwise", "row_ranks", "row_weighted_sum", "sparse_merge"]

_LARGEST = 0x7FFFFFFF
_WORD = 0xFFFFFFFF


def widened(tensor: torch.Tensor, wide: bool) -> torch.Tensor:
    return tensor.to(torch.float64 if wide else torch.float32)


def scalar(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def keys(delta: torch.Tensor) -> torch.Tensor:
    """Return bits(|delta|) as int64."""
    if delta.dtype == torch.float64:
        return delta.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return (delta.view(torch.int32) & _LARGEST).to(torch.int64)


def mask_hash(index: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """Return the hash of flat indices (int64, their low halves) as int64 in [0, 2^32)."""
    # Products of two 32-bit numbers overflow int64, but their low halves are right.
    x = index & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return ((x ^ (x >> 16)) * (second | 1) + first) & _WORD


def kept_values(delta: torch.Tensor, k: int, kept: Kept) -> torch.Tensor:
    """Return what is kept of task vector k, zeros elsewhere."""
    zero = torch.zeros_like(delta)
    drawn = torch.zeros_like(delta, dtype=torch.int64)
    if kept.seeds:
        index = torch.arange(kept.start, kept.start + delta.numel(), device=delta.device)
        drawn = mask_hash(index, kept.seeds[2 * k], kept.seeds[2 * k + 1])
    if kept.ranks is None:
        key = keys(delta)
        mask = (key >= kept.lo[k]) & (key <= kept.last[k])
        if kept.seeds:
            mask &= drawn <= kept.limits[k]
        return torch.where(mask, delta, zero)
    rank = torch.as_tensor(kept.ranks)[k, : delta.numel()]
    if not kept.chances:
        return torch.where((rank >= kept.lo[k]) & (rank <= kept.last[k]), delta, zero)
    first, step = (scalar(value, delta) for value in kept.chances[2 * k : 2 * k + 2])
    chance = first + rank.to(delta.dtype) * step
    mask = (drawn >> 8).to(delta.dtype) * scalar(2.0**-24, delta) < chance
    return torch.where(mask, delta / chance if kept.per_element else delta, zero)


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    """base + scale * merge_k w_k (f_k kept_k(delta_k)): DARE (Yu et al. 2024), Breadcrumbs
    (Davari & Belilovsky 2024), DELLA (Deep et al. 2024); with `elect`, TIES' election of signs,
    where zeros elect +."""
    origin = widened(base, wide)
    zero, one = torch.zeros_like(origin), torch.ones_like(origin)
    vote, values, infinite = zero, [], False
    for k, model in enumerate(models):
        delta = widened(model, wide) - origin
        infinite = infinite or not bool(torch.isfinite(delta).all())
        value = scalar(how.factors[k], delta) * kept_values(delta, k, kept)
        value = scalar(how.weights[k], delta) * value
        values.append(value)
        vote = vote + value
    stats[2] += int(infinite)
    merged, negative = vote, torch.signbit(vote)
    if how.elect:
        merged, total = zero, zero
        for value, weight in zip(values, how.weights, strict=True):
            aligned = torch.where(negative, -value, value)
            agrees = ~(aligned <= 0)
            merged = merged + torch.where(agrees, aligned, zero)
            total = total + torch.where(agrees, scalar(weight, one) * one, zero)
        if how.divide:
            merged = merged / torch.where(total == 0, one, total)
    if how.divisor != 1.0:
        merged = merged / scalar(how.divisor, merged)
    if how.elect:
        merged = torch.where(vote.isnan(), vote, torch.where(negative, -merged, merged))
    added = scalar(how.scale, merged) * merged
    out.copy_((added if how.bare else origin + added).to(out.dtype))


class Element:
    """What the pointwise methods and the sums look at: inputs, widened, and the task vectors."""

    def __init__(
        self, base: torch.Tensor | None, models: Sequence[torch.Tensor], wide: bool
    ) -> None:
        self.models = [widened(model, wide) for model in models]
        self.base = torch.zeros_like(self.models[0]) if base is None else widened(base, wide)
        self.deltas = self.models if base is None else [x - self.base for x in self.models]
        self.zero, self.one = torch.zeros_like(self.base), torch.ones_like(self.base)

    def total(self) -> torch.Tensor:
        total = self.zero
        for delta in self.deltas:
            total = total + delta
        return total

    def variance(self) -> torch.Tensor:
        """The biased variance over the task vectors: mean first, then squares, in order."""
        many = scalar(float(len(self.deltas)), self.base)
        mean, squares = self.total() / many, self.zero
        for delta in self.deltas:
            apart = delta - mean
            squares = squares + apart * apart
        return squares / many

    def unified(self) -> tuple[torch.Tensor, torch.Tensor]:
        """EMR's (sign is +, largest magnitude that agrees); 0 elects -."""
        positive, largest = self.total() > 0, self.zero
        for delta in self.deltas:
            aligned = torch.where(positive, delta, -delta)
            largest = torch.where(aligned > largest, aligned, largest)
        return positive, largest


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
    """RAM: mean of the task vectors with |delta| > epsilon; where one has, its own times f_k."""
    zero, one = element.zero, element.one
    total, scaled, count = zero, zero, zero
    for delta, factor in zip(element.deltas, reals[1:], strict=True):
        active = delta.abs() > scalar(reals[0], delta)
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


def _consensus(element: Element, reals: Sequence[float]) -> torch.Tensor:
    """Consensus TA (Wang et al. 2024): task arithmetic where >= need TALL masks are set."""
    total, count = element.total(), element.zero
    scale = scalar(reals[0], total)
    merged = element.base + scale * total
    for x, threshold in zip(element.models, reals[2:], strict=True):
        own = (x - element.base).abs() > scalar(threshold, x) * (merged - x).abs()
        count = count + torch.where(own, element.one, element.zero)
    return element.base + scale * torch.where(count >= reals[1], total, element.zero)


def _tall(element: Element, reals: Sequence[float]) -> torch.Tensor:
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


_POINTWISE: dict[str, Callable[[Element, Sequence[float]], torch.Tensor]] = {
    "nearswap": _nearswap,
    "ram": _ram,
    "magmax": _magmax,
    "consensus": _consensus,
    "tall": _tall,
    "emr": _emr,
    "variance": lambda element, reals: element.variance(),
    "sce": _sce,
}


def pointwise(
    op: str,
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    wide: bool,
) -> None:
    """A method that looks at each element alone."""
    stats[2] += int(not all(bool(torch.isfinite(tensor).all()) for tensor in (base, *models)))
    out.copy_(_POINTWISE[op](Element(base, models, wide), reals).to(out.dtype))


def row_ranks(
    ranks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    columns: int,
    wide: bool,
) -> None:
    """Ranks of |delta| within rows, equal magnitudes by index."""
    for k, model in enumerate(models):
        key = keys(widened(model, wide) - widened(base, wide)).view(-1, columns)
        order = key.sort(dim=1, stable=True).indices
        places = torch.arange(columns, device=key.device).expand_as(order)
        found = torch.empty_like(order).scatter_(1, order, places)
        ranks[k, : key.numel()] = found.reshape(-1).to(torch.int32)


def row_weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: torch.Tensor,
    columns: int,
    wide: bool,
) -> None:
    """A weighted sum with weights of its own for each row."""
    element = Element(base, models, wide)
    total = element.zero
    for delta, own in zip(element.deltas, weights, strict=True):
        total = total + own.to(total.dtype).repeat_interleave(columns) * delta
    if base is not None:
        total = element.base + total
    stats[0] += int(not bool(torch.isfinite(total).all()))
    out.copy_(total.to(out.dtype))
