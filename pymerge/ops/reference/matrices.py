"""Methods that work on whole tensors, in torch, on any device.

They need memory for a few float32 copies of the largest tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.errors import RequestError

__all__ = ["arcee_fusion", "iso_c", "iso_cts", "tsv_m"]

Tensor = torch.Tensor


def arcee_fusion(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], name: str
) -> Tensor:
    """Arcee Fusion, with exact quantiles at any size; mergekit samples above 1e6 elements."""
    model = models[0]
    if base.numel() == 0 or base.dim() == 0:
        return model.clone()
    # Rounded as in mergekit: the logarithm of a quotient. The importance depends on its last bits.
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
    if not _is_decomposed(base, name):
        return base + parameters["scale"] * _mean(deltas)
    _check_finite(deltas, "tsv_m", name)
    keep = max(1, min(base.shape) // len(deltas))
    parts = []
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        parts.append((u[:, :keep], s[:keep], v[:keep]))
    left = torch.cat([u for u, _, _ in parts], dim=1)
    middle = torch.cat([s for _, s, _ in parts])
    right = torch.cat([v for _, _, v in parts], dim=0)
    merged = _nearest_orthogonal(left) @ torch.diag(middle) @ _nearest_orthogonal(right)
    return base + parameters["scale"] * merged


def iso_c(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], name: str
) -> Tensor:
    """Iso-C (Marczak et al. 2025, algorithm 1): the summed task vectors with a uniform spectrum."""
    deltas = [model - base for model in models]
    if not _is_decomposed(base, name):
        return base + parameters["scale"] * _mean(deltas)
    _check_finite(deltas, "iso_c", name)
    u, s, v = torch.linalg.svd(_sum(deltas), full_matrices=False)
    return base + parameters["scale"] * (s.mean() * (u @ v))


def iso_cts(
    base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any], name: str
) -> Tensor:
    """Iso-CTS (Marczak et al. 2025, algorithm 2): the last singular vectors of the sum are replaced
    by the first ones of each task vector, projected off the vectors that remain; then as Iso-C."""
    deltas = [model - base for model in models]
    if not _is_decomposed(base, name):
        return base + parameters["scale"] * _mean(deltas)
    _check_finite(deltas, "iso_cts", name)
    rank, count = min(base.shape), len(deltas)
    # As in the authors' code: the tasks share the rest evenly, and a remainder stays common.
    wanted = rank - int(rank * parameters["common_fraction"])
    each = min(round(wanted / count), rank // count)
    common = rank - each * count
    u, s, v = torch.linalg.svd(_sum(deltas), full_matrices=False)
    parts = [(u[:, :common], s[:common], v[:common])]
    shared = u[:, :common]
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta - shared @ (shared.T @ delta), full_matrices=False)
        parts.append((u[:, :each], s[:each], v[:each]))
    left = _nearest_orthogonal(torch.cat([u for u, _, _ in parts], dim=1))
    right = _nearest_orthogonal(torch.cat([v for _, _, v in parts], dim=0))
    energy = torch.cat([s for _, s, _ in parts]).mean()
    return base + parameters["scale"] * (energy * (left @ right))


def _is_decomposed(base: Tensor, name: str) -> bool:
    """Return whether the method treats this tensor as a matrix. Like the authors of TSV-M and Iso,
    it excludes CLIP's text projection."""
    return base.dim() == 2 and "text_projection" not in name and min(base.shape) > 0


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total = total + delta
    return total


def _mean(deltas: Sequence[Tensor]) -> Tensor:
    return _sum(deltas) / len(deltas)


def _check_finite(deltas: Sequence[Tensor], method: str, name: str) -> None:
    if not all(bool(delta.isfinite().all()) for delta in deltas):
        raise RequestError(
            f"{method}: tensor {name!r} holds NaN or infinity; such a matrix has no singular "
            "vectors; nan='keep' cannot help here"
        )


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows or columns (orthogonal Procrustes)."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v
