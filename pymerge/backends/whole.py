"""Methods on whole tensors, in torch, on any device.

They take as much memory as a few copies of the largest tensor in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.backends.reference_more import mask_hash
from pymerge.errors import RequestError

__all__ = ["WHOLE"]

Tensor = torch.Tensor


def _elect(values: Sequence[Tensor], weights: Sequence[float], divide: bool) -> Tensor:
    """Add up what has the sign of the sum, where zero elects +; / the weights of those."""
    vote = torch.zeros_like(values[0])
    for value in values:
        vote = vote + value
    sign = torch.where(vote >= 0, 1.0, -1.0).to(vote.dtype)
    merged, total = torch.zeros_like(vote), torch.zeros_like(vote)
    for value, weight in zip(values, weights, strict=True):
        agrees = torch.sign(value) == sign
        merged = merged + torch.where(agrees, value, torch.zeros_like(value))
        total = total + agrees.to(vote.dtype) * weight
    return merged / torch.where(total == 0, torch.ones_like(total), total) if divide else merged


def _keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return DELLA's probabilities: by the rank of |delta| in its row, equal ones by index."""
    if delta.numel() == 0:
        return delta.to(torch.float64)
    rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() > 1 else delta.reshape(1, -1)
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(delta, density, dtype=torch.float64)
    order = rows.abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(columns, device=delta.device).expand_as(order))
    spread = 2.0 * epsilon / (columns - 1)
    return ((density - epsilon) + ranks.to(torch.float64) * spread).reshape(delta.shape)


