"""The merge methods: a folder for each family, whose `record` lists its methods."""

from __future__ import annotations

from pymerge.errors import RequestError, nearest
from pymerge.methods.adamerging import record as adamerging
from pymerge.methods.arcee import record as arcee
from pymerge.methods.directions import record as directions
from pymerge.methods.matrices import record as matrices
from pymerge.methods.pcb import record as pcb
from pymerge.methods.pointwise import record as pointwise
from pymerge.methods.sce import record as sce
from pymerge.methods.sparse import record as sparse
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter
from pymerge.methods.statistics import record as statistics
from pymerge.methods.sums import record as sums
from pymerge.methods.ties import record as ties

__all__ = ["METHODS", "REQUIRED", "MethodSpec", "Parameter", "get", "methods"]

# In the order in which people see them.
_FAMILIES = (
    sums,
    adamerging,
    ties,
    pcb,
    sparse,
    sce,
    directions,
    pointwise,
    arcee,
    matrices,
    statistics,
)

METHODS: dict[str, MethodSpec] = {
    spec.name: spec for family in _FAMILIES for spec in family.RECORDS
}


def get(name: str, where: str = "method") -> MethodSpec:
    """Return the record of a method, or raise RequestError with the nearest name."""
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise RequestError(
            f"{where}: unknown merge method {name!r}{nearest(name, METHODS)} (known: {known})"
        )
    return METHODS[name]


def methods() -> dict[str, MethodSpec]:
    """Return the records of all merge methods: parameters, ranges, defaults, papers.

    >>> "ties" in methods()
    True
    """
    return dict(METHODS)
