"""The configuration of a search: the error for each wrong key."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pymerge import RequestError
from pymerge.search.config import load_search

_PATH = "models[*].parameters.weight"
_GOOD: dict[str, Any] = {
    "merge": {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")],
    },
    "metric": "somewhere:metric",
    "data": {"search": "validation", "report": "test"},
    "sampler": "random",
    "budget": {"evaluations": 3},
    "parameters": {_PATH: {"low": 0, "high": 1}},
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("merge",), None, "merge: expected a path or a mapping, got nothing"),
        (("metric",), 3, "metric: expected package.module:function, got 3"),
        (("arguments",), [1], "arguments: expected a mapping, got a list"),
        (("data",), None, "data: expected {search: ..., report: ...}, got nothing"),
        (("data", "search"), 3, "data.search: expected a text or a mapping, got 3"),
        (("data", "serch"), "x", "data.serch: unknown key; did you mean 'search'? (known: search,"),
        (("budget",), 1.5, "budget: expected an integer, or {evaluations: ..., seconds: ...}, got"),
        (("budget", "evaluations"), 1.5, "budget.evaluations: expected an integer, got 1.5"),
        (("budget", "seconds"), "x", "budget.seconds: expected a number, got 'x'"),
        (("seed",), -1, "seed: expected an integer >= 0 and below 2^63, got -1"),
        (("sigma",), 3, "sigma: expected a number above 0 and at most 1, got 3"),
        (("sigma",), True, "sigma: expected a number above 0 and at most 1, got True"),
        (("population",), 2, "population: expected an integer >= 3, got 2"),
        (("workers",), 0, "workers: expected an integer >= 1, got 0"),
        (("executor",), "fork", "executor: expected threads or processes, got 'fork'"),
        (("direction",), "up", "direction: expected maximize or minimize, got 'up'"),
        (("allow_test_split",), "no", "allow_test_split: expected true or false, got 'no'"),
        (("preset",), 3, "preset: expected a text, got 3"),
        (("bugdet",), 3, "bugdet: unknown key; did you mean 'budget'?"),
        (("parameters",), [1], "parameters: expected a mapping of paths, got a list"),
        (("parameters", _PATH), 3, f"parameters.{_PATH}: expected a list of numbers, null, or a"),
        (("parameters", _PATH, "low"), "0", f"{_PATH}.low: expected a number, got '0'"),
        (("parameters", _PATH, "low"), False, f"{_PATH}.low: expected a number, got False"),
        (("parameters", _PATH, "low"), math.nan, f"{_PATH}.low: expected a number, got nan"),
        (("budget", "seconds"), math.nan, "budget.seconds: expected a number, got nan"),
        (
            ("parameters", _PATH, "scale"),
            "exp",
            f"{_PATH}.scale: expected linear or log, got 'exp'",
        ),
        (("parameters", _PATH, "groups", "a"), 1, f"{_PATH}.groups.a: expected a text, got 1"),
        (("parameters", _PATH, "lwo"), 1, f"{_PATH}.lwo: unknown key; did you mean 'low'? (known:"),
    ],
)
def test_what_is_wrong_is_told_once_with_its_line(
    tmp_path: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    config = deepcopy(_GOOD)
    inner: Any = config
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    file = tmp_path / "search.yml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(RequestError) as caught:
        load_search(file)
    assert len(caught.value.problems) == 1
    (problem,) = caught.value.problems
    assert message in problem
    line = re.match(r".*search\.yml:(\d+): ", problem)
    assert line is not None
    assert path[-1] in file.read_text().splitlines()[int(line.group(1)) - 1]


def test_a_wrong_item_of_a_list_has_its_place() -> None:
    parameters = {_PATH: [0.1, "x"]}
    with pytest.raises(RequestError) as caught:
        load_search(_GOOD | {"parameters": parameters})
    (problem,) = caught.value.problems
    assert problem.endswith(f"parameters.{_PATH}[1]: expected a number, got 'x'")


def test_numbers_stay_what_they_are() -> None:
    config = deepcopy(_GOOD)
    config["parameters"][_PATH] = {"values": [0, 0.5, 1]}
    config["sigma"] = 1
    found = load_search(config)
    values = found.parameters[_PATH]["values"]
    assert [type(one) for one in values] == [int, float, int]
    assert found.sigma == 1


def test_all_that_is_missing_is_told() -> None:
    with pytest.raises(RequestError) as caught:
        load_search({"bugdet": 3, "seed": "x"})
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in (
        "merge: is missing",
        "data: is missing; say which",
        "bugdet: unknown",
        "seed: exp",
    ):
        assert part in problems
