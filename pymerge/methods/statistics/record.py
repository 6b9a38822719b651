"""Records of the methods that weight parameters by statistics of data, and their dialects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pymerge.engine.steps import MERGE, Step
from pymerge.methods.parameters import NAN
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter

__all__ = [
    "FISHER_DIALECTS",
    "RECORDS",
    "REGMEAN_DIALECTS",
    "FisherRule",
    "fisher_rule",
    "off_diagonal_of",
]

_ON_TORCH = ("reference",)

_STATISTICS = Parameter(
    "statistics",
    "path",
    REQUIRED,
    "What was collected from data of model k.",
    scope="model",
    per_tensor=False,
)


def _weight(doc: str) -> Parameter:
    return Parameter("weight", "float", 1.0, doc, scope="model", minimum=0.0)


def _check_weights(parameters: Mapping[str, Any]) -> list[str]:
    weights = [float(weight) for weight in parameters["weight"]]
    if any(weights):
        return []
    return [f"all weights are 0 ({weights}): nothing is left to merge; give at least one above 0"]


class FisherRule(NamedTuple):
    """How Fisher information becomes a weight.

    floor, floor_rule: "max" takes max(F, floor), "max_first" does so for the first model only,
        "add" takes F + floor.
    normalize: by the L2 norm of a model's Fisher: "global" over the model, "tensor", or "none".
    """

    floor: float
    floor_rule: str
    normalize: str


FISHER_DIALECTS: dict[str, FisherRule] = {
    "official": FisherRule(1e-6, "max_first", "global"),
    "mergelm": FisherRule(1e-6, "add", "global"),
    "fusionbench": FisherRule(1e-6, "add", "global"),
    "mats": FisherRule(1e-8, "max", "none"),
}


def fisher_rule(parameters: Mapping[str, Any]) -> FisherRule:
    """Return the dialect's rule, overridden by the given parameters."""
    dialect = FISHER_DIALECTS[parameters["semantics"]]
    given = {name: parameters[name] for name in ("floor", "floor_rule", "normalize")}
    return FisherRule(
        **{
            name: getattr(dialect, name) if value is None else value
            for name, value in given.items()
        }
    )


