"""The merge methods: one record each, in the order in which they are listed."""

from __future__ import annotations

from pymerge.errors import RequestError, nearest
from pymerge.methods.adamerging.record import ADAMERGING
from pymerge.methods.directions.record import (
    KARCHER,
    MODEL_STOCK,
    MULTISLERP,
    NUSLERP,
    PASSTHROUGH,
    SLERP,
)
from pymerge.methods.matrices.record import (
    ARCEE_FUSION,
    DELLA,
    DELLA_LINEAR,
    EMR,
    RAMPLUS_TL,
    SCE,
    TALL_MASKS,
    TSV_M,
)
from pymerge.methods.pcb.record import PCB
from pymerge.methods.pointwise.record import CONSENSUS_TA, MAGMAX, NEARSWAP, RAM
from pymerge.methods.sparse.record import BREADCRUMBS, BREADCRUMBS_TIES, DARE_LINEAR, DARE_TIES
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter
from pymerge.methods.statistics.record import FISHER, GRADIENT_MATCHING, REGMEAN
from pymerge.methods.sums.record import LINEAR, TASK_ARITHMETIC
from pymerge.methods.ties.record import TIES

__all__ = ["METHODS", "REQUIRED", "MethodSpec", "Parameter", "get", "methods"]

METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        LINEAR,
        TASK_ARITHMETIC,
        ADAMERGING,
        TIES,
        PCB,
        DARE_LINEAR,
        DARE_TIES,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DELLA,
        DELLA_LINEAR,
        SCE,
        MODEL_STOCK,
        SLERP,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        NEARSWAP,
        ARCEE_FUSION,
        RAM,
        RAMPLUS_TL,
        MAGMAX,
        CONSENSUS_TA,
        TALL_MASKS,
        EMR,
        TSV_M,
        FISHER,
        REGMEAN,
        GRADIENT_MATCHING,
        PASSTHROUGH,
    )
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
