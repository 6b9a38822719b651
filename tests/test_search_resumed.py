"""Searches that go on: after interruptions, with another budget, and what is no longer the same."""

from __future__ import annotations

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

from pymerge import RequestError
from pymerge.search import run_search
from pymerge.search.journal import Journal, Trial
from tests import models
from tests.models import no_waiting  # noqa: F401
from tests.search_studies import family, search, study, there, told  # noqa: F401


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


def test_seconds_of_earlier_runs_count(tmp_path: Path) -> None:
    def slow(_: Any) -> float:
        time.sleep(0.1)
        return 1.0

    for budget in (3, 4):
        found = run_search(
            study(metric=None, budget=budget), tmp_path / "out", metric=slow, plots=False
        )
    elapsed = [trial.elapsed for trial in found.trials]
    assert elapsed == sorted(elapsed)
    assert elapsed[-1] >= 0.4


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


def test_a_study_is_resumed_again_after_a_torn_line(tmp_path: Path) -> None:
    """What is left of a line is taken away before another is written behind it."""
    whole = search(tmp_path / "out")
    journal = tmp_path / "out" / "study.jsonl"
    content = journal.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    journal.write_bytes(content[: -len(last) // 2])
    assert search(tmp_path / "out").resumed == 11
    for budget in (12, 12, 13):
        again = search(tmp_path / "out", budget=budget)
        assert again.resumed == 12
        assert told(again.trials)[:12] == told(whole.trials)
        assert not any("incomplete" in warning for warning in again.warnings)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 13
    assert [json.loads(line)["number"] for line in lines[1:]] == list(range(13))


@pytest.mark.parametrize("left", [1, 2, -2, -1])
@pytest.mark.parametrize("torn", [0, 1, 3])
def test_a_line_may_be_torn_anywhere(torn: int, left: int, tmp_path: Path) -> None:
    """Of the header or of a trial, with one byte written or all but the end of the line."""
    from pymerge.search.journal import Journal, Trial

    trials = [Trial(number, {"w": number / 8}, "complete", 0.5) for number in range(6)]
    trials[2] = Trial(2, {"w": 0.25}, "failed", error="gr\u00f6\u00dfer\n\u2028\x0b als erlaubt")
    path = tmp_path / "study.jsonl"
    journal = Journal(tmp_path, {"seed": 3})
    for trial in trials:
        journal.add(trial)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    kept = max(0, torn - 1)  # trials before the torn line; line 0 is the header
    path.write_bytes(b"".join(lines[:torn]) + lines[torn][:left])
    for resumed in range(3):
        journal = Journal(tmp_path, {"seed": 3})
        assert list(journal.trials.values()) == trials[: kept + resumed]
        assert bool(journal.warnings) == (resumed == 0 and torn > 0)
        journal.add(trials[kept + resumed])
        journal.close()
        count = 1 + kept + resumed + 1
        assert path.read_bytes().splitlines(keepends=True) == lines[:count]


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


def test_files_that_differ_at_their_ends_are_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large files, the beginning and the end are looked at."""
    monkeypatch.setattr("pymerge.search.study._SAMPLED", 64)
    names = ("layers.0.weight", "layers.1.weight", "head.weight")
    state = {name: torch.ones(4, 4) for name in names}
    config = study(budget=1)
    config["merge"]["models"][0]["model"] = str(tmp_path / "model")
    models.save(tmp_path / "model", state)
    run_search(config, tmp_path / "out", plots=False)
    state["layers.1.weight"][3, 3] = 2.0
    models.save(tmp_path / "new", state)
    os.replace(tmp_path / "new" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(RequestError, match=r"inputs\[1\].files"):
        run_search(config, tmp_path / "out", plots=False)


def test_a_study_has_one_user_and_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("full", "is no study"), ("file", "is not a folder")):
        with pytest.raises(RequestError, match=message):
            search(tmp_path / name)
    journal = Journal(tmp_path / "busy", {})
    with pytest.raises(RequestError, match="another search is using this study"):
        search(tmp_path / "busy")
    journal.close()


def test_trials_are_on_the_disk_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line, and the name of the file, are synced when they are written."""
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))
    )
    journal = Journal(tmp_path / "study", {})
    sizes = []
    for number in range(3):
        sizes.append((journal.path.stat().st_ino, journal.path.stat().st_size))
        journal.add(Trial(number, {"x": 1.0}, "complete", 0.5))
    sizes.append((journal.path.stat().st_ino, journal.path.stat().st_size))
    journal.close()
    assert [one for one in synced if one[0] == sizes[0][0]] == sizes
    assert (tmp_path / "study").stat().st_ino in dict(synced)


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
