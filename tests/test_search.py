"""Searches of toy models: what is found and written, with any workers; requests, the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import pymerge
from pymerge import RequestError
from pymerge.commands.main import main
from pymerge.search import run_search
from tests import models, search_metrics
from tests.models import no_waiting  # noqa: F401
from tests.search_studies import METRIC, family, search, study, there, told  # noqa: F401

# what is found


def test_cmaes_finds_the_best_weights_and_writes_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = search(out, sampler="cmaes", budget=40, merge=True, plots=True)
    assert found.best is not None
    assert found.first is not None
    assert found.best.value == max(t.value for t in found.trials if t.value is not None)
    assert found.first.value == pytest.approx(-0.0)
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("study.jsonl", "best.yml", "trials.csv", "trials.json", "search.json", "search.html"),
        *("history.png", "coefficients.png", "parallel.png", "merged"),
    }
    # best.yml makes the bytes of the merge that was evaluated
    merged = models.load(out / "merged")
    assert search_metrics.near(merged) == found.best.value
    pymerge.merge_checkpoints(out / "best.yml", tmp_path / "again")
    assert models.weight_bytes(tmp_path / "again") == models.weight_bytes(out / "merged")
    kept = json.loads((out / "search.json").read_text())
    assert kept["best"]["values"] == found.best.values
    assert kept["chosen_on"] == {"name": "validation"}
    assert kept["cost"]["seconds_merging"] > 0
    rows = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in rows] == [t.value for t in found.trials]
    assert len(json.loads((out / "trials.json").read_text())) == 40
    page = (out / "search.html").read_text()
    assert page.count("plotly-graph-div") == 3
    assert '<script src="http' not in page  # it needs no network
    card = (out / "merged" / "README.md").read_text()
    assert "on the data `validation`" in card
    report = json.loads((out / "merged" / "pymerge_report.json").read_text())
    assert report["search"]["data"] == {"name": "validation"}
    assert pymerge.MergeReport.from_json(json.dumps(report)).search is not None


def test_a_grid_takes_the_first_of_equal_points(tmp_path: Path) -> None:
    parameters = {"parameters.lambda": [0.0, 0.125, 0.25, 0.375]}  # the mean is 6 lambda
    found = search(tmp_path / "a", sampler="grid", budget=None, parameters=parameters)
    assert [t.value for t in found.trials] == pytest.approx([-1.5, -0.75, 0.0, -0.75])
    assert found.best is not None
    assert found.best.number == 2
    least = search(
        tmp_path / "b", sampler="grid", budget=None, parameters=parameters, direction="minimize"
    )
    assert least.best is not None
    assert least.best.number == 0
    equal = [t.number for t in found.trials if t.value == found.trials[1].value]
    assert equal == [1, 3]


@pytest.mark.parametrize("sampler", ["random", "cmaes"])
def test_trials_do_not_depend_on_workers(tmp_path: Path, sampler: str) -> None:
    one = search(tmp_path / "one", sampler=sampler)
    three = search(tmp_path / "three", sampler=sampler, workers=3)
    assert told(one.trials) == told(three.trials)
    assert one.best is not None
    assert three.best is not None
    assert one.best.number == three.best.number
    other = search(tmp_path / "other", sampler=sampler, seed=1)
    assert told(other.trials) != told(one.trials)


def test_processes_import_the_metric(tmp_path: Path) -> None:
    config = study(workers=2, executor="processes", metric=None)
    with pytest.raises(RequestError, match="processes import it by its name"):
        run_search(config, tmp_path / "three", metric=search_metrics.near)


def test_groups_of_layers_are_searched(tmp_path: Path) -> None:
    weight = {"values": [0.0, 0.25], "shared": True, "groups": {"low": "layers", "high": "head"}}
    found = search(
        tmp_path / "out",
        sampler="grid",
        budget=None,
        parameters={"models[*].parameters.weight": weight},
        merge=True,
    )
    assert len(found.trials) == 4
    assert found.best is not None
    assert set(found.best.values.values()) == {0.25}
    assert search_metrics.near(models.load(tmp_path / "out" / "merged")) == 0.0


# which data


def test_the_report_is_on_other_data(tmp_path: Path) -> None:
    data = {"search": "validation", "report": "test"}
    found = search(tmp_path / "out", data=data, metric="tests.search_metrics:by_data")
    assert found.report is not None
    assert found.best is not None
    assert found.report["best"]["trial"] == found.best.number
    assert found.report["first"]["value"] == pytest.approx(-0.5)
    kept = json.loads((tmp_path / "out" / "search.json").read_text())
    assert kept["report"] == found.report
    without = search(tmp_path / "b", data=data)
    assert without.report is None
    assert "takes no argument 'data'" in without.warnings[0]


def test_splits_that_would_deceive_are_refused(tmp_path: Path) -> None:
    same, other = tmp_path / "a.txt", tmp_path / "b.txt"
    same.write_text("x")
    other.write_text("x")
    third = tmp_path / "c"
    (third / "deep").mkdir(parents=True)
    (third / "deep" / "one").write_text("y")
    split = {"name": "validation", "path": str(same)}
    cases: list[tuple[Any, str]] = [
        ({"search": "test"}, "'test' is called test: .* allow_test_split: true"),
        ({"search": "glue_Test-2"}, "is called test"),
        ({"search": {"name": "v", "path": str(tmp_path / "nothing")}}, "no file or folder"),
        ({"search": "v", "report": "v"}, "both have the name 'v'"),
        ({"search": split, "report": {"name": "b", "path": str(same)}}, "both are"),
        ({"search": split, "report": {"name": "b", "path": str(other)}}, "the same content"),
        ({"search": {"name": "v", "hash": "1"}, "report": {"name": "b", "hash": "1"}}, "content"),
        ({"search": {**split, "hash": "12"}}, "hash: expected 2d711642"),
        ({"search": {"name": "v", "place": "x"}}, "unknown key 'place'"),
        ({"report": "v"}, "data.search: is missing"),
    ]
    for data, message in cases:
        with pytest.raises(RequestError, match=message):
            search(tmp_path / "out", data=data)
    for data in (
        {"search": "latest"},
        {"search": split, "report": {"name": "b", "path": str(third)}},
    ):
        search(tmp_path / f"ok-{len(data)}", data=data, budget=1)


def test_searching_on_test_data_is_recorded(tmp_path: Path) -> None:
    found = search(
        tmp_path / "out", data={"search": "test"}, allow_test_split=True, budget=2, merge=True
    )
    assert found.config.allow_test_split
    assert "allow_test_split was set" in (tmp_path / "out" / "best.yml").read_text()
    assert "may be test data" in (tmp_path / "out" / "merged" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "search.json").read_text())["allow_test_split"]


# requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget: evaluations: expected more than 0, got 0"),
        ({"budget": {"seconds": 0}}, "budget: seconds: expected more than 0, got 0"),
        ({"budget": None}, "budget: is missing"),
        ({"sampler": None}, "sampler: is missing"),
        ({"sampler": "cmeas"}, "got 'cmeas'; did you mean 'cmaes'"),
        ({"metric": None}, "metric: is missing"),
        ({"data": None}, "data: is missing; say which data chooses"),
        ({"workers": 0}, "workers: "),
        ({"direction": "up"}, "direction: "),
        ({"parameter": {}}, "parameter: unknown key; did you mean 'parameters'"),
        (
            {"parameters": {"parameters.lambda": {"lo": 1}}},
            r"parameters\.lambda\.lo: unknown key; did you mean 'low'",
        ),
        ({"parameters": {"parameters.lambda": []}}, "values: expected at least one number"),
        ({"parameters": {"parameters.lambda": None}}, "null takes away a parameter of the preset"),
        ({"parameters": {"parameters.lambda": "x"}}, "parameters.parameters.lambda"),
        ({"preset": "pcb"}, "expected one of pcb_es, mergekit_evolve; got 'pcb'"),
        ({"preset": "pcb_es"}, "searches the coefficients of pcb, and the merge is"),
        (
            {"sampler": "grid", "parameters": {"parameters.lambda": [1, 2, 3]}, "budget": 2},
            "the grid has 3 points, got 2",
        ),
        (
            {"sampler": "cmaes", "parameters": {"parameters.lambda": {"low": 0, "high": 1}}},
            "at least 2 variables, got 1",
        ),
    ],
)
def test_requests_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        search(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_seconds_end_a_search(tmp_path: Path) -> None:
    found = search(tmp_path / "out", metric="tests.search_metrics:slow", budget={"seconds": 0.3})
    assert 1 <= len(found.trials) <= 8
    assert found.finished == "the seconds are used up"
    more = run_search(
        study(metric="tests.search_metrics:slow", budget={"seconds": 0.3}),
        tmp_path / "out",
        plots=False,
        seconds=found.trials[-1].elapsed + 60,
        evaluations=len(found.trials) + 1,
    )
    assert len(more.trials) == len(found.trials) + 1


def test_presets(tmp_path: Path) -> None:
    merge = study()["merge"]
    found = search(
        tmp_path / "a",
        preset="pcb_es",
        sampler=None,
        parameters={"parameters.ratio": None},
        budget=9,
        merged={**merge, "merge_method": "pcb"},
    )
    assert [v.name for v in found.space.variables] == [
        f"models[{n}].parameters.weight" for n in range(3)
    ]
    assert (found.config.sampler, set(found.space.initial.values())) == ("cmaes", {1.0})
    evolved = search(
        tmp_path / "b",
        preset="mergekit_evolve",
        sampler=None,
        parameters={
            f"models[*].parameters.{name}": {"groups": 2} for name in ("weight", "density")
        },
        budget=9,
        merged={**merge, "merge_method": "ties"},
    )
    assert len(evolved.space.variables) == 2 * 3 * 3
    assert evolved.config.sigma == pytest.approx(1 / 6)


# the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study(metric=None)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config["merge"]))
    config["merge"] = str(tmp_path / "merge.yml")
    path, out = tmp_path / "search.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))
    arguments = ["search", str(path), "--metric", METRIC, str(out)]
    assert main([*arguments, "--merge"]) == 0
    printed = capsys.readouterr()
    assert "12 trials: " in printed.out
    assert "chosen on 'validation'" in printed.out
    assert "trial 0 (first)" in printed.out
    assert "12 of 12 trials" in printed.err or "best " in printed.err
    assert main([*arguments, "--evaluations", "14"]) == 0
    assert "going on after 12 trials" in capsys.readouterr().err
    assert main([*arguments, "--evaluations", "0"]) == 2
    assert "expected more than 0" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "no.yml"), str(out)]) == 2
    assert "no.yml: no such file; expected a search configuration" in capsys.readouterr().err
    path.write_text("merge: merge.yml\ndata: {search: v}\nsampler: random\nbugdet: 3\n")
    assert main(arguments) == 2
    assert "search.yml:4: bugdet: unknown key; did you mean 'budget'" in capsys.readouterr().err
