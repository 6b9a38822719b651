"""Records of the two weighted sums: `linear` (averaging) and `task_arithmetic`."""

from __future__ import annotations

from pymerge.methods.spec import MethodSpec, Parameter

__all__ = ["LINEAR", "NAN", "TASK_ARITHMETIC"]

NAN = Parameter(
    "nan",
    "str",
    "error",
    "What to do with NaN and infinity in an input: `error` names the model and the tensor and "
    "writes nothing; `keep` computes on and lets them reach the output.",
    choices=("error", "keep"),
    per_tensor=False,
)

LINEAR = MethodSpec(
    name="linear",
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
    title="Task arithmetic",
    summary="Adds scaled task vectors to the base; negative weights negate, and make analogies.",
    formula="theta = theta_0 + scale * sum_k w_k (theta_k - theta_0)   (/ sum_k w_k if normalize)",
    source="Ilharco et al., Editing Models with Task Arithmetic, 2023",
    url="https://arxiv.org/abs/2212.04089",
    needs_base=True,
    divides="normalize",
    parameters=(
        Parameter("weight", "float", 1.0, "Weight w_k of task vector k.", scope="model"),
        Parameter(
            "scale", "float", 1.0, "Scaling coefficient (lambda).", names=("lambda", "scale")
        ),
        Parameter(
            "normalize", "bool", False, "Divide by the sum of the weights, which must not be 0."
        ),
        NAN,
        Parameter(
            "density", "float", 1.0, "Not used by this method.", scope="model", no_effect=True
        ),
        Parameter("int8_mask", "bool", False, "Not needed: no mask is stored.", no_effect=True),
        Parameter("rescale", "bool", False, "mergekit's rescaling to the L1 norm.", only=False),
    ),
)
