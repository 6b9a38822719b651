"""Records of the methods that need norms and angles of whole tensors: one Gram matrix each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pymerge.engine.steps import MERGE, Step
from pymerge.methods.parameters import MERGEKIT, NAN
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter, always

__all__ = ["RECORDS"]


def _reads(_parameters: Mapping[str, Any], _numel: int, _total: int) -> tuple[Step, ...]:
    return Step("gram", "norms and dot products of each tensor"), MERGE


_direction = partial(
    MethodSpec,
    run="pymerge.methods.directions.passes:run",
    reads=_reads,
    passes="2 (norms and dot products, then a weighted sum)",
)
_WEIGHT = Parameter("weight", "float", 1.0, "Weight of model k.", scope="model")

SLERP = _direction(
    name="slerp",
    title="SLERP",
    summary="Interpolates between the base and one model along the arc between them.",
    formula=(
        "theta = sin((1 - t) phi) / sin(phi) theta_0 + sin(t phi) / sin(phi) theta_1, phi the "
        "angle of the two; linear where |cos phi| > 0.9995"
    ),
    source="Shoemake, Animating rotation with quaternion curves, 1985; as in mergekit",
    url="https://doi.org/10.1145/325334.325242",
    needs_base=True,
    max_models=1,
    parameters=(
        Parameter("t", "float", REQUIRED, "0 gives the base, 1 the model."),
        NAN,
    ),
)

NUSLERP = _direction(
    name="nuslerp",
    title="NuSLERP",
    summary="SLERP of two models by weights; of their task vectors where a base is given.",
    formula="slerp(theta_1, theta_2) at t = w_2 / (w_1 + w_2), or theta_0 + slerp(tau_1, tau_2)",
    source="mergekit",
    url=MERGEKIT,
    needs_base=False,
    takes_base=True,
    min_models=2,
    max_models=2,
    parameters=(
        _WEIGHT,
        Parameter(
            "flatten",
            "bool",
            True,
            "One angle for a whole tensor; false: one for each row, a vector of the last "
            "dimension.",
            names=("nuslerp_flatten", "flatten"),
        ),
        Parameter(
            "nuslerp_row_wise",
            "bool",
            False,
            "mergekit's: true takes one angle for each column, in spite of its name.",
            only=False,
        ),
        NAN,
    ),
)

MULTISLERP = _direction(
    name="multislerp",
    title="MultiSLERP",
    summary="Weighted mean of directions on the sphere, by one step in its tangent space.",
    formula=(
        "u_k = x_k / |x_k|; m = sum w_k u_k / |.|; "
        "exp_m(sum w_k (u_k - <u_k, m> m)) * sum w_k |x_k|"
    ),
    source="mergekit",
    url=MERGEKIT,
    needs_base=False,
    takes_base=True,
    divides="normalize_weights",
    parameters=(
        _WEIGHT,
        Parameter("normalize_weights", "bool", True, "Divide the weights by their sum."),
        Parameter(
            "epsilon", "float", 1e-8, "Floor of norms.", minimum=0.0, names=("eps", "epsilon")
        ),
        NAN,
    ),
)

KARCHER = _direction(
    name="karcher",
    title="Karcher mean",
    summary="Mean of the models' directions on the sphere, times the mean of their norms.",
    formula="argmin_u sum_k angle(u, x_k)^2, by the log and exp maps; times mean |x_k|",
    source="Karcher, Riemannian center of mass, 1977; as in mergekit",
    url="https://doi.org/10.1002/cpa.3160300502",
    needs_base=False,
    parameters=(
        Parameter("max_iter", "int", 10, "Most iterations.", minimum=1),
        Parameter("tol", "float", 1e-5, "Ends when the step is shorter.", minimum=0.0),
        NAN,
    ),
)

MODEL_STOCK = _direction(
    name="model_stock",
    title="Model Stock",
    summary="Between the base and the average, by the angle between the task vectors.",
    formula=(
        "theta = t mean_k theta_k + (1 - t) theta_0, t = K cos / (1 + (K - 1) cos), per tensor"
    ),
    source="Jang et al., Model Stock, 2024",
    url="https://arxiv.org/abs/2403.19522",
    needs_base=True,
    min_models=2,
    parameters=(
        Parameter(
            "angle",
            "str",
            "cosine",
            "The mean over pairs: of cosines (mergekit), or of angles (FusionBench).",
            choices=("cosine", "angle"),
        ),
        Parameter(
            "filter_wise",
            "bool",
            False,
            "One ratio for each row, a vector of the last dimension; false: one for a tensor.",
        ),
        NAN,
    ),
)

PASSTHROUGH = MethodSpec(
    name="passthrough",
    run="pymerge.methods.directions.passes:run",
    one_op=always,
    title="Passthrough",
    summary="Copies one model, scaled if asked.",
    formula="theta = scale * theta_1",
    source="mergekit",
    url=MERGEKIT,
    needs_base=False,
    max_models=1,
    parameters=(
        Parameter("scale", "float", 1.0, "Factor.", scope="model"),
        NAN,
    ),
)

RECORDS = (MODEL_STOCK, SLERP, NUSLERP, MULTISLERP, KARCHER, PASSTHROUGH)
