"""Searches with a name: which variables, ranges, sampler and budget a publication used."""

from __future__ import annotations

from typing import Any

from pymerge.config import MergeConfig
from pymerge.errors import RequestError, nearest

__all__ = ["PRESETS", "preset"]

_Settings = dict[str, Any]


def _pcb_es(merge: MergeConfig, where: str) -> _Settings:
    """PCB-Merging's evolutionary search (Du et al. 2024): a coefficient for each task vector.

    The paper names CMA-ES. Bounds and budget are those of the authors' code for language models;
    that for images searches in [0.8, 1.3] with 100 evaluations. The ratio is fixed there.
    """
    if merge.method.name != "pcb":
        raise RequestError(
            f"{where}: pcb_es searches the coefficients of pcb, and the merge is "
            f"{merge.method.name}"
        )
    return {
        "sampler": "cmaes",
        "parameters": {
            "models[*].parameters.weight": {"low": 0.5, "high": 3.0},
            "parameters.ratio": {"low": 0.02, "high": 0.4, "scale": "log"},
        },
        "budget": {"evaluations": 200},
    }


def _mergekit_evolve(merge: MergeConfig, where: str) -> _Settings:
    """mergekit-evolve's genome: weights (and densities) of each model for each group of layers.

    Step size 1/6 and 100 evaluations are its defaults; weights begin at 1/K and are not negative,
    densities begin at 1.
    """
    method = merge.method
    weight, density = method.parameter("weight"), method.parameter("density")
    if weight is None or weight.scope != "model":
        raise RequestError(f"{where}: mergekit_evolve searches weights, which {method.name} lacks")
    parameters: dict[str, Any] = {
        "models[*].parameters.weight": {
            "low": 0.0,
            "high": 1.0,
            "initial": 1.0 / len(merge.models),
            "groups": "thirds",
        }
    }
    if density is not None and density.scope == "model":
        parameters["models[*].parameters.density"] = {
            "low": 0.0,
            "high": 1.0,
            "initial": 1.0,
            "groups": "thirds",
        }
    return {
        "sampler": "cmaes",
        "parameters": parameters,
        "budget": {"evaluations": 100},
        "sigma": 1.0 / 6.0,
    }


PRESETS = {"pcb_es": _pcb_es, "mergekit_evolve": _mergekit_evolve}


def preset(name: str, merge: MergeConfig, where: str = "preset") -> _Settings:
    """Return the settings of a preset, of which a config may change any.

    Raises:
        RequestError: there is none of that name, or it is not for that method.
    """
    if name not in PRESETS:
        raise RequestError(
            f"{where}: expected one of {', '.join(PRESETS)}; got {name!r}{nearest(name, PRESETS)}"
        )
    return PRESETS[name](merge, where)
