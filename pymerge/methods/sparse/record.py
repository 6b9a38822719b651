"""Records of the merges of sparse task vectors: DARE and Breadcrumbs, with or without election."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.methods.spec import MethodSpec, Parameter
from pymerge.methods.sums.record import NAN

__all__ = ["BREADCRUMBS", "BREADCRUMBS_TIES", "DARE_LINEAR", "DARE_TIES", "band_counts"]

WEIGHT = Parameter("weight", "float", 1.0, "Weight w_k of task vector k.", scope="model")
SCALE = Parameter("scale", "float", 1.0, "Scaling coefficient (lambda).", names=("lambda", "scale"))
INT8_MASK = Parameter("int8_mask", "bool", False, "Not needed: no mask is stored.", no_effect=True)
SEED = Parameter(
    "seed",
    "int",
    None,
    "Seed of the random masks; a mask depends on it, on the tensor's name, the model's number and "
    "the element's index, and on nothing else.",
    minimum=0,
    maximum=2**63 - 1,
    per_tensor=False,
    default_doc="0; in YAML, --seed",
)


def normalize(elect: bool) -> Parameter:
    divided = "the weights of the models that agree" if elect else "the weights, not 0"
    return Parameter("normalize", "bool", False, f"Divide by the sum of {divided}.")


_TRIM = (
    Parameter(
        "trim",
        "float",
        None,
        "After dropping, keep this share of the elements, the largest, as TIES does; none: all "
        "that was drawn.",
        minimum=0.0,
        maximum=1.0,
        per_tensor=False,
        default_doc="none (mergekit, PEFT); the authors trim",
    ),
    Parameter(
        "trim_scope",
        "str",
        "tensor",
        "Trim tensor by tensor (exactly so many) or over the whole model (all at or above the "
        "threshold).",
        choices=("tensor", "global"),
        per_tensor=False,
    ),
)


def _check_trim(parameters: Mapping[str, Any]) -> list[str]:
    trimmed = parameters["trim"] is not None and parameters["trim_scope"] == "global"
    if trimmed and parameters["rescale"] == "l1":
        return [
            "trim_scope global compares magnitudes of all tensors; rescale must be inv_keep or "
            "none, got l1, whose factors differ between tensors"
        ]
    return []


def _dare(elect: bool) -> MethodSpec:
    return MethodSpec(
        name="dare_ties" if elect else "dare_linear",
        title="DARE with sign election" if elect else "DARE",
        summary=(
            "Drops task vector elements at random, rescales the rest, elects signs, adds up."
            if elect
            else "Drops task vector elements at random, rescales the rest, and adds them up."
        ),
        formula=(
            "theta = theta_0 + scale * sum_k w_k f_k M_k (theta_k - theta_0), M_k ~ "
            "Bernoulli(density), f_k = 1 / density"
            + ("; the sum over {k: sgn = elected sign}" if elect else "")
        ),
        source="Yu et al., Language Models are Super Mario (DARE), 2024",
        url="https://arxiv.org/abs/2311.03099",
        needs_base=True,
        passes="1 (2 with rescale: l1 or trim)" if elect else "1 (2 with rescale: l1)",
        divides=None if elect else "normalize",
        parameters=(
            WEIGHT,
            Parameter(
                "density",
                "float",
                0.5,
                "Share of each task vector that is kept, at random (1 - drop rate).",
                scope="model",
                minimum=0.0,
                maximum=1.0,
                default_doc="0.5; 1.0 in YAML, as in mergekit",
            ),
            Parameter(
                "rescale",
                "str",
                "inv_keep",
                "What is kept is multiplied by 1 / density (inv_keep: the paper), by the ratio of "
                "the L1 norms before and after (l1: mergekit's true), or not at all (none: "
                "mergekit's false).",
                choices=("inv_keep", "l1", "none"),
                booleans=("l1", "none"),
                default_doc="inv_keep; l1 in YAML, as in mergekit",
            ),
            SCALE,
            normalize(elect),
            *(_TRIM if elect else ()),
            SEED,
            NAN,
            INT8_MASK,
        ),
        check=_check_trim if elect else None,
        yaml_defaults={"density": 1.0, "rescale": "l1"},
    )


def _breadcrumbs(elect: bool) -> MethodSpec:
    return MethodSpec(
        name="breadcrumbs_ties" if elect else "breadcrumbs",
        title="Model Breadcrumbs with sign election" if elect else "Model Breadcrumbs",
        summary=(
            "Drops the largest and the smallest elements, elects signs, adds up."
            if elect
            else "Drops the largest and the smallest elements of task vectors, adds up the rest."
        ),
        formula=(
            "theta = theta_0 + scale * sum_k w_k band_{density, gamma}(theta_k - theta_0)"
            + ("; the sum over {k: sgn = elected sign}" if elect else "")
        ),
        source="Davari and Belilovsky, Model Breadcrumbs, 2024",
        url="https://arxiv.org/abs/2312.06795",
        needs_base=True,
        passes="2 (order statistics of |delta|, then the merge)",
        divides=None if elect else "normalize",
        parameters=(
            WEIGHT,
            Parameter(
                "density",
                "float",
                0.9,
                "Share of each tensor's task vector that is kept.",
                scope="model",
                minimum=0.0,
                maximum=1.0,
                default_doc="0.9; 1.0 in YAML, as in mergekit",
            ),
            Parameter(
                "gamma",
                "float",
                0.01,
                "Share of each tensor's largest magnitudes that is dropped.",
                scope="model",
                minimum=0.0,
                maximum=1.0,
            ),
            SCALE,
            normalize(elect),
            Parameter(
                "scope",
                "str",
                "tensor",
                "What shares are of: a tensor (mergekit), or each row of its last dimension (the "
                "authors' code).",
                choices=("tensor", "row"),
                per_tensor=False,
            ),
            NAN,
            INT8_MASK,
            Parameter("rescale", "bool", False, "mergekit's rescaling to the L1 norm.", only=False),
        ),
        yaml_defaults={"density": 1.0},
    )


DARE_LINEAR, DARE_TIES = _dare(False), _dare(True)
BREADCRUMBS, BREADCRUMBS_TIES = _breadcrumbs(False), _breadcrumbs(True)


def band_counts(total: int, density: float, gamma: float) -> tuple[int, int]:
    """Return how many of the smallest and of the largest magnitudes Breadcrumbs drops.

    int(density n) are kept below the int(gamma n) largest; where that is more than there are, fewer
    of the largest are dropped. With density 1 nothing is.
    """
    if density >= 1.0:
        return 0, 0
    kept, top = int(density * total), int(gamma * total)
    bottom = max(0, total - kept - top)
    return bottom, total - bottom - kept
