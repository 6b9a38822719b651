"""Records of the methods that look at more than an element: ranks, variances, masks, matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.methods.sparse.record import INT8_MASK, SCALE, SEED, WEIGHT, normalize
from pymerge.methods.spec import MethodSpec, Parameter
from pymerge.methods.sums.record import NAN

__all__ = [
    "ARCEE_FUSION",
    "DELLA",
    "DELLA_LINEAR",
    "EMR",
    "RAMPLUS_TL",
    "SCE",
    "TALL_MASKS",
    "TSV_M",
]

_ON_TORCH = ("reference",)
_MERGEKIT = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"


def _check_della(parameters: Mapping[str, Any]) -> list[str]:
    problems = []
    for k, (density, epsilon) in enumerate(
        zip(parameters["density"], parameters["epsilon"], strict=True)
    ):
        if density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
            problems.append(
                f"density +- epsilon of model {k} must lie in (0, 1), got {density:g} +- "
                f"{epsilon:g}"
            )
    return problems


def _della(elect: bool) -> MethodSpec:
    normal = normalize(elect)
    return MethodSpec(
        name="della" if elect else "della_linear",
        title="DELLA" if elect else "DELLA without election",
        summary=(
            "Drops elements at random, small ones of a row more often, rescales, elects signs."
            if elect
            else "Drops elements at random, small ones of a row more often, rescales, adds up."
        ),
        formula=(
            "keep with P = density - epsilon + 2 epsilon (rank - 1) / (columns - 1), rank of "
            "|tau| in its row; tau / P (per_element) or tau |tau|_1 / |kept|_1 (l1)"
        ),
        source="Deep et al., DELLA-Merging, 2024",
        url="https://arxiv.org/abs/2406.11617",
        needs_base=True,
        passes="1 (2 with rescale: l1)",
        divides=None if elect else "normalize",
        check=_check_della,
        parameters=(
            WEIGHT,
            Parameter(
                "density",
                "float",
                0.7,
                "Mean probability with which an element is kept.",
                scope="model",
                minimum=0.0,
                maximum=1.0,
                default_doc="0.7; 1.0 in YAML, as in mergekit",
            ),
            Parameter(
                "epsilon",
                "float",
                0.07,
                "Half of the spread of the probabilities within a row; density +- epsilon must "
                "lie in (0, 1), unless density is 1.",
                scope="model",
                minimum=0.0,
                maximum=0.5,
                default_doc="0.07 (the authors' window 0.14); 0.15 in YAML, as in mergekit",
            ),
            Parameter(
                "rescale",
                "str",
                "per_element",
                "What is kept is divided by its own probability (per_element: the authors), "
                "multiplied by the ratio of the L1 norms (l1: mergekit's true), or not at all.",
                choices=("per_element", "l1", "none"),
                booleans=("l1", "none"),
                default_doc="per_element; l1 in YAML, as in mergekit",
            ),
            SCALE,
            Parameter(
                "normalize",
                "bool",
                elect,
                normal.doc,
            ),
            SEED,
            NAN,
            INT8_MASK,
        ),
        yaml_defaults={"density": 1.0, "epsilon": 0.15, "rescale": "l1"},
    )


DELLA, DELLA_LINEAR = _della(True), _della(False)

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

ARCEE_FUSION = MethodSpec(
    name="arcee_fusion",
    title="Arcee Fusion",
    summary="Takes the elements of the model that changed most and matter most.",
    formula=(
        "importance = |tau| KL(softmax(theta_1) || softmax(theta_0)) by row; theta_1 where "
        "importance >= median + 1.5 IQR, else theta_0"
    ),
    source="mergekit",
    url=_MERGEKIT,
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

RAMPLUS_TL = MethodSpec(
    name="ramplus_tl",
    title="RAM+ (tensor level)",
    summary="RAM, with what only one model changed scaled up by how much it shares elsewhere.",
    formula="as ram; unique elements times 1 + r clip(shared_k / unique_k, 0, alpha)",
    source="mergekit",
    url=_MERGEKIT,
    needs_base=True,
    passes="2 (what each model changed, then the merge)",
    parameters=(
        Parameter("r", "float", 0.1, "Strength of the rescaling.", minimum=0.0),
        Parameter("alpha", "float", 0.2, "Most of the ratio that counts.", minimum=0.0),
        Parameter("epsilon", "float", 1e-5, "Magnitude above which an element counts as changed."),
        NAN,
    ),
)

EMR = MethodSpec(
    name="emr",
    title="EMR-Merging",
    summary="One unified task vector of elected signs and largest magnitudes; a mask per task.",
    formula=(
        "unified = sgn(sum tau) max{|tau_k| : sgn tau_k = sgn sum tau}; task k: theta_0 + "
        "rescale_k [tau_k unified > 0] unified"
    ),
    source="Huang et al., EMR-Merging, 2024",
    url="https://arxiv.org/abs/2405.17461",
    needs_base=True,
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

TALL_MASKS = MethodSpec(
    name="tall_masks",
    title="TALL masks",
    summary="The part of a merge that matters to one task: compressed fine-tuned models.",
    formula=(
        "theta_0 + [|tau_k| > threshold |theta_0 + scale sum_j tau_j - theta_k|] scale sum_j tau_j"
    ),
    source="Wang et al., Localizing Task Information (TALL masks, Consensus), 2024",
    url="https://arxiv.org/abs/2405.07813",
    needs_base=True,
    parameters=(
        Parameter("task", "int", 0, "Number of the model, from 0.", minimum=0, per_tensor=False),
        Parameter("threshold", "float", 0.4, "lambda of the mask.", minimum=0.0),
        Parameter(
            "scale", "float", 0.3, "Scaling coefficient (lambda).", names=("lambda", "scale")
        ),
        NAN,
    ),
)

TSV_M = MethodSpec(
    name="tsv_m",
    title="TSV-M (task singular vectors)",
    summary="Keeps the leading singular vectors of each task's matrices, made orthogonal.",
    formula=(
        "tau_k = U_k S_k V_k; keep 1/K of the rank; theta = theta_0 + scale * orth(U) S orth(V); "
        "other shapes: the mean of tau_k"
    ),
    source="Gargiulo et al., Task Singular Vectors, 2025",
    url="https://arxiv.org/abs/2412.00081",
    needs_base=True,
    backends=_ON_TORCH,
    torch_because="singular vectors of whole matrices, by torch.linalg",
    parameters=(
        Parameter("scale", "float", 1.0, "Scaling coefficient.", names=("lambda", "scale")),
        NAN,
    ),
)
