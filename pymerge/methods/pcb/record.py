"""Record of PCB-Merging and its variants: the paper's formula and the authors' four codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pymerge.engine.steps import MERGE, Step
from pymerge.methods.parameters import NAN, SCALE
from pymerge.methods.spec import MethodSpec, Parameter

__all__ = ["RECORDS", "VARIANTS", "PcbVariant"]


class PcbVariant(NamedTuple):
    """The numbers that distinguish a variant from the others.

    code: the formula, as in csrc/math/pcb.h. clip: share of the smallest and of the largest
    magnitudes that are clipped (the authors' codes). ratio, coefficient: the code's own defaults.
    """

    code: int
    clip: float
    ratio: float
    coefficient: float


VARIANTS: dict[str, PcbVariant] = {
    "paper": PcbVariant(0, 0.0, 0.1, 1.0),
    "root": PcbVariant(1, 1e-4, 0.1, 1.0),
    "vision": PcbVariant(2, 0.01, 0.05, 1.2),
    "vision_es": PcbVariant(3, 0.01, 0.05, 1.0),
    "nlp": PcbVariant(1, 0.01, 0.1, 1.0),
}


def _reads(parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    """Return the steps: statistics of the scope, a selection among the scores, the merge.

    The authors' codes look for quantiles, and have scores below 0: if a threshold is one of those,
    the selection is repeated from below.
    """
    whole = parameters["scope"] == "global"
    scope: Literal["model", "tensor"] = "model" if whole else "tensor"
    over = "the whole model" if whole else "each tensor"
    code = VARIANTS[parameters["variant"]].code
    if code == 0:
        first = (
            Step("extremes", f"the least and largest products over {over}", scope),
            Step("softmax", f"the sums of exp over {over}", scope),
        )
    else:
        quantiles = f"the quantiles of |delta| over {over}"
        first = (Step("quantiles", quantiles, scope, passes=2, most=7, selects=True),)
    again = 1 if code == 0 else 2
    sample = Step("sample", "a sample of the scores", scope, most=again)
    chosen = "the thresholds of the scores"
    thresholds = Step("thresholds", chosen, scope, most=6 * again, selects=True)
    return (*first, sample, thresholds, MERGE)


def _implied(name: str, value: Callable[[str], Any]) -> float:
    """Return a variant's own ratio or coefficient."""
    variant = VARIANTS[value("variant")]
    return variant.ratio if name == "ratio" else variant.coefficient


# The evolutionary search of the paper, which names CMA-ES. Bounds and budget are those of the
# authors' code for language models; the code for images searches in [0.8, 1.3] with 100
# evaluations. Both fix the ratio.
_ES = {
    "sampler": "cmaes",
    "parameters": {
        "models[*].parameters.weight": {"low": 0.5, "high": 3.0},
        "parameters.ratio": {"low": 0.02, "high": 0.4, "scale": "log"},
    },
    "budget": {"evaluations": 200},
}

PCB = MethodSpec(
    name="pcb",
    function="pcb_merge",
    run="pymerge.methods.pcb.passes:run",
    reads=_reads,
    implied=_implied,
    searches={"pcb_es": _ES},
    title="PCB-Merging (parameter competition balancing)",
    summary="Weighs each parameter by its competition within and between task vectors.",
    formula=(
        "beta_i = softmax(K norm(tau_i^2)) * sum_j softmax(norm(tau_i tau_j)); of beta_i the "
        "largest share `ratio` is kept; theta = theta_0 + scale * sum_i c_i beta_i tau_i / "
        "sum_i beta_i"
    ),
    source="Du et al., Parameter Competition Balancing for Model Merging, 2024",
    url="https://arxiv.org/abs/2410.02396",
    needs_base=True,
    passes="5 (two for statistics of the scope, two for thresholds of the scores, the merge)",
    parameters=(
        Parameter(
            "variant",
            "str",
            "paper",
            "The paper's formula, or that of one of the authors' codes: see docs/methods.md.",
            choices=tuple(VARIANTS),
            per_tensor=False,
        ),
        Parameter(
            "ratio",
            "float",
            None,
            "Share of each task vector that is kept.",
            minimum=0.0,
            maximum=1.0,
            per_tensor=False,
            default_doc="the variant's: 0.1; vision and vision_es 0.05",
        ),
        SCALE,
        Parameter(
            "weight",
            "float",
            None,
            "Coefficient of task vector k (lambda_k).",
            scope="model",
            names=("weight", "coefficients"),
            default_doc="1; vision 1.2",
        ),
        Parameter(
            "scope",
            "str",
            "global",
            "Statistics over the whole model, or of each tensor alone.",
            choices=("global", "tensor"),
            per_tensor=False,
        ),
        NAN,
    ),
)

RECORDS = (PCB,)
