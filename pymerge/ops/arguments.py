"""What arguments of ops may be, and what those with many of them pass on to every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.errors import not_one_of
from pymerge.ops.constants import SCORE_ALIGNMENT, SUM_CHUNK

__all__ = [
    "DIVERGENCE",
    "DIVERGENCE_ROWS",
    "DIVERGENCE_STEPS",
    "TIES_ELECT",
    "TIES_MERGE",
    "WEIGHTING",
    "Kept",
    "SparseMerge",
    "check_divergences",
    "check_kind",
    "divergence_columns",
    "padded",
    "sums_shape",
]


def _pairs(models: int) -> int:
    """Return how many pairs models make, each with itself among them."""
    return models * (models + 1) // 2


# Words that kernels number in this order: csrc/kernel_table.h.
WEIGHTING = ("none", "before", "after")
TIES_MERGE = ("mean_of_count", "mean_of_weights", "sum", "max")
TIES_ELECT = ("mass", "count")
# How many rows the sums of a kind have, by the number of models; csrc/sums.def has the same.
_SUMS_ROWS: dict[str, Callable[[int], int]] = {
    "sparse": lambda models: 2 * models,
    "gram": _pairs,
    "pcb_extremes": lambda models: 2 * _pairs(models),
    "pcb_exp": lambda models: _pairs(models) + models,
    "dots": lambda models: models - 1,
    "statistics": lambda models: 4 * models,
    "ram_counts": lambda models: 2 * models,
    "emr": lambda models: 2,
    "sce": lambda models: models,
}
# The rows of a table of divergences that a kind of `divergence_sums_` fills: first, how many;
# csrc/divergence.def has the same.
DIVERGENCE = {"maxima": (0, 2), "exp": (2, 2), "divergence": (4, 1), "all": (0, 5)}
DIVERGENCE_STEPS = ("maxima", "exp", "divergence")  # what "all" is made of
DIVERGENCE_ROWS = 5


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


def check_kind(op: str, kind: str, known: Iterable[str], backend: str) -> None:
    """Raise ValueError unless a kind of an op is one of those that a backend knows."""
    kinds = list(known)
    if kind not in kinds:
        raise ValueError(f"backend {backend!r}: {op}: {not_one_of(kind, kinds)}")


def divergence_columns(kind: str, table: Any, numel: int, columns: int, backend: str) -> int:
    """Return the columns of a table of divergences; raise ValueError if it has another shape."""
    check_kind("divergence_sums_", kind, DIVERGENCE, backend)
    shape = DIVERGENCE_ROWS, -(-numel // (columns or SUM_CHUNK))
    if tuple(table.shape) != shape:
        raise ValueError(
            f"backend {backend!r}: expected a table of shape {shape}, got {tuple(table.shape)}"
        )
    return shape[1]


def check_divergences(divergences: Any, numel: int, columns: int, backend: str) -> None:
    """Raise ValueError unless there is one number for each row."""
    if columns < 1 or numel % columns or tuple(divergences.shape) != (numel // columns,):
        raise ValueError(
            f"backend {backend!r}: expected a divergence for each row of {columns} of {numel} "
            f"elements, got a table of shape {tuple(divergences.shape)}"
        )


def padded(numel: int) -> int:
    """Return how many elements a row of scores or ranks has room for."""
    return -(-numel // SCORE_ALIGNMENT) * SCORE_ALIGNMENT


def sums_shape(kind: str, models: int, numel: int, columns: int) -> tuple[int, int]:
    """Return the shape of the partial sums of a kind."""
    return _SUMS_ROWS[kind](models), -(-numel // (columns or SUM_CHUNK))
