"""Records of the merges of sparse task vectors: DARE, Breadcrumbs, DELLA, Localize-and-Stitch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pymerge.engine.steps import MERGE, Step
from pymerge.engine.trim import TrimTarget
from pymerge.methods.parameters import INT8_MASK, NAN, NO_RESCALE, SCALE, SEED, WEIGHT, normalize
from pymerge.methods.spec import MethodSpec, Parameter, always

__all__ = ["RECORDS", "Sparse", "band_counts", "largest"]


class Sparse(NamedTuple):
    """What the family needs to know of a method: whether signs are elected."""

    elects: bool


_NORMS = Step("norms", "the norms of each task vector")
_THRESHOLDS = Step(
    "thresholds", "the thresholds of |delta| in each tensor that is trimmed", selects=True
)

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
        run="pymerge.methods.sparse.passes:run_dare",
        reads=_dare_reads,
        one_op=_dare_is_one_op,
        details=Sparse(elect),
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
        run="pymerge.methods.sparse.passes:run_breadcrumbs",
        reads=_breadcrumbs_reads,
        details=Sparse(elect),
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
            NO_RESCALE,
        ),
        yaml_defaults={"density": 1.0},
    )


def band_counts(total: int, density: float, gamma: float) -> tuple[int, int]:
    """Return how many of the smallest and of the largest magnitudes Breadcrumbs drops.

    int(density n) are kept below the int(gamma n) largest; if fewer are left, fewer of the largest
    are dropped. With density 1 nothing is.
    """
    if density >= 1.0:
        return 0, 0
    kept, top = int(density * total), int(gamma * total)
    bottom = max(0, total - kept - top)
    return bottom, total - bottom - kept


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
        run="pymerge.methods.sparse.passes:run_della",
        reads=_della_reads,
        details=Sparse(elect),
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


def largest(total: int, count: int, exact: bool = True) -> TrimTarget:
    """Return the trim that keeps the `count` largest of `total` magnitudes."""
    if count == 0:
        return TrimTarget("none")
    if count == total:
        return TrimTarget("all")
    return TrimTarget("rank", total - count + 1, exact=exact)


LOCALIZE_AND_STITCH = MethodSpec(
    name="localize_and_stitch",
    run="pymerge.methods.sparse.passes:run_localize_and_stitch",
    reads=lambda p, _numel, total: _localize_reads(p, total),
    spans_model=always,
    title="Localize-and-Stitch (dataless)",
    summary="Keeps each task vector's largest elements over the whole model; averages overlaps.",
    formula=(
        "theta = theta_0 + mean over {k: M_k} of tau_k, M_k the top density of |tau_k| over the "
        "whole model; theta_0 where no model keeps an element"
    ),
    source="He et al., Localize-and-Stitch, 2024",
    url="https://arxiv.org/abs/2408.13656",
    needs_base=True,
    passes="3 (a sample, the thresholds of |delta| over the whole model, the merge)",
    parameters=(
        Parameter(
            "density",
            "float",
            0.05,
            "Share of each task vector that is kept, over the whole model.",
            scope="model",
            minimum=0.0,
            maximum=1.0,
        ),
        NAN,
    ),
)


def _localize_reads(parameters: Mapping[str, Any], total: int) -> tuple[Step, ...]:
    if all(int(density * total) in (0, total) for density in parameters["density"]):
        return (MERGE,)
    thresholds = "the thresholds of |delta| over the whole model"
    return (
        Step("sample", "a sample of all tensors", "model"),
        Step("thresholds", thresholds, "model", selects=True),
        MERGE,
    )


def _dare_reads(parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    steps: list[Step] = []
    trims = parameters.get("trim") is not None
    if trims and parameters["trim_scope"] == "global":
        thresholds = "the thresholds of |delta| over the whole model"
        steps.append(Step("sample", "a sample of all tensors", "model"))
        steps.append(Step("thresholds", thresholds, "model", selects=True))
    if parameters["rescale"] == "l1":
        steps.append(_NORMS)
    if trims and parameters["trim_scope"] == "tensor":
        steps.append(_THRESHOLDS)
    return (*steps, MERGE)


def _dare_is_one_op(parameters: Mapping[str, Any]) -> bool:
    return parameters["rescale"] != "l1" and parameters.get("trim") is None


def _breadcrumbs_reads(parameters: Mapping[str, Any], numel: int, _total: int) -> tuple[Step, ...]:
    if parameters["scope"] == "row":
        return (MERGE,)
    shares = zip(parameters["density"], parameters["gamma"], strict=True)
    drops = any(band_counts(numel, *pair) != (0, 0) for pair in shares)
    return (_THRESHOLDS, MERGE) if drops else (MERGE,)


def _della_reads(parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    return (_NORMS, MERGE) if parameters["rescale"] == "l1" else (MERGE,)


RECORDS = (
    _dare(False),
    _dare(True),
    _breadcrumbs(False),
    _breadcrumbs(True),
    _della(True),
    _della(False),
    LOCALIZE_AND_STITCH,
)
