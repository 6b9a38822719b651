"""Methods on whole tensors, in torch, on any device.

They take as much memory as a few copies of the largest tensor in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.errors import RequestError

__all__ = ["arcee_fusion", "tsv_m"]

Tensor = torch.Tensor


def arcee_fusion(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], name: str
) -> Tensor:
    """Arcee Fusion: exact quantiles at any size, where mergekit samples above 1e6 elements."""
    model = models[0]
    if base.numel() == 0 or base.dim() == 0:
        return model.clone()
    # As mergekit rounds it: the logarithm of a quotient. Importance depends on the last bits of it.
    fine = torch.softmax(model, dim=-1) + 1e-8
    coarse = torch.softmax(base, dim=-1) + 1e-8
    divergence = (fine * torch.log(fine / coarse)).sum(dim=-1, keepdim=True)
    delta = model - base
    importance = (delta.abs() * divergence).reshape(-1)
    ordered = importance.sort().values
    last = len(ordered) - 1
    median, low, high = (ordered[int(q * last)] for q in (0.5, 0.25, 0.75))
    threshold = median + 1.5 * (high - low)
    kept = (importance >= threshold).reshape(base.shape)
    return base + torch.where(kept, delta, torch.zeros_like(delta))


def tsv_m(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], name: str
) -> Tensor:
    """TSV-M (Gargiulo et al. 2025)."""
    deltas = [model - base for model in models]
    if base.dim() != 2 or "text_projection" in name or min(base.shape) == 0:
        mean = torch.zeros_like(base)
        for delta in deltas:
            mean = mean + delta
        return base + parameters["scale"] * (mean / len(deltas))
    if not all(bool(delta.isfinite().all()) for delta in deltas):
        raise RequestError(
            f"tsv_m: tensor {name!r} holds NaN or infinity; such a matrix has no singular "
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
