"""Records of the two weighted sums: `linear` (averaging) and `task_arithmetic`."""

from __future__ import annotations

from pymerge.methods.parameters import INT8_MASK, NAN, NO_RESCALE, SCALE, WEIGHT
from pymerge.methods.spec import MethodSpec, Parameter, always

__all__ = ["RECORDS"]

LINEAR = MethodSpec(
    name="linear",
    run="pymerge.methods.sums.passes:run_linear",
    one_op=always,
    title="Linear (weighted average)",
    summary="Weighted average of the models; with equal weights, plain averaging (model soup).",
    formula="theta = sum_k w_k theta_k / sum_k w_k   (normalize: true), else sum_k w_k theta_k",
    source="Wortsman et al., Model soups, 2022",
    url="https://arxiv.org/abs/2203.05482",
    needs_base=False,
    divides="normalize",
    parameters=(
        Parameter("weight", "float", 1.0, "Weight w_k of model k.", scope="model"),
        Parameter(
            "normalize", "bool", True, "Divide by the sum of the weights, which must not be 0."
        ),
        NAN,
    ),
)

TASK_ARITHMETIC = MethodSpec(
    name="task_arithmetic",
    run="pymerge.methods.sums.passes:run_task_arithmetic",
    one_op=always,
    title="Task arithmetic",
    summary="Adds scaled task vectors to the base; negative weights negate, and make analogies.",
    formula="theta = theta_0 + scale * sum_k w_k (theta_k - theta_0)   (/ sum_k w_k if normalize)",
    source="Ilharco et al., Editing Models with Task Arithmetic, 2023",
    url="https://arxiv.org/abs/2212.04089",
    needs_base=True,
    divides="normalize",
    parameters=(
        WEIGHT,
        SCALE,
        Parameter(
            "normalize", "bool", False, "Divide by the sum of the weights, which must not be 0."
        ),
        NAN,
        Parameter(
            "density", "float", 1.0, "Not used by this method.", scope="model", no_effect=True
        ),
        INT8_MASK,
        NO_RESCALE,
    ),
)

RECORDS = (LINEAR, TASK_ARITHMETIC)
