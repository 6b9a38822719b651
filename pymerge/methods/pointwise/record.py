"""Records of the methods that look at each element of all models by itself."""

from __future__ import annotations

from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter
from pymerge.methods.sums.record import NAN

__all__ = ["CONSENSUS_TA", "MAGMAX", "NEARSWAP", "RAM"]

_SCALE = Parameter(
    "scale", "float", 1.0, "Scaling coefficient (lambda).", names=("lambda", "scale")
)

NEARSWAP = MethodSpec(
    name="nearswap",
    title="NearSwap",
    summary="Moves the base towards the model where the two are near each other.",
    formula=(
        "theta = w theta_1 + (1 - w) theta_0, w = clamp(t / max(|theta_0 - theta_1|, 1e-6), 0, 1)"
    ),
    source="mergekit (after alchemonaut's QuartetAnemoi)",
    url="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    needs_base=True,
    max_models=1,
    parameters=(
        Parameter("t", "float", REQUIRED, "Distance up to which the model is taken as it is."),
        NAN,
    ),
)

RAM = MethodSpec(
    name="ram",
    title="RAM",
    summary="Averages, at each element, the task vectors of the models that changed it.",
    formula="theta = theta_0 + mean over {k: |tau_k| > epsilon} of tau_k",
    source="mergekit (Reinforced Agent Merging)",
    url="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    needs_base=True,
    parameters=(
        Parameter("epsilon", "float", 1e-5, "Magnitude above which an element counts as changed."),
        NAN,
    ),
)

MAGMAX = MethodSpec(
    name="magmax",
    title="MagMax",
    summary="Takes each element from the task vector in which it is largest in magnitude.",
    formula="theta = theta_0 + scale * tau_{argmax_k |tau_k|}",
    source="Marczak et al., MagMax, 2024",
    url="https://arxiv.org/abs/2407.06322",
    needs_base=True,
    parameters=(_SCALE, NAN),
)

CONSENSUS_TA = MethodSpec(
    name="consensus_ta",
    title="Consensus task arithmetic",
    summary="Task arithmetic without the elements that matter to too few of the models.",
    formula=(
        "theta = theta_0 + scale * [sum_k m_k >= need] sum_k tau_k, m_k = |tau_k| > "
        "threshold_k |theta_0 + scale sum_j tau_j - theta_k|"
    ),
    source="Wang et al., Localizing Task Information (TALL masks, Consensus), 2024",
    url="https://arxiv.org/abs/2405.07813",
    needs_base=True,
    parameters=(
        Parameter(
            "scale", "float", 0.3, "Scaling coefficient (lambda).", names=("lambda", "scale")
        ),
        Parameter(
            "threshold",
            "float",
            0.4,
            "lambda_k of the mask of model k; the authors choose from 0.2 .. 0.6 on validation.",
            scope="model",
            minimum=0.0,
        ),
        Parameter("need", "int", 2, "How many models must claim an element.", minimum=1),
        NAN,
    ),
)
