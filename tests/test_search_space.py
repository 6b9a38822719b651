"""What can be searched: paths, ranges, groups, and the configurations that values make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pymerge import RequestError
from pymerge.config import load_config
from pymerge.search.groups import filters_of, group_tensors
from pymerge.search.samplers import cmaes_points, grid_points, random_points
from pymerge.search.space import Domain, Space, make_space
from tests import models as toys

LAYERS = [f"model.layers.{n}.{part}.weight" for n in range(12) for part in ("attn", "mlp")]
NAMES = ["model.embed.weight", *LAYERS, "model.norm.weight"]


def merge(method: str = "ties", **parameters: Any) -> dict[str, Any]:
    return toys.config(Path("."), method, 3, **parameters)


def space(parameters: Mapping[str, Any], **more: Any) -> Space:
    return make_space(merge(**more), parameters, NAMES)


def values_of(found: Space, values: Mapping[str, float], parameter: str) -> dict[str, Any]:
    config = load_config(found.config(values))
    return {name: config.resolve(name)[parameter] for name in NAMES}


# domains


@pytest.mark.parametrize(
    ("domain", "places"),
    [
        (Domain(-1.0, 3.0), {0.0: -1.0, 0.5: 1.0, 1.0: 3.0}),
        (Domain(0.01, 1.0, log=True), {0.0: 0.01, 0.5: 0.1, 1.0: 1.0}),
        (Domain(1, 4, integer=True), {0.0: 1, 0.24: 1, 0.26: 2, 0.99: 4, 1.0: 4}),
        (Domain(1, 9, values=(1.0, 2.0, 9.0)), {0.0: 1, 0.34: 2, 0.67: 9, 1.0: 9}),
    ],
)
def test_places_in_the_unit_interval(domain: Domain, places: dict[float, float]) -> None:
    for place, value in places.items():
        assert domain.at(place) == pytest.approx(value)
        assert domain.at(domain.unit(value)) == pytest.approx(value)
    assert domain.at(-3.0) == pytest.approx(min(places.values()))
    assert domain.at(7.0) == pytest.approx(max(places.values()))


def test_grids() -> None:
    assert Domain(0.0, 1.0).grid(3) == [0.0, 0.5, 1.0]
    assert Domain(0.0, 1.0, points=2).grid(9) == [0.0, 1.0]
    assert Domain(0.01, 1.0, log=True, points=3).grid(9) == pytest.approx([0.01, 0.1, 1.0])
    assert Domain(2, 5, integer=True).grid(3) == [2, 3, 4, 5]
    assert Domain(1, 9, values=(1.0, 9.0)).grid(5) == [1.0, 9.0]


# paths


def test_values_reach_the_models_and_the_merge() -> None:
    found = space(
        {
            "models[0].parameters.weight": {"low": 0, "high": 2},
            "models[2].parameters.density": {"values": [0.1, 0.5]},
            "parameters.lambda": {"low": 0.1, "high": 3, "scale": "log"},
        },
        weight=0.7,
        scale=0.4,
    )
    assert found.initial["models[0].parameters.weight"] == 0.7
    assert found.initial["parameters.lambda"] == 0.4
    config = found.config(dict(zip(found.names, [1.25, 0.5, 2.0], strict=True)))
    resolved = load_config(config).resolve(NAMES[0])
    assert resolved["weight"] == [1.25, 0.7, 0.7]
    assert resolved["density"] == [1.0, 1.0, 0.5]
    assert resolved["scale"] == 2.0  # under its other name it would have been given twice


def test_all_models_have_a_variable_each_or_share_one() -> None:
    path = "models[*].parameters.weight"
    assert space({path: {"low": 0, "high": 2}}).names == [
        f"models[{n}].parameters.weight" for n in range(3)
    ]
    shared = space({path: {"low": 0, "high": 2, "shared": True}})
    assert shared.names == [path]
    assert values_of(shared, {path: 1.5}, "weight")[NAMES[0]] == [1.5] * 3


def test_a_listed_base_has_no_variable() -> None:
    given = merge()
    given["models"].insert(1, {"model": given["base_model"]})
    found = make_space(given, {"models[*].parameters.weight": {"low": 0, "high": 2}}, NAMES)
    assert found.names == [f"models[{n}].parameters.weight" for n in (0, 2, 3)]
    with pytest.raises(RequestError, match=r"no such model is merged .*models\[0\], models\[2\]"):
        make_space(given, {"models[1].parameters.weight": {"low": 0, "high": 2}}, NAMES)


def test_whole_numbers_are_written_as_such() -> None:
    found = make_space(merge("karcher"), {"parameters.max_iter": {"low": 1, "high": 20}}, NAMES)
    assert found.config({"parameters.max_iter": 7.0})["parameters"]["max_iter"] == 7
    assert isinstance(found.config({"parameters.max_iter": 7.0})["parameters"]["max_iter"], int)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "expected at least one parameter"),
        ({"weight": {"low": 0, "high": 1}}, r"weight: unknown path; expected models\[0\]"),
        (
            {"parameters.wieght": {"low": 0, "high": 1}},
            r"no parameter 'wieght'; did you mean 'weight'\? \(numbers that can be searched: "
            r"weight, density, lambda\)",
        ),
        ({"parameters.semantics": {"low": 0, "high": 1}}, "is no number"),
        ({"models[7].parameters.weight": {"low": 0, "high": 1}}, "no such model is merged"),
        ({"models[0].parameters.lambda": {"low": 0, "high": 1}}, r"search parameters\.lambda"),
        ({"parameters.lambda": {"low": 2, "high": 1}}, "low < high, got 2 and 1"),
        ({"parameters.lambda": {"low": 1, "high": 1}}, "low < high, got 1 and 1"),
        ({"parameters.lambda": {"low": 1}}, "high: is missing"),
        ({"parameters.lambda": {"low": 0, "high": 1, "scale": "log"}}, "more than 0, got 0"),
        ({"parameters.lambda": {"values": []}}, "values: expected at least one number"),
        ({"parameters.lambda": {"values": [1, 1.0]}}, "different numbers"),
        ({"parameters.lambda": {"values": [1], "low": 0}}, "got both"),
        ({"parameters.lambda": {"low": 0, "high": 1, "points": 0}}, "points: expected at least 1"),
        ({"parameters.lambda": {"low": 0, "high": 1, "initial": 3}}, "initial: expected"),
        ({"parameters.density": {"low": 0.5, "high": 1.5}}, r"high: expected a finite number in"),
        ({"parameters.lambda": {"low": 0, "high": 1, "shared": True}}, r"is for models\[\*\] only"),
        (
            {"parameters.weight": {"low": 0, "high": 1, "groups": {"a": "("}}},
            "a: not a regular expression",
        ),
        ({"parameters.weight": {"low": 0, "high": 1, "groups": {"a": "xyz"}}}, "finds no tensor"),
        (
            {"parameters.weight": {"low": 0, "high": 1, "groups": {"a": "attn", "b": "attn"}}},
            "b: 'attn' finds only tensors that a group before it takes",
        ),
        ({"parameters.weight": {"low": 0, "high": 1, "groups": 13}}, "at most 12, the layers"),
        ({"parameters.weight": {"low": 0, "high": 1, "groups": "halves"}}, "got 'halves'"),
        (
            {
                "models[*].parameters.weight": {"low": 0, "high": 1},
                "models[1].parameters.weight": {"low": 0, "high": 1},
            },
            r"models\[1\].parameters.weight is searched twice",
        ),
    ],
)
def test_what_cannot_be_searched(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        space(parameters)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        space({"parameters.x": {"low": 0, "high": 1}, "parameters.lambda": {"low": 1, "high": 0}})
    assert len(caught.value.problems) == 2


def test_a_global_value_that_every_model_overrides_is_refused() -> None:
    given = toys.config(Path("."), "ties", 3, weights=[1, 1, 1])
    with pytest.raises(RequestError, match=r"has no effect: .* search models\[\*\]"):
        make_space(given, {"parameters.weight": {"low": 0, "high": 1}}, NAMES)


def test_groups_of_a_value_for_the_whole_model_are_refused() -> None:
    path = "models[*].parameters.density"
    with pytest.raises(RequestError, match=r"the initial values: .*trim is over the whole model"):
        space({path: {"low": 0.1, "high": 1, "groups": "thirds"}}, semantics="official")
    with pytest.raises(RequestError, match="'ratio' is one value for all tensors"):
        make_space(merge("pcb"), {"parameters.ratio": {"low": 0.1, "high": 1, "groups": 2}}, NAMES)


# groups


def test_thirds_of_the_depth_and_the_rest() -> None:
    path = "models[*].parameters.weight"
    found = space({path: {"low": 0, "high": 9, "groups": "thirds"}})
    assert len(found.variables) == 3 * 4
    wanted = {name: float(number) for number, name in enumerate(found.names)}
    got = values_of(found, {k: v / 2 for k, v in wanted.items()}, "weight")
    order = ["lower third", "middle third", "upper third", "rest"]
    for name in NAMES:
        layer = name.split(".")[2]
        group = int(layer) // 4 if layer.isdigit() else 3
        for model in range(3):
            label = f"models[{model}].parameters.weight [{order[group]}]"
            assert got[name][model] == wanted[label] / 2, name


def test_expressions_and_what_the_config_says_of_the_others() -> None:
    groups = {"attention": r"attn", "first": r"layers\.1\."}
    found = space(
        {"parameters.weight": {"low": 0, "high": 9, "groups": groups}},
        weight=[{"filter": "norm", "value": 0.25}, {"value": 0.5}],
    )
    got = values_of(found, dict(zip(found.names, [2.0, 3.0], strict=True)), "weight")
    for name in NAMES:
        wanted = 2.0 if "attn" in name else 3.0 if "layers.1." in name else 0.5
        wanted = 0.25 if "norm" in name else wanted
        assert got[name] == [wanted] * 3, name


def test_values_over_the_layers_stay_for_the_others() -> None:
    merged = merge()
    merged["parameters"] = {**merged.get("parameters", {}), "weight": [0, 1]}
    found = make_space(
        merged, {"parameters.weight": {"low": 0, "high": 9, "groups": {"a": "attn"}}}, NAMES
    )
    clauses = found.config({found.variables[0].name: 5.0})["parameters"]["weight"]
    assert clauses[-1] == {"value": [0, 1]}


def test_filters_take_each_tensor_to_its_group() -> None:
    names = ["a.0.w", "b.a.0.w", "a.10.w", "a.1.w", "a.1.wide", "w"]
    groups = {"x": ["a.0.w", "a.1.w"], "y": ["b.a.0.w", "a.10.w", "a.1.wide"]}
    filters = filters_of(groups, names, "here")
    home = {name: label for label, own in groups.items() for name in own}
    for name in names:
        first = next((label for text, label in filters if text in name), None)
        assert first == home.get(name), name
    with pytest.raises(RequestError, match=r"'a\.0\.w' is in no group, but a filter for 'x'"):
        filters_of({"x": ["w"]}, names, "here")


def test_whole_layers_are_one_filter() -> None:
    filters = filters_of(group_tensors(2, NAMES, "here"), NAMES, "here")
    assert ("model.layers.11.", "upper half") in filters
    assert len(filters) == 12 + 2


# samplers


def test_a_grid_has_every_combination() -> None:
    found = space(
        {
            "parameters.lambda": {"values": [1, 2]},
            "models[*].parameters.density": {"values": [0.1, 0.2, 0.3], "shared": True},
        }
    )
    points = grid_points(found)
    assert len(points) == 6
    assert [tuple(point.values()) for point in points][:3] == [(1, 0.1), (1, 0.2), (1, 0.3)]
    many = space({"models[*].parameters.weight": {"low": 0, "high": 1, "points": 99}})
    with pytest.raises(RequestError, match=r"970299 points \(99 x 99 x 99\)"):
        grid_points(many)


TWO: dict[str, Any] = {"models[*].parameters.weight": {"low": 0, "high": 4, "initial": 3}}


def test_random_points_depend_on_their_number_and_the_seed() -> None:
    found = space(TWO)
    batches = random_points(found, 5)
    first = next(batches)
    assert first == [found.initial]
    some, again = batches.send([None]), random_points(found, 5)
    next(again)
    assert some == again.send([1.0])
    other = random_points(found, 6)
    next(other)
    assert other.send([1.0]) != some
    assert all(0 <= value <= 4 for point in some for value in point.values())


def test_cmaes_finds_the_optimum_and_repeats_itself() -> None:
    found = space(TWO)

    def search(failing: bool) -> tuple[list[dict[str, float]], float]:
        batches = cmaes_points(found, 3)
        batch, asked, best = next(batches), [], -1e9
        while len(asked) < 250:
            scores: list[float | None] = []
            for point in batch:
                score = -sum((value - 1.0) ** 2 for value in point.values())
                failed = failing and max(point.values()) > 3.2
                scores.append(None if failed else score)
                best = best if failed else max(best, score)
            asked += batch
            batch = batches.send(scores)
        return asked, best

    first, best = search(False)
    assert best > -1e-3
    assert search(False)[0] == first
    assert first[0] == found.initial
    failing, best = search(True)
    assert best > -1e-3
    assert failing != first


def test_cmaes_begins_anew_when_it_has_converged() -> None:
    found = space(TWO)
    batches = cmaes_points(found, 0, sigma=0.3, population=4)
    batch, sizes = next(batches), []
    for _ in range(150):
        sizes.append(len(batch))
        batch = batches.send([0.0] * len(batch))  # a plateau
    assert sizes[:2] == [1, 4]
    assert max(sizes) >= 16


def test_cmaes_needs_two_variables() -> None:
    found = space({"parameters.lambda": {"low": 0, "high": 1}})
    with pytest.raises(RequestError, match="at least 2 variables, got 1"):
        next(cmaes_points(found, 0))
