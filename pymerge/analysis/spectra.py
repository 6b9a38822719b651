"""Singular values and subspaces of task vectors, matrix by matrix, in torch and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.analysis.records import Matrix, Spectrum, Vector
from pymerge.engine.work import Progress, Source, Work
from pymerge.ops.array import as_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["all_spectra", "spectrum"]

_NOTHING = 1e-6  # singular values below this times the largest have no meaningful direction


def all_spectra(
    works: Sequence[Work], source: Source, rank: int, progress: Progress
) -> tuple[Spectrum, ...]:
    """Return the spectra of all matrices: tensors of two dimensions, both above 1."""
    import torch

    chosen = [work for work in works if len(work.shape) == 2 and min(work.shape) > 1]
    names = [work.name for work in chosen]
    progress.phase("spectra", sum(source.nbytes(name) for name in names))
    source.announce(names)
    found = []
    for work in chosen:
        base, models = source.load(work.name)
        assert base is not None
        rows, columns = work.shape
        origin = as_tensor(base).to(torch.float64)
        deltas = [
            (as_tensor(model).to(torch.float64) - origin).view(rows, columns) for model in models
        ]
        found.append(spectrum(work.name, deltas, rank))
        progress.advance(source.nbytes(work.name))
        source.release(work.name)
    return tuple(found)


def spectrum(name: str, deltas: Sequence[torch.Tensor], rank: int) -> Spectrum:
    """Return the spectrum of the task vectors of one matrix.

    Singular values are the roots of the eigenvalues of the smaller of tau' tau and tau tau', in
    float64. Those below 1e-8 of the largest are lost, which affects no statistic here.

    Args:
        name: of the tensor.
        deltas: matrices of float64, of equal shape.
        rank: r, of the subspaces; at most the smaller dimension.

    >>> import torch
    >>> found = spectrum("w", [torch.diag(torch.tensor([3.0, 3.0, 0.0]).double())], 2)
    >>> round(found.effective_rank[0], 3), found.stable_rank[0]
    (2.0, 2.0)
    """
    rank = min(rank, *deltas[0].shape)
    parts = [_svd(delta, rank) for delta in deltas]
    rows, columns = deltas[0].shape
    return Spectrum(
        tensor=name,
        shape=(int(rows), int(columns)),
        rank=rank,
        effective_rank=tuple(_effective_rank(values) for _, values, _ in parts),
        stable_rank=tuple(_stable_rank(values) for _, values, _ in parts),
        top_singular_values=tuple(tuple(values[:rank].tolist()) for _, values, _ in parts),
        energy=tuple(_energy(values, rank) for _, values, _ in parts),
        left_overlap=_overlaps([left for left, _, _ in parts]),
        right_overlap=_overlaps([right for _, _, right in parts]),
        interference=_interference(parts),
    )


def _svd(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the top left vectors [rows, <= rank], all singular values, descending, and the top
    right vectors [columns, <= rank]; fewer vectors where singular values are negligible."""
    import torch

    wide = delta.shape[0] < delta.shape[1]
    tall = delta.T if wide else delta
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    values = squares.flip(0).clamp(min=0.0).sqrt()
    right = vectors.flip(1)[:, :rank]
    used = int((values[:rank] > _NOTHING * values[0]).sum())
    right = right[:, :used]
    left = tall @ right / values[:used]
    return (right, values, left) if wide else (left, values, right)


def _effective_rank(values: torch.Tensor) -> float | None:
    """Return exp of the entropy of sigma / sum sigma (Roy & Vetterli 2007)."""
    import torch

    total = values.sum()
    if total == 0:
        return None
    shares = values / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _stable_rank(values: torch.Tensor) -> float | None:
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else None


def _energy(values: torch.Tensor, rank: int) -> float | None:
    total = (values**2).sum()
    return float((values[:rank] ** 2).sum() / total) if total > 0 else None


def _overlaps(bases: Sequence[torch.Tensor]) -> Matrix:
    """Return ||A' B||_F^2 / min(rank A, rank B)."""

    def overlap(a: torch.Tensor, b: torch.Tensor) -> float | None:
        least = min(a.shape[1], b.shape[1])
        return min(1.0, float(((a.T @ b) ** 2).sum() / least)) if least else None

    rows: list[Vector] = []
    for i, a in enumerate(bases):
        row = [rows[j][i] if j < i else overlap(a, b) for j, b in enumerate(bases)]
        row[i] = 1.0 if a.shape[1] else None
        rows.append(tuple(row))
    return tuple(rows)


def _interference(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> float | None:
    """Return ||(U'U - I) S (V'V - I)||_1 of all top triplets together (Gargiulo et al. 2025)."""
    import torch

    if len(parts) < 2:
        return None
    left = torch.cat([part[0] for part in parts], dim=1)
    right = torch.cat([part[2] for part in parts], dim=1)
    values = torch.cat([part[1][: part[0].shape[1]] for part in parts])
    eye = torch.eye(len(values), dtype=torch.float64)
    return float(((left.T @ left - eye) * values @ (right.T @ right - eye)).abs().sum())
