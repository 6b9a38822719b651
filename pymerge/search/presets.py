"""Named searches: the variables, ranges, sampler and budget that a publication used."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pymerge.config import MergeConfig
from pymerge.errors import RequestError, nearest
from pymerge.methods import METHODS

__all__ = ["PRESETS", "preset"]

_Settings = dict[str, Any]


def _mergekit_evolve(merge: MergeConfig, where: str) -> _Settings:
    """Return mergekit-evolve's genome: weights (and densities) of each model for each group.

    The groups are those of layers. Step size 1/6 and 100 evaluations are its defaults; weights
    begin at 1/K and are not negative, densities begin at 1.
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


# Searches that publications made for a method are in the method's record.
_PUBLISHED = {name: spec for spec in METHODS.values() for name in spec.searches}
PRESETS = (*_PUBLISHED, "mergekit_evolve")


def preset(name: str, merge: MergeConfig, where: str = "preset") -> _Settings:
    """Return the settings of a preset, any of which a config may change.

    Raises:
        RequestError: there is no such preset, or it is not for this method.
    """
    if name not in PRESETS:
        raise RequestError(
            f"{where}: expected one of {', '.join(PRESETS)}; got {name!r}{nearest(name, PRESETS)}"
        )
    if name not in _PUBLISHED:
        return _mergekit_evolve(merge, where)
    spec = _PUBLISHED[name]
    if merge.method is not spec:
        raise RequestError(
            f"{where}: {name} searches the coefficients of {spec.name}, and the merge is "
            f"{merge.method.name}"
        )
    return deepcopy(dict(spec.searches[name]))
