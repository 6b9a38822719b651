"""Searches of toy models: what is found and kept, with any workers, after any interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pymerge
from pymerge import RequestError
from pymerge.cli import main
from pymerge.search import SearchResult, Trial, run_search
from tests import models, search_metrics
from tests.models import no_waiting  # noqa: F401

METRIC = "tests.search_metrics:near"
WEIGHTS = {"models[*].parameters.weight": {"low": 0.0, "high": 2.0, "initial": 0.25}}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of zeros, and models of 1, 2 and 3: the mean of a merge is w0 + 2 w1 + 3 w2."""
    root = tmp_path_factory.mktemp("family")
    names = ("layers.0.weight", "layers.1.weight", "head.weight")
    states = [{name: torch.full((4, 4), float(k)) for name in names} for k in range(4)]
    models.save_family(root, states[0], states[1:])
    return root


@pytest.fixture(autouse=True)
def there(no_waiting: None, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(family)


def study(**changes: Any) -> dict[str, Any]:
    merge: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base"}
    merge["models"] = [{"model": f"m{k}"} for k in range(3)]
    made: dict[str, Any] = {
        "merge": merge,
        "metric": METRIC,
        "data": {"search": "validation"},
        "sampler": "random",
        "parameters": WEIGHTS,
        "budget": 12,
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def search(
    out: Path, plots: bool = False, merge: bool = False, merged: Any = None, **changes: Any
) -> SearchResult:
    """Search; `merged` is the merge's configuration, `merge` whether to write the best."""
    config = study(**changes)
    return run_search({**config, "merge": merged or config["merge"]}, out, plots=plots, merge=merge)


def told(trials: list[Trial]) -> list[tuple[Any, ...]]:
    """What must not depend on workers or interruptions."""
    return [(t.number, t.values, t.value, t.state, t.error) for t in trials]


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


# metrics


def test_a_function_gets_tensors_a_folder_or_the_data(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metric(model: Any, data: Any, offset: float) -> float:
        seen.append((model, data))
        return offset

    config = study(metric=None, budget=2, arguments={"offset": 3.0})
    found = run_search(config, tmp_path / "a", metric=metric, plots=False)
    assert [t.value for t in found.trials] == [3.0, 3.0]
    model, data = seen[0]
    assert sorted(model) == ["head.weight", "layers.0.weight", "layers.1.weight"]
    assert data.name == "validation"
    folder = search(tmp_path / "b", receives="folder", metric="tests.search_metrics:of_folder")
    tensors = search(tmp_path / "c")
    assert [t.value for t in folder.trials] == [t.value for t in tensors.trials]


def test_a_class_is_made_once_for_each_worker(tmp_path: Path) -> None:
    metric, arguments = "tests.search_metrics:Counts", {"target": 1.0}
    one = search(tmp_path / "one", metric=metric, arguments=arguments)
    assert [t.named["calls"] for t in one.trials] == list(range(1, 13))
    search_metrics.Counts.made = 0
    two = search(tmp_path / "two", metric=metric, arguments=arguments, workers=2)
    assert search_metrics.Counts.made <= 2
    assert [t.value for t in two.trials] == [t.value for t in one.trials]


def test_several_values(tmp_path: Path) -> None:
    found = search(tmp_path / "a", metric="tests.search_metrics:named")
    assert all(t.value == t.named["near"] for t in found.trials)
    other = search(tmp_path / "b", metric="tests.search_metrics:named", optimise="total")
    assert all(t.value == t.named["total"] for t in other.trials)
    record = json.loads((tmp_path / "b" / "trials.json").read_text())
    assert record[0]["named"]["text"] is None  # no number, and nobody searches for it
    with pytest.raises(RequestError, match="returned no 'loss'"):
        search(tmp_path / "c", metric="tests.search_metrics:named", optimise="loss")


def test_failures_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    for sampler in ("random", "cmaes"):
        found = search(
            tmp_path / sampler,
            metric="tests.search_metrics:moody",
            budget=24,
            sampler=sampler,
            max_failures=24,
        )
        assert len(found.trials) == 24
        errors = " ".join(t.error or "" for t in found.trials)
        for text in ("metric: raised OSError: moody", "returned nan", "returned str, not a number"):
            assert text in errors
        assert found.best is not None
        assert 0 < found.failures < 24
        assert told(search(tmp_path / sampler, **_moody(sampler)).trials) == told(found.trials)


def _moody(sampler: str) -> dict[str, Any]:
    metric = "tests.search_metrics:moody"
    return {"metric": metric, "budget": 24, "sampler": sampler, "max_failures": 24}


def test_a_merge_that_is_refused_is_a_failure(tmp_path: Path) -> None:
    merge = {**study()["merge"], "parameters": {"normalize": True}}
    found = search(
        tmp_path / "out",
        merged=merge,
        sampler="grid",
        budget=None,
        parameters={"models[*].parameters.weight": {"values": [0.0, 1.0], "shared": True}},
    )
    assert "merge: config: the weights sum to 0" in (found.trials[0].error or "")
    assert found.best is not None
    assert found.best.number == 1


def test_too_many_failures_in_a_row_stop(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"4 trials failed in a row .* KeyError: 'always'"):
        search(tmp_path / "out", metric="tests.search_metrics:broken", max_failures=4)
    lines = (tmp_path / "out" / "study.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4


def test_a_metric_that_writes_to_the_tensors_fails(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"wrote to the merged tensor .*clone\("):
        search(tmp_path / "out", metric="tests.search_metrics:scribbles", max_failures=2)


def test_what_a_failing_metric_wrote_is_not_used(tmp_path: Path) -> None:
    # the tensor that is written to has the same parameters in all trials
    weight = {"values": [0.1, 0.2, 0.3, 0.4], "shared": True, "groups": {"low": "layers"}}
    grid: dict[str, Any] = {"sampler": "grid", "budget": None}
    grid["parameters"] = {"models[*].parameters.weight": weight}
    clean = search(tmp_path / "clean", **grid)
    metric = "tests.search_metrics:scribbles_and_raises"
    found = search(tmp_path / "out", metric=metric, **grid)
    assert [t.state for t in found.trials] == ["failed", "complete"] * 2
    assert [t.value for t in found.trials[1::2]] == [t.value for t in clean.trials[1::2]]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("near", "expected package.module:function, got 'near'"),
        ("tests.nothing:near", "'tests.nothing' cannot be imported"),
        ("tests.search_metrics:nera", "has no 'nera'; did you mean 'near'"),
        ("tests.search_metrics:NOT_CALLABLE", "is not callable: .* got int"),
        ("tests.search_metrics:Refuses", r"Refuses\(...\) raised RuntimeError: no model here"),
    ],
)
def test_metrics_that_cannot_be_had(tmp_path: Path, metric: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"metric: .*{message}"):
        search(tmp_path / "out", metric=metric)
    assert not (tmp_path / "out").exists()


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


# going on


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", sampler="cmaes", budget=30)
    for budget in (1, 5, 17, 30):
        part = search(tmp_path / "part", sampler="cmaes", budget=budget)
        assert len(part.trials) == budget
    assert part.resumed == 17
    assert told(part.trials) == told(whole.trials)
    less = search(tmp_path / "part", sampler="cmaes", budget=7)
    assert told(less.trials) == told(whole.trials)[:7]
    assert less.best is not None
    assert less.best.number < 7
    again = run_search(study(sampler="cmaes", budget=3), tmp_path / "part", restart=True)
    assert (again.resumed, len(again.trials)) == (0, 3)


def test_a_line_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    whole = search(tmp_path / "out")
    journal = tmp_path / "out" / "study.jsonl"
    content = journal.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    journal.write_bytes(content[: -len(last) // 2])
    again = search(tmp_path / "out")
    assert again.resumed == 11
    assert told(again.trials) == told(whole.trials)
    assert any("incomplete" in warning for warning in again.warnings)
    journal.write_bytes(content.replace(b'"number": 3', b'"nmber": 3'))
    with pytest.raises(RequestError, match=r"study\.jsonl:5: not a trial"):
        search(tmp_path / "out")
    journal.write_bytes(content[:20])  # killed before the header was written
    assert search(tmp_path / "out").resumed == 0


def test_a_study_of_another_configuration_is_refused(tmp_path: Path) -> None:
    search(tmp_path / "out", budget=2)
    merge = study()["merge"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 3}, "seed: the study has 0, now 3"),
        ({"sampler": "cmaes"}, 'sampler: the study has "random", now "cmaes"'),
        ({"metric": "tests.search_metrics:named"}, "metric: the study has"),
        ({"data": {"search": "dev"}}, 'data.search.name: the study has "validation", now "dev"'),
        ({"merge": {**merge, "dtype": "bfloat16"}}, "merge.dtype: the study has none"),
        ({"parameters": {"parameters.lambda": {"low": 0, "high": 1}}}, "parameters.parameters"),
    ]
    for change, message in changes:
        with pytest.raises(RequestError, match=message):
            run_search(study(**change), tmp_path / "out")
    state = {name: torch.ones(4, 4) for name in ("layers.0.weight", "layers.1.weight")}
    models.save(tmp_path / "other", {**state, "head.weight": torch.ones(4, 4) * 9})
    before = study(budget=2)
    before["merge"]["models"][0]["model"] = str(tmp_path / "other")
    run_search(before, tmp_path / "moved", plots=False)
    models.save(tmp_path / "new", {**state, "head.weight": torch.ones(4, 4) * 8})
    os.rename(tmp_path / "new" / "model.safetensors", tmp_path / "other" / "model.safetensors")
    with pytest.raises(RequestError, match=r"inputs\[1\].files"):
        run_search(before, tmp_path / "moved")


def test_a_study_has_one_user_and_a_folder_of_its_own(tmp_path: Path) -> None:
    from pymerge.search.journal import Journal

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("full", "is no study"), ("file", "is no folder")):
        with pytest.raises(RequestError, match=message):
            search(tmp_path / name)
    journal = Journal(tmp_path / "busy", {})
    with pytest.raises(RequestError, match="another search is using this study"):
        search(tmp_path / "busy")
    journal.close()


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_kill_9_loses_no_trial_that_was_done(tmp_path: Path, executor: str) -> None:
    workers = 1 if executor == "threads" else 2
    config = study(
        metric="tests.search_metrics:slow",
        sampler="cmaes",
        budget=18,
        executor=executor,
        workers=workers,
    )
    (tmp_path / "search.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pymerge", "search", str(tmp_path / "search.yml")]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    journal = out / "study.jsonl"
    process = subprocess.Popen([*command, str(out), "--quiet"], env=environment)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 4 <= done < 18
    lines = journal.read_text().splitlines()[1 : done + 1]
    pids = {int(json.loads(line)["named"]["pid"]) for line in lines}
    assert (process.pid in pids) == (executor == "threads")
    for pid in pids - {process.pid}:  # nobody is left behind
        while _runs(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    again = run_search({**config, "executor": "threads"}, out, plots=False)
    assert done <= again.resumed <= done + 1
    fresh = run_search({**config, "executor": "threads", "workers": 1}, tmp_path / "b", plots=False)
    assert [(t.values, t.value) for t in again.trials] == [
        (t.values, t.value) for t in fresh.trials
    ]


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


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
    assert "cannot be read" in capsys.readouterr().err
    path.write_text("merge: merge.yml\ndata: {search: v}\nsampler: random\nbugdet: 3\n")
    assert main(arguments) == 2
    assert "search.yml:4: bugdet: unknown key; did you mean 'budget'" in capsys.readouterr().err
