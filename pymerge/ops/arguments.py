"""Allowed values of op arguments, and the records that group arguments for every backend."""

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
    """Return the number of pairs of models, counting each model paired with itself."""
    return models * (models + 1) // 2


# The kernels number these words in this order: see csrc/kernel_table.h.
WEIGHTING = ("none", "before", "after")
TIES_MERGE = ("mean_of_count", "mean_of_weights", "sum", "max")
TIES_ELECT = ("mass", "count")
# Number of rows in the sums of each kind, given the number of models; as in csrc/sums.def.
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
# The rows of a divergence table that each kind of `divergence_sums_` fills: (first, count), as in
# csrc/divergence.def.
DIVERGENCE = {"maxima": (0, 2), "exp": (2, 2), "divergence": (4, 1), "all": (0, 5)}
DIVERGENCE_STEPS = ("maxima", "exp", "divergence")  # the steps of "all"
DIVERGENCE_ROWS = 5


@dataclass(frozen=True)
class Kept:
    """Which elements of each task vector are kept.

    Attributes:
        lo, last: [models] the smallest and the largest key kept, or ranks where `ranks` is given.
        seeds: two words for each model; empty if nothing is drawn at random.
        limits: [models] an element is kept if its hash is at most this.
        start: flat index of the first element.
        ranks: int32 [models, numel with padding], or None.
        chances: for each model, the first probability and the step from rank to rank.
        per_element: divide each kept element by its probability.
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
    """How sparse task vectors are merged; see csrc/math/sparse.h."""

    factors: Sequence[float]
    weights: Sequence[float]
    elect: bool
    divide: bool
    divisor: float
    scale: float
    bare: bool = False


def check_kind(op: str, kind: str, known: Iterable[str], backend: str) -> None:
    """Raise ValueError unless a backend knows this kind of the op."""
    kinds = list(known)
    if kind not in kinds:
        raise ValueError(f"backend {backend!r}: {op}: {not_one_of(kind, kinds)}")


def divergence_columns(kind: str, table: Any, numel: int, columns: int, backend: str) -> int:
    """Return the number of columns of a divergence table; raise ValueError for other shapes."""
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
    """Return the allocated length of a row of scores or ranks."""
    return -(-numel // SCORE_ALIGNMENT) * SCORE_ALIGNMENT


def sums_shape(kind: str, models: int, numel: int, columns: int) -> tuple[int, int]:
    """Return the shape of the partial sums of this kind."""
    return _SUMS_ROWS[kind](models), -(-numel // (columns or SUM_CHUNK))
