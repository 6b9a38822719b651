"""Low-rank factors of matrices: exact, or by random projections; deterministic.

torch's products and decompositions depend on the number of threads; results must not. So every step
that affects a result runs on one thread, with a generator of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pymerge.ops.threads import torch_threads

__all__ = ["LowRank", "Method", "factor_matrix", "factor_product"]

Method = Literal["auto", "exact", "randomized"]

_SMALL = 384  # matrices with a side up to this are decomposed exactly
_EXTRA = 16  # additional columns
_FIRST = 32  # the first rank tried for an energy


@dataclass(frozen=True)
class LowRank:
    """b @ a, the best approximation of its rank, or close to it.

    Attributes:
        b: [rows, rank] float32, `U sqrt(S)`.
        a: [rank, columns] float32, `sqrt(S) V^T`.
        energy: share of the matrix's squared norm in the singular values of the factors; 1 for a
            matrix of zeros.
        exact: whether these are the largest singular values to rounding.
    """

    b: np.ndarray
    a: np.ndarray
    energy: float
    exact: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def factor_product(b: np.ndarray, a: np.ndarray, rank: int | None, energy: float | None) -> LowRank:
    """Return the best approximation of b @ a by its singular values, without forming the product.

    QR of both factors reduces it to a square matrix of the product's rank; in float64.

    Args:
        b: [rows, r]; a: [r, columns].
        rank: of the result; smaller if the matrix has a smaller one; None with `energy`.
        energy: use the least rank that keeps this share of the squared norm.
    """
    with torch_threads(1):
        left, upper = torch.linalg.qr(torch.from_numpy(b).double())
        right, lower = torch.linalg.qr(torch.from_numpy(a).double().T)
        u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        squares = float((s * s).sum())
        kept = _kept(s, squares, rank, energy)
        return _balanced(left @ u[:, :kept], s[:kept], vh[:kept] @ right.T, squares, True)


def factor_matrix(
    matrix: torch.Tensor,
    rank: int | None = None,
    energy: float | None = None,
    *,
    most: int | None = None,
    method: Method = "auto",
    seed: int = 0,
    power: int = 5,
) -> LowRank:
    """Return low-rank factors of a matrix.

    Randomized: the range of the matrix is found by `power` iterations on random columns, with QR
    between them (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). The energy is then that
    of the projection: exact for these factors, and a lower bound of the best. If an energy is
    requested and the first attempt does not reach it, the rank is doubled.

    Args:
        matrix: [rows, columns], float32.
        rank: of the result, or None with `energy`, in (0, 1].
        most: the largest rank allowed for an energy.
        method: "exact" (LAPACK), "randomized", or "auto": exact if a side is at most 384 or the
            rank is more than a quarter of it.
        seed: of the random columns.
    """
    full = min(matrix.shape)
    with torch_threads(1):
        squares = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
        wanted = min(full, most or full) if rank is None else min(rank, full)
        if squares == 0:
            zero = torch.zeros(1, dtype=torch.float64)
            return _balanced(
                zero.expand(matrix.shape[0], 1), zero, zero.expand(1, matrix.shape[1]), 0.0, True
            )
        tried = wanted if rank is not None else min(wanted, _FIRST)
        while True:
            whole = full <= _SMALL or 4 * tried > full
            if method == "exact" or (method == "auto" and whole) or tried + _EXTRA >= full:
                u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
                kept = min(_kept(s, squares, rank, energy), wanted)
                return _balanced(u[:, :kept], s[:kept], vh[:kept], squares, True)
            u, s, vh = _project(matrix, tried + _EXTRA, seed, power)
            s, u, vh = s[:tried], u[:, :tried], vh[:tried]
            reached = energy is None or float((s * s).sum()) >= energy * squares
            if reached or tried == wanted:
                kept = min(_kept(s, squares, rank, energy), wanted)
                return _balanced(u[:, :kept], s[:kept], vh[:kept], squares, False)
            tried = min(2 * tried, wanted)


def _project(
    matrix: torch.Tensor, columns: int, seed: int, power: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], columns, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(power):
        across = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ across).Q
    u, s, vh = torch.linalg.svd((basis.T @ matrix).double(), full_matrices=False)
    return basis.double() @ u, s, vh


def _kept(s: torch.Tensor, squares: float, rank: int | None, energy: float | None) -> int:
    """Return the number of singular values to keep; at least 1."""
    if rank is not None:
        return max(1, min(rank, len(s)))
    assert energy is not None
    sums = torch.cumsum(s * s, 0)
    # Rounding must not request more values than there are.
    enough = sums >= energy * squares * (1 - 1e-12)
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else len(s)


def _balanced(
    u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, squares: float, exact: bool
) -> LowRank:
    # The sign of singular vectors is arbitrary: make the largest element of each column of U
    # positive.
    if u.shape[0]:
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
        u, vh = u * sign, vh * sign.T
    root = s.sqrt()
    energy = 1.0 if squares == 0 else min(1.0, float((s * s).sum()) / squares)
    b = np.ascontiguousarray((u * root).float().numpy())
    a = np.ascontiguousarray((root[:, None] * vh).float().numpy())
    return LowRank(b, a, energy, exact)
