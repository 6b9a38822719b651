"""The record of AdaMerging with coefficients that were learned before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymerge.engine.steps import MERGE, Step
from pymerge.errors import RequestError, nearest
from pymerge.methods.parameters import NAN
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter
from pymerge.methods.ties.record import ties_reads

__all__ = ["RECORDS"]


def _for_tensor(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what the engine needs for one tensor: weights, and how to trim."""
    from pymerge.methods.adamerging.coefficients import read_coefficients

    path = parameters["coefficients"]
    found = read_coefficients(path)
    weights = parameters["weight"]
    if len(weights) != len(found.models):
        raise RequestError(
            f"coefficients: {path} has those of {len(found.models)} models "
            f"({', '.join(found.models)}), but {len(weights)} are given"
        )
    fixed = name in found.fixed
    if not fixed and name not in found.rows:
        raise RequestError(
            f"coefficients: {path} has none for tensor {name!r}{nearest(name, found.rows)}"
        )
    own = (0.0,) * len(weights) if fixed else found.rows[name]
    result = dict(parameters) | {
        "weight": [w * x for w, x in zip(weights, own, strict=True)],
        "scale": 1.0,
        "normalize": False,
        "fixed": fixed,
    }
    if found.trimmed:
        result |= {
            "semantics": "adamerging",
            "weighting": "after",
            "density": [found.density] * len(weights),
            **dict.fromkeys(("scope", "merge", "exact_k", "elect", "normalize")),
        }
    return result


def _reads(parameters: Mapping[str, Any], numel: int, total: int) -> tuple[Step, ...]:
    return ties_reads(parameters, numel, total) if "weighting" in parameters else (MERGE,)


ADAMERGING = MethodSpec(
    name="adamerging",
    function=None,  # a config's method alone; `AdaMerging` learns the coefficients
    run="pymerge.methods.adamerging.passes:run",
    reads=_reads,
    title="AdaMerging (learned coefficients)",
    summary="Adds task vectors with a coefficient for each model and tensor, read from a file.",
    formula=(
        "theta^l = theta_0^l + sum_k w_k lambda_k^l tau_k^l, tau_k = theta_k - theta_0, or what "
        "TIES keeps of it (++)"
    ),
    source="Yang et al., AdaMerging, 2024",
    url="https://arxiv.org/abs/2310.02575",
    needs_base=True,
    passes="1; 2 with trimmed task vectors",
    parameters=(
        Parameter(
            "coefficients",
            "str",
            REQUIRED,
            "File of coefficients, from AdaMerging.save_coefficients or `pymerge ada`.",
            per_tensor=False,
        ),
        Parameter("weight", "float", 1.0, "Multiplies the coefficients of model k.", scope="model"),
        NAN,
    ),
    for_tensor=_for_tensor,
)

RECORDS = (ADAMERGING,)
