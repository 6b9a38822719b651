"""Record of Arcee Fusion, in mergekit's bits and in an exact dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.engine.steps import MERGE, Step
from pymerge.methods.parameters import MERGEKIT, NAN
from pymerge.methods.spec import MethodSpec, Parameter

__all__ = ["RECORDS"]


def _reads(parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    if parameters["semantics"] != "exact":
        return (MERGE,)
    divergence = Step("divergence", "the divergence of each row")
    # No sample gives a first bracket, so all float32 keys are in it.
    threshold = Step("thresholds", "the threshold of each tensor", passes=2, selects=True)
    return divergence, threshold, MERGE


ARCEE_FUSION = MethodSpec(
    name="arcee_fusion",
    title="Arcee Fusion",
    summary="Takes the elements of the model that changed most and matter most.",
    formula=(
        "importance = |tau| KL(softmax(theta_1) || softmax(theta_0)) by row; theta_1 where "
        "importance >= median + 1.5 IQR, else theta_0"
    ),
    source="mergekit",
    url=MERGEKIT,
    run="pymerge.methods.arcee.passes:run",
    reads=_reads,
    needs_base=True,
    max_models=1,
    torch_only="mergekit",
    passes="1 on torch, on whole tensors; exact: 4 (divergences, twice the threshold, the merge)",
    parameters=(
        Parameter(
            "semantics",
            "str",
            "mergekit",
            "'mergekit': its float32 operators, on torch; 'exact': the divergence without rounding "
            "errors, on every backend, in bounded memory.",
            choices=("mergekit", "exact"),
            per_tensor=False,
        ),
        NAN,
    ),
)

RECORDS = (ARCEE_FUSION,)
