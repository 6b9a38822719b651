"""Independent re-implementations of the published TIES codes, written from their descriptions in
the
plainest torch: whole vectors in memory, kthvalue and sort. They share no code with pymerge."""

from __future__ import annotations

import torch

State = dict[str, torch.Tensor]


def flatten(state: State) -> torch.Tensor:
    return torch.cat([state[name].reshape(-1).float() for name in sorted(state)])


def unflatten(vector: torch.Tensor, like: State) -> State:
    result, start = {}, 0
    for name in sorted(like):
        count = like[name].numel()
        result[name] = vector[start : start + count].reshape(like[name].shape)
        start += count
    return result


def _trim_at_least(deltas: torch.Tensor, rank: int) -> torch.Tensor:
    limit = deltas.abs().kthvalue(rank, dim=1, keepdim=True).values
    return deltas * (deltas.abs() >= limit)


def _in_order(rows: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total


def official_delta(deltas: torch.Tensor, density: float, merge: str) -> torch.Tensor:
    """ties-merging: deltas [models, numel] of the whole model -> merged task vector [numel]."""
    numel = deltas.shape[1]
    trimmed = _trim_at_least(deltas, numel - int(numel * density))
    sign = torch.sign(_in_order(trimmed))
    majority = torch.sign(sign.sum())
    sign[sign == 0] = majority
    keep = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    chosen = trimmed * keep
    if merge == "max":
        return chosen.abs().max(dim=0).values * sign
    total = _in_order(chosen)
    if merge == "sum":
        return total
    return total / (chosen != 0).sum(dim=0).clamp(min=1)


def mergelm_delta(deltas: torch.Tensor, density: float) -> torch.Tensor:
    """MergeLM: like the official code, but a majority of 0 keeps nothing where the vote is 0."""
    numel = deltas.shape[1]
    trimmed = _trim_at_least(deltas, int(numel * (1 - density)))
    sign = torch.sign(_in_order(trimmed))
    sign[sign == 0] = torch.sign(sign.sum())
    keep = ((sign > 0) & (trimmed > 0)) | ((sign < 0) & (trimmed < 0))
    chosen = trimmed * keep
    return _in_order(chosen) / (chosen != 0).sum(dim=0).clamp(min=1)


def _exactly(delta: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the `count` largest magnitudes; of equal ones, those with the lowest index."""
    order = torch.sort(delta.abs(), descending=True, stable=True).indices[:count]
    kept = torch.zeros_like(delta)
    kept[order] = delta[order]
    return kept


def mergekit_delta(
    deltas: torch.Tensor, density: float, weights: list[float], normalize: bool
) -> torch.Tensor:
    """mergekit: deltas [models, numel] of one tensor."""
    numel = deltas.shape[1]
    if density < 1:
        count = max(1, int(density * numel)) if density > 0 else 0
        deltas = torch.stack([_exactly(delta, count) for delta in deltas])
    scale = torch.tensor(weights).reshape(-1, 1)
    weighted = deltas * scale
    majority = torch.where(_in_order(weighted) >= 0, 1.0, -1.0)
    mask = (weighted.sign() == majority).float()
    merged = _in_order(weighted * mask)
    if not normalize:
        return merged
    divisor = _in_order(scale * mask)
    divisor[divisor == 0] = 1
    return merged / divisor


def peft_delta(
    deltas: torch.Tensor, density: float, weights: list[float], frequency: bool
) -> torch.Tensor:
    """PEFT: weights apply after the election, the divisor is a count."""
    numel = deltas.shape[1]
    if density < 1:
        deltas = torch.stack([_exactly(delta, int(density * numel)) for delta in deltas])
    votes = deltas.sign() if frequency else deltas
    majority = torch.where(_in_order(votes) >= 0, 1, -1)
    mask = deltas.sign() == majority
    weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    return _in_order(weighted * mask) / mask.sum(dim=0).clamp(min=1)


def sd_mecha_delta(deltas: torch.Tensor, density: float, by_mass: bool) -> torch.Tensor:
    """sd-mecha: elects by the count of signs by default; an undecided vote keeps nothing."""
    numel = deltas.shape[1]
    trimmed = _trim_at_least(deltas, max(int((1 - density) * numel), 1))
    signs = trimmed.sign()
    elected = torch.sign(_in_order(trimmed if by_mass else signs))
    mask = (signs == elected).float()
    return (_in_order(trimmed * mask) / mask.sum(dim=0)).nan_to_num(nan=0.0)
