"""What calls with many arguments pass on to every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.backends.sizes import SCORE_ALIGNMENT, SUM_CHUNK

__all__ = ["POINTWISE", "SUMS", "Kept", "SparseMerge", "padded", "sums_shape"]

# Codes of csrc/kernel_table.h.
POINTWISE = {
    name: code
    for code, name in enumerate(
        ("nearswap", "ram", "magmax", "consensus", "tall", "emr", "variance", "sce")
    )
}
SUMS = {
    name: code
    for code, name in enumerate(
        (
            "sparse",
            "gram",
            "pcb_extremes",
            "pcb_exp",
            "dots",
            "statistics",
            "ram_counts",
            "emr",
            "sce",
        )
    )
}


@dataclass(frozen=True)
class Kept:
    """What of each task vector is kept.

    lo, last: [models] least and largest key, or rank where there are ranks. seeds: two words for
    each model, or none: nothing is drawn. limits: [models] kept where the hash is at most this.
    start: flat index of the first element. ranks: int32 [models, numel and room] or None. chances:
    first probability and step from rank to rank, of each model; per_element: what is kept is
    divided by its probability.
    """

    lo: Sequence[int] = ()
    last: Sequence[int] = ()
    seeds: Sequence[int] = ()
    limits: Sequence[int] = ()
    start: int = 0
    ranks: Any = None
    chances: Sequence[float] = ()
    per_element: bool = False

    def numbers(self) -> tuple[Sequence[int], ...]:
        return self.lo, self.last, self.seeds, self.limits


@dataclass(frozen=True)
class SparseMerge:
    """How sparse task vectors are merged: see csrc/math/sparse.h."""

    factors: Sequence[float]
    weights: Sequence[float]
    elect: bool
    divide: bool
    divisor: float
    scale: float
    bare: bool = False


def padded(numel: int) -> int:
    """Return how many elements a row of scores or ranks has room for."""
    return -(-numel // SCORE_ALIGNMENT) * SCORE_ALIGNMENT


def sums_shape(kind: str, models: int, numel: int, columns: int) -> tuple[int, int]:
    """Return the shape of the partial sums of a kind."""
    pairs = models * (models + 1) // 2
    rows = {
        "sparse": 2 * models,
        "gram": pairs,
        "pcb_extremes": 2 * pairs,
        "pcb_exp": pairs + models,
        "dots": models - 1,
        "statistics": 4 * models,
        "ram_counts": 2 * models,
        "emr": 2,
        "sce": models,
    }[kind]
    return rows, -(-numel // (columns or SUM_CHUNK))
