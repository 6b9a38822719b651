"""Record of SCE: select, calculate, erase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.engine.steps import MERGE, Step
from pymerge.methods.parameters import INT8_MASK, NAN
from pymerge.methods.spec import MethodSpec, Parameter

__all__ = ["RECORDS"]


def _reads(parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    weights = Step("weights", "the energies of the selection, for the weights")
    if parameters["select_topk"] >= 1.0:
        return weights, MERGE
    count = Step("variances", "how many variances are not 0")
    selection = Step("thresholds", "the threshold of the variances", selects=True)
    return count, selection, weights, MERGE


SCE = MethodSpec(
    name="sce",
    title="SCE (select, calculate, erase)",
    summary="Weighs models by the energy of their task vectors where these differ most.",
    formula=(
        "mask = top select_topk of var_k tau_k; w_k = mean((mask tau_k)^2) / sum; "
        "theta = theta_0 + sum w_k e_k tau_k / sum w_k e_k, e_k = [sgn tau_k = sgn sum tau]"
    ),
    source="Wan et al., FuseChat, 2024",
    url="https://arxiv.org/abs/2408.07990",
    run="pymerge.methods.sce.passes:run",
    reads=_reads,
    needs_base=True,
    passes="2 (the weights, then the merge; 4 with select_topk below 1)",
    parameters=(
        Parameter(
            "select_topk",
            "float",
            1.0,
            "Share of the elements with nonzero variance that is selected.",
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter(
            "mask",
            "str",
            "weights",
            "Use the selection for the weights only (the authors' code), or everywhere (mergekit).",
            choices=("weights", "everywhere"),
            default_doc="weights; everywhere in YAML, as in mergekit",
        ),
        NAN,
        INT8_MASK,
    ),
    yaml_defaults={"mask": "everywhere"},
)

RECORDS = (SCE,)