def della(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """DELLA (Deep et al. 2024): MAGPRUNE, rescale, merge."""
    values = []
    for k, model in enumerate(models):
        delta = model - base
        density, epsilon = parameters["density"][k], parameters["epsilon"][k]
        if density < 1.0:
            chance = _keep_probability(delta, density, epsilon)
            index = torch.arange(delta.numel(), device=delta.device)
            first, second = context.seeds[2 * k], context.seeds[2 * k + 1]
            drawn = (mask_hash(index, first, second).to(torch.float64) + 0.5) / 2.0**32
            kept = drawn.reshape(delta.shape) < chance
            sparse = torch.where(kept, delta, torch.zeros_like(delta))
            if parameters["rescale"] == "per_element":
                sparse = sparse / chance.to(delta.dtype)
            elif parameters["rescale"] == "l1":
                before, after = delta.abs().sum(), sparse.abs().sum()
                if float(before) >= 1e-7 and float(after) >= 1e-7:
                    sparse = sparse * (before / after)
            delta = sparse
        values.append(delta * parameters["weight"][k])
    weights = parameters["weight"]
    if context.method == "della":
        merged = _elect(values, weights, parameters["normalize"])
    else:
        merged = torch.zeros_like(base)
        for value in values:
            merged = merged + value
        if parameters["normalize"]:
            merged = merged / sum(weights)
    return base + parameters["scale"] * merged


def sce(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """SCE (Wan et al. 2024)."""
    deltas = torch.stack([model - base for model in models])
    selected = deltas
    share = parameters["select_topk"]
    if share < 1.0:
        variance = deltas.var(dim=0, unbiased=False).reshape(-1)
        count = int(int(torch.count_nonzero(variance)) * share)
        mask = torch.zeros_like(variance)
        order = variance.argsort(descending=True, stable=True)
        mask[order[:count]] = 1.0
        selected = deltas * mask.reshape(base.shape)
    everywhere = parameters["mask"] == "everywhere"
    energy = selected.reshape(len(models), -1).square().mean(dim=1) if base.numel() else None
    if energy is None:
        return base.clone()
    total = float(energy.sum())
    uniform = total < 1e-6 if everywhere else total == 0.0
    weights = torch.full_like(energy, 1.0 / len(models)) if uniform else energy / energy.sum()
    used = selected if everywhere else deltas
    sign = torch.where(used.sum(dim=0) >= 0, 1.0, -1.0).to(base.dtype)
    agrees = (torch.sign(used) == sign).to(base.dtype)
    shape = (-1,) + (1,) * base.dim()
    weighted = weights.reshape(shape) * agrees
    divisor = weighted.sum(dim=0)
    floor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    if everywhere:
        floor = divisor.clamp(min=1e-6)
    return base + (weighted * used).sum(dim=0) / floor


def arcee_fusion(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """Arcee Fusion: exact quantiles at any size, where mergekit samples above 1e6 elements."""
    model = models[0]
    if base.numel() == 0 or base.dim() == 0:
        return model.clone()
    log_fine = torch.log(torch.softmax(model, dim=-1) + 1e-8)
    fine = torch.softmax(model, dim=-1) + 1e-8
    log_base = torch.log(torch.softmax(base, dim=-1) + 1e-8)
    divergence = (fine * (log_fine - log_base)).sum(dim=-1, keepdim=True)
    delta = model - base
    importance = (delta.abs() * divergence).reshape(-1)
    ordered = importance.sort().values
    last = len(ordered) - 1
    median, low, high = (ordered[int(q * last)] for q in (0.5, 0.25, 0.75))
    threshold = median + 1.5 * (high - low)
    kept = (importance >= threshold).reshape(base.shape)
    return base + torch.where(kept, delta, torch.zeros_like(delta))


def ramplus_tl(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """RAM+ (tensor level)."""
    epsilon = parameters["epsilon"]
    deltas = [model - base for model in models]
    active = [delta.abs() > epsilon for delta in deltas]
    count = torch.stack(active).sum(dim=0) if active else torch.zeros_like(base)
    merged, mean = torch.zeros_like(base), torch.zeros_like(base)
    for delta, own in zip(deltas, active, strict=True):
        unique, shared = own & (count == 1), own & (count > 1)
        ratio = float(shared.sum()) / max(float(unique.sum()), epsilon)
        factor = 1.0 + parameters["r"] * min(max(ratio, 0.0), parameters["alpha"])
        merged = merged + torch.where(unique, factor * delta, torch.zeros_like(delta))
        mean = mean + torch.where(shared, delta, torch.zeros_like(delta))
    return base + merged + mean / count.clamp(min=1)


def unified_vector(deltas: Sequence[Tensor]) -> Tensor:
    """EMR's elected signs (0 elects -) and largest magnitudes."""
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total = total + delta
    sign = torch.where(total > 0, 1.0, -1.0).to(total.dtype)
    largest = torch.zeros_like(total)
    for delta in deltas:
        aligned = torch.where(delta * sign > 0, delta.abs(), torch.zeros_like(delta))
        largest = torch.maximum(largest, aligned)
    return sign * largest


def emr(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """EMR-Merging (Huang et al. 2024); with `task`, that task's mask and rescaler."""
    deltas = [model - base for model in models]
    unified = unified_vector(deltas)
    task = parameters["task"]
    if task is None:
        return base + unified
    masked = torch.where(deltas[task] * unified > 0, unified, torch.zeros_like(unified))
    return base + context.rescaler * masked


def tall_masks(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """TALL masks (Wang et al. 2024): what of the merged model belongs to one task."""
    total = torch.zeros_like(base)
    for model in models:
        total = total + (model - base)
    merged = base + parameters["scale"] * total
    own = models[parameters["task"]]
    mask = (own - base).abs() > parameters["threshold"] * (merged - own).abs()
    return base + torch.where(mask, parameters["scale"] * total, torch.zeros_like(total))


def tsv_m(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], context: Any
) -> Tensor:
    """TSV-M (Gargiulo et al. 2025)."""
    deltas = [model - base for model in models]
    if base.dim() != 2 or "text_projection" in context.name or min(base.shape) == 0:
        mean = torch.zeros_like(base)
        for delta in deltas:
            mean = mean + delta
        return base + parameters["scale"] * (mean / len(deltas))
    if not all(bool(delta.isfinite().all()) for delta in deltas):
        raise RequestError(
            f"tsv_m: tensor {context.name!r} holds NaN or infinity; such a matrix has no singular "
            "vectors; nan='keep' cannot help here"
        )
    keep = max(1, min(base.shape) // len(deltas))
    parts = []
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        parts.append((u[:, :keep], s[:keep], v[:keep]))
    left = torch.cat([u for u, _, _ in parts], dim=1)
    middle = torch.cat([s for _, s, _ in parts])
    right = torch.cat([v for _, _, v in parts], dim=0)
    u_left, _, v_left = torch.linalg.svd(left, full_matrices=False)
    u_right, _, v_right = torch.linalg.svd(right, full_matrices=False)
    merged = (u_left @ v_left) @ torch.diag(middle) @ (u_right @ v_right)
    return base + parameters["scale"] * merged


WHOLE = {
    "della": della,
    "della_linear": della,
    "sce": sce,
    "arcee_fusion": arcee_fusion,
    "ramplus_tl": ramplus_tl,
    "emr": emr,
    "tall_masks": tall_masks,
    "tsv_m": tsv_m,
}