def _fisher_reads(parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    normalize = fisher_rule(parameters).normalize
    if normalize == "none":
        return (MERGE,)
    # Norms are computed before the merge, over all tensors.
    return Step(
        "norms", "norms", "model" if normalize == "global" else "tensor", statistics=True
    ), MERGE


FISHER = MethodSpec(
    name="fisher",
    function="fisher_merge",
    run="pymerge.methods.statistics.passes:run_fisher",
    reads=_fisher_reads,
    title="Fisher merging",
    summary="Weighs each parameter of each model by its diagonal Fisher information.",
    formula="theta = sum_k c_k F_k theta_k / sum_k c_k F_k, c_k = weight_k / |F_k|",
    source="Matena and Raffel, Merging Models with Fisher-Weighted Averaging, 2022",
    url="https://arxiv.org/abs/2111.09832",
    needs_base=False,
    passes="1 (one more over the statistics where they are normalized)",
    backends=_ON_TORCH,
    torch_because="elementwise in float64, by torch, tile by tile",
    statistics="fisher",
    check=_check_weights,
    parameters=(
        _STATISTICS,
        _weight("Weight of model k, beside its Fisher information."),
        Parameter(
            "semantics",
            "str",
            "official",
            "Whose floor and normalization: see docs/methods.md.",
            choices=tuple(FISHER_DIALECTS),
            per_tensor=False,
        ),
        Parameter(
            "floor",
            "float",
            None,
            "Least Fisher information.",
            minimum=0.0,
            default_doc="1e-6; mats 1e-8",
        ),
        Parameter(
            "floor_rule",
            "str",
            None,
            "max(F, floor) of all models (max) or of the first (max_first), or F + floor (add).",
            choices=("max", "max_first", "add"),
            default_doc="max_first; mergelm and fusionbench add; mats max",
        ),
        Parameter(
            "normalize",
            "str",
            None,
            "Divide each model's Fisher information by its L2 norm over the model (global, true), "
            "over each tensor, or not (none, false).",
            choices=("global", "tensor", "none"),
            booleans=("global", "none"),
            per_tensor=False,
            default_doc="global; mats none",
        ),
        NAN,
    ),
)

REGMEAN_DIALECTS: dict[str, float] = {"official": 1.0, "mergelm": 1.0, "fusionbench": 0.95}


def off_diagonal_of(parameters: Mapping[str, Any]) -> float:
    """Return the factor of off-diagonal elements: the given one, or the dialect's."""
    given = parameters["off_diagonal"]
    return float(REGMEAN_DIALECTS[parameters["semantics"]] if given is None else given)


def _regmean_reads(_parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    return Step("sums", "sums of Gram matrices", statistics=True), MERGE


REGMEAN = MethodSpec(
    name="regmean",
    function="regmean_merge",
    run="pymerge.methods.statistics.passes:run_regmean",
    reads=_regmean_reads,
    title="RegMean",
    summary="Linear layers: least squares on each model's own activations; the rest is averaged.",
    formula="W = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k, G_k = X_k^T X_k, W_k [in, out]",
    source="Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2023",
    url="https://arxiv.org/abs/2212.09849",
    needs_base=False,
    passes="1 (two over the statistics)",
    backends=_ON_TORCH,
    torch_because="linear systems of whole matrices, by torch.linalg",
    statistics="gram",
    check=_check_weights,
    parameters=(
        _STATISTICS,
        _weight("Weight of model k, a factor of its Gram matrices."),
        Parameter(
            "semantics",
            "str",
            "official",
            "Whose off_diagonal: see docs/methods.md.",
            choices=tuple(REGMEAN_DIALECTS),
            per_tensor=False,
        ),
        Parameter(
            "off_diagonal",
            "float",
            None,
            "Factor of what is off the diagonal of a Gram matrix; 0 leaves the diagonal only.",
            minimum=0.0,
            maximum=1.0,
            default_doc="1 (the authors' -1: off); fusionbench 0.95",
        ),
        Parameter(
            "ridge",
            "float",
            0.0,
            "Added to the diagonal of every Gram matrix, as a share of their mean diagonal.",
            minimum=0.0,
        ),
        NAN,
    ),
)

GRADIENT_MATCHING = MethodSpec(
    name="gradient_matching",
    run="pymerge.methods.statistics.passes:run_gradient_matching",
    title="Uncertainty-based gradient matching",
    summary="Adds task vectors, each preconditioned by the squared gradients of its task.",
    formula=(
        "theta = theta_0 + s sum_k (a_k H_k + s_0 H_0 + d) (theta_k - theta_0) / "
        "(sum_k s a_k H_k + s_0 H_0 + d)"
    ),
    source="Daheim et al., Model Merging by Uncertainty-Based Gradient Matching, 2024",
    url="https://arxiv.org/abs/2310.12808",
    needs_base=True,
    backends=_ON_TORCH,
    torch_because="elementwise in float64, by torch, tile by tile",
    statistics="fisher",
    check=_check_weights,
    parameters=(
        _STATISTICS,
        Parameter(
            "base_statistics",
            "path",
            None,
            "Squared gradients of the base, H_0.",
            per_tensor=False,
            default_doc="none: H_0 is 0",
        ),
        _weight("Weight a_k of the squared gradients of model k; the authors' example: how many."),
        Parameter(
            "scale",
            "float",
            1.0,
            "Scaling coefficient (s, lambda).",
            names=("lambda", "scale"),
            minimum=0.0,
        ),
        Parameter("base_weight", "float", 1.0, "Weight s_0 of the base's.", minimum=0.0),
        Parameter("delta", "float", 0.0, "Added to all (d, delta_0).", minimum=0.0),
        NAN,
    ),
)

RECORDS = (FISHER, REGMEAN, GRADIENT_MATCHING)
