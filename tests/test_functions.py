"""The public functions of the methods: what `merges` makes of a signature and a record."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch

import pymerge
from pymerge.errors import RequestError
from pymerge.merging.functions import merges
from pymerge.methods import METHODS, REQUIRED, MethodSpec

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(pymerge, spec.function_name)
    for name, spec in METHODS.items()
    if spec.function_name in pymerge.__all__
}
BASE = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.3, 4.0, -1.0, 2.0]])
MODELS = [
    BASE + torch.tensor([[0.1, 0.0, -0.3, 0.2], [0.5, -0.4, 0.0, 0.1]]),
    BASE - torch.tensor([[0.2, -0.1, 0.1, 0.4], [0.0, 0.6, -0.2, 0.3]]),
]
# What has no default, and what makes the others do something here.
GIVEN: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.1},
    "tall_masks": {"task": 1},
    "emr": {"task": 0},
    "pcb": {"ratio": 0.5},
    "della": {"epsilon": 0.2},
    "arcee_fusion": {"semantics": "exact"},
}
# Arguments whose default is another than the record's, which speaks for configs too.
OTHERS = {("tall_masks", "task"), *((name, "seed") for name in METHODS)}


def arguments(name: str) -> list[str]:
    return list(inspect.signature(FUNCTIONS[name]).parameters)


def spelled(name: str, parameter: str) -> str:
    """Return what a function calls a parameter of its record."""
    if parameter != "weight":
        return parameter
    return "coefficients" if name == "pcb" else "weights"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_its_record_says(name: str) -> None:
    spec, given = METHODS[name], inspect.signature(FUNCTIONS[name]).parameters
    wanted = [p for p in spec.parameters if not p.no_effect and p.only is None and p.kind != "path"]
    assert {spelled(name, p.name) for p in wanted} <= set(given)
    for parameter in wanted:
        own = given[spelled(name, parameter.name)]
        if (name, parameter.name) in OTHERS or parameter.name == "weight":
            continue
        default = inspect.Parameter.empty if parameter.default is REQUIRED else parameter.default
        assert own.default == default, parameter.name
    assert ("model" in given) == (spec.max_models == 1)
    assert ("base" in given) == (spec.needs_base or spec.takes_base)
    assert list(given)[-2:] == ["backend", "dtype"] or name == "ties"


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if METHODS[n].statistics is None])
@pytest.mark.parametrize("positional", [True, False])
def test_a_function_is_merge_by_name(name: str, positional: bool) -> None:
    spec = METHODS[name]
    # Of the few elements here, the smallest densities would keep none.
    own = ({"density": 0.6} if "density" in arguments(name) else {}) | GIVEN.get(name, {})
    models = MODELS[: spec.max_models]
    base = BASE if "base" in arguments(name) else None
    weights = [0.3, 0.9][: len(models)] if spec.parameter("weight") else None
    expected = pymerge.merge(name, base, models, weights=weights, **own)
    assert not torch.equal(expected, BASE)
    first = {"base": base, "models": models, "model": models[0]}
    named = {spelled(name, "weight"): weights, **own}
    kinds = inspect.signature(FUNCTIONS[name]).parameters
    call = {n: v for n, v in {**first, **named}.items() if n in kinds}
    front = [n for n in kinds if positional and kinds[n].kind is kinds[n].POSITIONAL_OR_KEYWORD]
    values = [call.pop(n) for n in front]
    assert torch.equal(FUNCTIONS[name](*values, **call), expected)


@pytest.mark.parametrize("name", ["fisher", "gradient_matching"])
def test_a_function_with_statistics_is_merge_by_name(name: str) -> None:
    statistics = [model.square() for model in MODELS]
    base = BASE if METHODS[name].needs_base else None
    expected = pymerge.merge(name, base, MODELS, weights=[1, 2], statistics=statistics)
    first = [] if base is None else [base]
    assert torch.equal(FUNCTIONS[name](*first, MODELS, statistics, weights=[1, 2]), expected)
    if base is not None:
        own = FUNCTIONS[name](base, MODELS, statistics, weights=[1, 2], base_fisher=base.square())
        assert not torch.equal(own, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_what_its_module_says(name: str) -> None:
    function = FUNCTIONS[name]
    assert function.__name__ == METHODS[name].function_name
    assert (
        function.__module__ == f"{METHODS[name].run.partition(':')[0].rpartition('.')[0]}.functions"
    )
    assert function.__doc__
    assert pickle.loads(pickle.dumps(function)) is function
    assert get_type_hints(function).keys() == {*arguments(name), "return"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_messages_begin_with_the_function(name: str) -> None:
    own = {"models": [], "model": 3, "t": 0.5, "task": 0, "base": BASE}
    own |= {"fishers": [], "grams": []}
    call = {n: v for n, v in own.items() if n in arguments(name)}
    with pytest.raises(RequestError, match=f"^{METHODS[name].function_name}: models"):
        FUNCTIONS[name](**call)


def test_statistics_are_called_as_the_caller_does() -> None:
    with pytest.raises(RequestError, match=r"^regmean_merge: grams: expected a list of 2 gram"):
        pymerge.regmean_merge(MODELS, 3)  # pyright: ignore[reportArgumentType]


def test_what_does_not_fit_the_signature_is_an_error_of_python() -> None:
    with pytest.raises(
        TypeError, match=r"^slerp\(\) missing 1 required keyword-only argument: 't'"
    ):
        pymerge.slerp(BASE, MODELS[0])  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"^emr\(\) got an unexpected keyword argument 'tsak'"):
        pymerge.emr(BASE, MODELS, tsak=1)  # pyright: ignore[reportCallIssue]


def test_an_argument_that_the_record_lacks() -> None:
    def magnify(base: Any, models: Any, *, factor: float, backend: Any, dtype: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"^magnify: magmax has no parameter factor$"):
        merges("magmax")(magnify)
    with pytest.raises(RequestError, match="merges: method: unknown merge method 'magmx'"):
        merges("magmx")


def test_every_method_but_one_has_a_function() -> None:
    assert [name for name in METHODS if name not in FUNCTIONS] == ["adamerging"]
    assert all(isinstance(METHODS[name], MethodSpec) for name in FUNCTIONS)
