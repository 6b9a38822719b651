"""The merge methods: one record each, and the dialects of TIES."""

from __future__ import annotations

from pymerge.errors import RequestError, nearest
from pymerge.methods.linear import LINEAR, TASK_ARITHMETIC
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter
from pymerge.methods.ties import TIES

__all__ = ["METHODS", "REQUIRED", "MethodSpec", "Parameter", "get", "methods"]

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in (LINEAR, TASK_ARITHMETIC, TIES)}


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
