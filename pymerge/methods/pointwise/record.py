"""Records of the methods that treat each element of all models by itself.

The `details` of each are its `Operation`: the kind of `pointwise_` (csrc/pointwise.def) that
computes it, and the numbers that the kind needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from pymerge.engine.steps import MERGE, Step
from pymerge.errors import RequestError
from pymerge.methods.parameters import MERGEKIT, NAN, SCALE
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter, always, never

__all__ = ["RECORDS", "Operation", "task_of"]

Parameters = Mapping[str, Any]


class Operation(NamedTuple):
    """How elements are computed.

    Attributes:
        kind: of `pointwise_`.
        reals: (parameters, number of models) -> the numbers that it needs.
        bare: the same where there is no base, if the method can do without: the kind then gets the
            first model in its place.
    """

    kind: str
    reals: Callable[[Parameters, int], list[float]]
    bare: Callable[[Parameters, int], list[float]] | None = None


_pointwise = partial(
    MethodSpec, run="pymerge.methods.pointwise.passes:run", needs_base=True, one_op=always
)


def task_of(parameters: Parameters, count: int) -> int:
    """Return the number of the model that `task` names, or raise RequestError."""
    task = parameters["task"]
    if task >= count:
        raise RequestError(f"task: expected the number of a model, 0 to {count - 1}; got {task}")
    return task


def _emr_reads(parameters: Parameters, _numel: int, _total: int) -> tuple[Step, ...]:
    rescaler = Step("rescaler", "the rescaler of the task over the whole model", "model")
    return (MERGE,) if parameters["task"] is None else (rescaler, MERGE)


def _ramplus_tl_reads(_parameters: Parameters, _numel: int, _total: int) -> tuple[Step, ...]:
    return Step("changes", "counts of what changed in each tensor"), MERGE


NEARSWAP = _pointwise(
    name="nearswap",
    details=Operation("nearswap", lambda p, _count: [p["t"], 1e-6]),
    title="NearSwap",
    summary="Moves the base towards the model where the two are near each other.",
    formula=(
        "theta = w theta_1 + (1 - w) theta_0, w = clamp(t / max(|theta_0 - theta_1|, 1e-6), 0, 1)"
    ),
    source="mergekit (after alchemonaut's QuartetAnemoi)",
    url=MERGEKIT,
    max_models=1,
    parameters=(
        Parameter("t", "float", REQUIRED, "Distance up to which the model is taken as it is."),
        NAN,
    ),
)

RAM = _pointwise(
    name="ram",
    details=Operation("ram", lambda p, count: [p["epsilon"]] * count + [1.0] * count),
    title="RAM",
    summary="Averages, at each element, the task vectors of the models that changed it.",
    formula="theta = theta_0 + mean over {k: |tau_k| > epsilon} of tau_k",
    source="mergekit (Reinforced Agent Merging)",
    url=MERGEKIT,
    parameters=(
        Parameter("epsilon", "float", 1e-5, "Magnitude above which an element counts as changed."),
        NAN,
    ),
)

RAMPLUS_TL = _pointwise(
    name="ramplus_tl",
    run="pymerge.methods.pointwise.passes:run_ramplus_tl",
    reads=_ramplus_tl_reads,
    one_op=never,
    title="RAM+ (tensor level)",
    summary="RAM, with what only one model changed scaled up by how much it shares elsewhere.",
    formula="as ram; unique elements times 1 + r clip(shared_k / unique_k, 0, alpha)",
    source="mergekit",
    url=MERGEKIT,
    passes="2 (what each model changed, then the merge)",
    parameters=(
        Parameter("r", "float", 0.1, "Strength of the rescaling.", minimum=0.0),
        Parameter("alpha", "float", 0.2, "Most of the ratio that counts.", minimum=0.0),
        Parameter("epsilon", "float", 1e-5, "Magnitude above which an element counts as changed."),
        NAN,
    ),
)

MAGMAX = _pointwise(
    name="magmax",
    details=Operation("magmax", lambda p, _count: [p["scale"]]),
    title="MagMax",
    summary="Takes each element from the task vector in which it is largest in magnitude.",
    formula="theta = theta_0 + scale * tau_{argmax_k |tau_k|}",
    source="Marczak et al., MagMax, 2024",
    url="https://arxiv.org/abs/2407.06322",
    parameters=(SCALE, NAN),
)

MEDIAN = _pointwise(
    name="median",
    details=Operation(
        "median", lambda p, _count: [p["scale"], 1.0], bare=lambda p, _count: [p["scale"], 0.0]
    ),
    needs_base=False,
    takes_base=True,
    title="Median",
    summary="Takes the median of each element, which a minority of models cannot move far.",
    formula="theta = theta_0 + scale * median_k tau_k; without a base, scale * median_k theta_k",
    source="Yin et al., Byzantine-Robust Distributed Learning (coordinate-wise median), 2018",
    url="https://arxiv.org/abs/1803.01498",
    parameters=(SCALE, NAN),
)

CONSENSUS_TA = _pointwise(
    name="consensus_ta",
    details=Operation("consensus_ta", lambda p, _count: [p["scale"], p["need"], *p["threshold"]]),
    title="Consensus task arithmetic",
    summary="Task arithmetic without the elements that matter to too few of the models.",
    formula=(
        "theta = theta_0 + scale * [sum_k m_k >= need] sum_k tau_k, m_k = |tau_k| > "
        "threshold_k |theta_0 + scale sum_j tau_j - theta_k|"
    ),
    source="Wang et al., Localizing Task Information (TALL masks, Consensus), 2024",
    url="https://arxiv.org/abs/2405.07813",
    parameters=(
        replace(SCALE, default=0.3),
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

TALL_MASKS = _pointwise(
    name="tall_masks",
    details=Operation(
        "tall_masks", lambda p, count: [p["scale"], p["threshold"], task_of(p, count)]
    ),
    title="TALL masks",
    summary="The part of a merge that matters to one task: compressed fine-tuned models.",
    formula=(
        "theta_0 + [|tau_k| > threshold |theta_0 + scale sum_j tau_j - theta_k|] scale sum_j tau_j"
    ),
    source="Wang et al., Localizing Task Information (TALL masks, Consensus), 2024",
    url="https://arxiv.org/abs/2405.07813",
    parameters=(
        Parameter("task", "int", 0, "Number of the model, from 0.", minimum=0, per_tensor=False),
        Parameter("threshold", "float", 0.4, "lambda of the mask.", minimum=0.0),
        replace(SCALE, default=0.3),
        NAN,
    ),
)

EMR = _pointwise(
    name="emr",
    run="pymerge.methods.pointwise.passes:run_emr",
    reads=_emr_reads,
    title="EMR-Merging",
    summary="One unified task vector of elected signs and largest magnitudes; a mask per task.",
    formula=(
        "unified = sgn(sum tau) max{|tau_k| : sgn tau_k = sgn sum tau}; task k: theta_0 + "
        "rescale_k [tau_k unified > 0] unified"
    ),
    source="Huang et al., EMR-Merging, 2024",
    url="https://arxiv.org/abs/2405.17461",
    passes="1 (2 with a task, for its rescaler)",
    parameters=(
        Parameter(
            "task",
            "int",
            None,
            "Number of the model whose mask and rescaler are applied, from 0; none gives the "
            "unified model.",
            minimum=0,
            per_tensor=False,
            default_doc="none",
        ),
        NAN,
    ),
)

RECORDS = (
    NEARSWAP,
    RAM,
    RAMPLUS_TL,
    MAGMAX,
    MEDIAN,
    CONSENSUS_TA,
    TALL_MASKS,
    EMR,
)
