"""`merges`: turns a signature and a docstring into the public function of a merge method.

These functions are `merge` with named arguments. All take models (tensors, lists of tensors or
state dicts, all alike), return the merged model in their structure, and raise RequestError (a
ValueError) as `merge` does. `weights` is one number for each model, or one for all; `scale` is the
scaling coefficient (lambda); `nan` is "error" or "keep"; `backend` and `dtype` are as in `merge`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from pymerge.merging.api import T, merge_by
from pymerge.merging.structures import Tensors
from pymerge.methods import MethodSpec, get

__all__ = ["Collected", "Numbers", "T", "merges"]

Numbers = float | Sequence[float]
Collected = Mapping[str, torch.Tensor] | Tensors

_Function = TypeVar("_Function", bound=Callable[..., Any])


def merges(method: str) -> Callable[[_Function], _Function]:
    """Return a decorator that lets a function without a body merge by a method.

    The names of its arguments say what they are:

        base                     the base; without it there is none
        models, or model         the fine-tuned models, or the only one
        weights                  or another spelling of the record's `weight`
        fishers, base_fisher     the statistics, where the record has some; or grams, base_gram
        backend, dtype           as in `merge`

    All others are parameters of the record. Messages begin with the function's name.

    Raises:
        TypeError: an argument is none of these.

    >>> @merges("linear")
    ... def mean(models: Sequence[T], *, backend: str | None = None, dtype: Any = None) -> T:
    ...     "Return the average."
    >>> mean([torch.tensor([1.0]), torch.tensor([3.0])])
    tensor([2.])
    """
    spec = get(method, "merges: method")

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function).parameters
        names, where = list(signature), function.__name__
        defaults = {p.name: p.default for p in signature.values() if p.default is not p.empty}
        weights = next((name for name in names if _is_weight(spec, name)), "")
        statistics = (f"{spec.statistics}s", f"base_{spec.statistics}")
        parameters = set(names) - {"base", "models", "model", "backend", "dtype", weights}
        parameters -= set(statistics)
        unknown = parameters - {parameter.name for parameter in spec.parameters}
        if unknown:
            raise TypeError(f"{where}: {method} has no parameter {', '.join(sorted(unknown))}")

        @wraps(function)
        def forward(*values: Any, **named: Any) -> Any:
            function(*values, **named)  # Python's own TypeError if they do not fit the signature
            given = defaults | dict(zip(names, values, strict=False)) | named
            return merge_by(
                spec,
                where,
                given.get("base"),
                given["models"] if "models" in given else [given["model"]],
                given.get(weights),
                given["backend"],
                given["dtype"],
                {name: given[name] for name in parameters},
                collected=(given.get(statistics[0]), given.get(statistics[1])),
                names=statistics,
            )

        return cast("_Function", forward)

    return decorate


def _is_weight(spec: MethodSpec, name: str) -> bool:
    parameter = spec.parameter(name)
    return name == "weights" or (parameter is not None and parameter.name == "weight")
