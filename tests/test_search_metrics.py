"""Metrics of a search: what they are given, what they may return, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pymerge import RequestError, merge_checkpoints
from pymerge.search import run_search
from pymerge.search.plots import best_so_far
from tests import search_metrics
from tests.models import no_waiting  # noqa: F401
from tests.search_studies import family, search, study, there, told  # noqa: F401


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


def test_of_equal_values_the_first_is_the_best(tmp_path: Path) -> None:
    config = study(metric=None, budget=5)
    found = run_search(config, tmp_path / "out", metric=lambda _: 1.0, plots=False)
    assert found.best is not None
    assert found.best.number == 0


def test_the_best_so_far_is_the_least_where_that_is_sought(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 5.0, 1.0])
    config = study(metric=None, budget=4, direction="minimize")
    found = run_search(config, tmp_path / "out", metric=lambda _: next(values), plots=False)
    assert best_so_far(found) == [(0, 3.0), (1, 2.0), (2, 2.0), (3, 1.0)]


def test_failures_between_others_do_not_stop(tmp_path: Path) -> None:
    calls = iter(range(100))

    def metric(_: Any) -> float:
        return 1 / (next(calls) % 2)  # raises every other time

    config = study(metric=None, budget=8, max_failures=2)
    found = run_search(config, tmp_path / "out", metric=metric, plots=False)
    assert (len(found.trials), found.failures) == (8, 4)


def test_workers_share_the_memory_of_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def merge(*arguments: Any, memory: int, **options: Any) -> Any:
        given.append(memory)
        return merge_checkpoints(*arguments, memory=memory, **options)

    monkeypatch.setattr("pymerge.search.evaluate.merge_checkpoints", merge)
    config = study(metric="tests.search_metrics:of_folder", receives="folder", workers=2, budget=3)
    run_search(config, tmp_path / "out", memory="4GiB", plots=False)
    assert given == [2 << 30] * 3


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
