"""The plan of a merge, made from headers alone."""

from __future__ import annotations

from pymerge.plan.build import make_plan
from pymerge.plan.records import MergePlan, PlannedTensor

__all__ = ["MergePlan", "PlannedTensor", "make_plan"]
