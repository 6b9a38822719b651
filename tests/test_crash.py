"""Processes that die while they merge: OUT is whole or not there, and the next run cleans up.

A child process imports everything once, then forks a process for each trial, which dies at a chosen
moment: at the n-th thing it does to the file system, or after a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import pymerge
from tests import models
from tests import test_data_files as data_files
from tests.models import State

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")

# Each line of stdin is a JSON list of trials to run at once, each [config, OUT, "--force" or "",
# file for stderr, signal, moment]; prints the list of [exit status, seconds].
DRIVER = """
import json
import os, signal, sys, threading, time
import pymerge.commands.main
import pymerge.merging.files
from pathlib import Path
from pymerge.output import directory, files, writer

name, moment, parent = signal.SIGKILL, -1, ""
seen = 0
guard = threading.Lock()

def happens(*_):
    # One more thing is about to happen, or has happened, to the file system.
    global seen
    with guard:
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), name)
            if name == signal.SIGKILL:
                time.sleep(60)

def around(module, function):
    original = getattr(module, function)
    def wrapped(*arguments, **keywords):
        happens()
        result = original(*arguments, **keywords)
        happens()
        return result
    setattr(module, function, wrapped)

for function in ("pwrite", "fsync", "fdatasync"):
    around(os, function)
for function in ("exchange", "rename_to_free_name"):
    around(directory, function)
around(writer, "preallocate")
audited = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
def audit(event, arguments):
    if event in audited and isinstance(arguments[0], (str, bytes, os.PathLike)):
        if os.fsdecode(arguments[0]).startswith(parent):
            happens()

real_sleep = time.sleep
def slowly(original):
    def wrapped(*arguments):
        real_sleep(0.01)
        return original(*arguments)
    return wrapped

def trial(config, out, force, when):
    global moment, parent
    parent = str(Path(out).parent)
    if when.startswith("slow"):
        files.OutputFile.write = slowly(files.OutputFile.write)
        files.OutputFile.sync = slowly(files.OutputFile.sync)
    else:
        moment = int(when)
        sys.addaudithook(audit)
    arguments = ["merge", config, out, "--quiet", "--shard-size", "60KB"]
    return pymerge.commands.main.main(arguments + ([force] if force else []))

def child(config, out, force, stderr, when):
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    code = 70
    try:
        code = trial(config, out, force, when)
    finally:
        sys.stderr.flush()
        os._exit(100 if code == 0 and seen < moment else code)

for line in sys.stdin:
    started = time.monotonic()
    running = []
    for config, out, force, stderr, kind, when in json.loads(line):
        name = getattr(signal, kind)
        pid = os.fork()
        if pid == 0:
            child(config, out, force, stderr, when)
        running.append((pid, name, when))
    result = []
    for pid, number, when in running:
        if when.startswith("slow"):
            real_sleep(float(when[4:]))
            os.kill(pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        result.append([status, time.monotonic() - started])
    print(json.dumps(result), flush=True)
"""
DONE = 100  # the trial came to its end before the chosen moment
STATES = ("absent", "old", "new")


class Driver:
    """The process that forks trials."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(pymerge.__file__).parent.parent)},
        )

    def run(self, trials: list[list[str]]) -> list[tuple[int, float]]:
        """Run merges at once; return the exit status and the seconds of each."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(trials) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.process.communicate(timeout=60)


class Scene:
    """Models to merge, an OUT, and what may be found there."""

    def __init__(self, root: Path, driver: Driver, *, force: bool) -> None:
        self.root, self.out, self.force = root, root / "place" / "out", force
        self.driver = driver
        base, tuned = models.llama(2, layers=1, buffers=False)
        models.save_family(root, base, tuned)
        self.old: State = tuned[0]
        self.new = pymerge.ties_merge(base, tuned, density=0.3)
        config = models.config(root, "ties", 2, density=0.3, semantics="official")
        (root / "c.yml").write_text(yaml.safe_dump(config))
        self.out.parent.mkdir()
        self.put_back()

    def trial(self, kind: str, moment: str, count: int = 1) -> list[tuple[int, float]]:
        """Merge `count` times at once, with a signal at that moment; see Driver.run."""
        force = "--force" if self.force else ""
        config, stderr = self.root / "c.yml", self.root / "stderr"
        return self.driver.run(
            [[str(config), str(self.out), force, str(stderr), kind, moment]] * count
        )

    def put_back(self) -> None:
        """Make OUT what it was before a merge; leave what dead processes left."""
        if self.out.exists():
            stale = self.out.parent / "trash"
            self.out.rename(stale)
            for path in stale.iterdir():
                path.unlink()
            stale.rmdir()
        if self.force:
            models.save(self.out, self.old, files=2)

    def state(self) -> str:
        """Return which of STATES OUT is in; anything else fails."""
        if not self.out.exists():
            return "absent"
        found = models.load(self.out)
        if (self.out / "pymerge_report.json").exists():
            models.assert_same(found, self.new)
            assert json.loads((self.out / models.INDEX).read_text())["weight_map"].keys() == set(
                found
            )
            assert (self.out / "README.md").exists()
            assert (self.out / "config.json").exists()
            return "new"
        models.assert_same(found, self.old)
        assert sorted(os.listdir(self.out))[0] == "config.json"
        return "old"

    def left(self) -> list[str]:
        """Return what lies beside OUT."""
        return sorted(path.name for path in self.out.parent.iterdir() if path != self.out)


@pytest.fixture(params=[False, True], ids=["new", "force"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, driver: Driver) -> Scene:
    return Scene(tmp_path, driver, force=request.param)


def moments(scene: Scene, kind: str, step: int) -> Iterator[tuple[int, int]]:
    """Yield (moment, exit status) for every step-th moment of a merge, and for one that ended."""
    moment = 1
    while True:
        ((code, _),) = scene.trial(kind, str(moment))
        yield moment, code
        if code == DONE:
            return
        moment += step


def test_killed_at_any_moment(scene: Scene) -> None:
    before = "old" if scene.force else "absent"
    seen = []
    for moment, code in moments(scene, "SIGKILL", 5):
        assert code in (-signal.SIGKILL, DONE), (moment, code)
        state = scene.state()
        assert state in (before, "new"), moment
        assert code != DONE or state == "new"
        seen.append(state)
        assert len(scene.left()) <= 1, (moment, scene.left())
        assert all(name.startswith(".out.pymerge-tmp-") for name in scene.left())
        if state != before:
            scene.put_back()
    assert seen.count(before) > 8
    assert seen[0] == before
    assert scene.left() == []  # the last run, which was not killed, cleaned up


def test_interrupted_at_any_moment(scene: Scene) -> None:
    """Ctrl-C says so, and cleans up by itself."""
    before = "old" if scene.force else "absent"
    seen: list[tuple[int, str]] = []
    for moment, code in moments(scene, "SIGINT", 9):
        state = scene.state()
        assert code in (130, DONE, 0), (moment, code)
        assert state == "new" if code in (DONE, 0) else state in (before, "new"), (moment, code)
        # Interrupted while it deletes what it has replaced, it leaves the rest to the next run.
        assert scene.left() == [] or (scene.force and state == "new"), (moment, code, state)
        seen.append((code, state))
        if state != before:
            scene.put_back()
    assert scene.left() == []
    assert seen.count((130, before)) > 6
    said = (scene.root / "stderr").read_text()
    assert said.count("pymerge: error: interrupted") == sum(code == 130 for code, _ in seen)
    assert "Traceback" not in said


def test_killed_after_some_time(scene: Scene) -> None:
    """At no particular place of the code: in kernels, in the writing thread, in between."""
    before = "old" if scene.force else "absent"
    ((code, whole),) = scene.trial("SIGCONT", "slow0")
    assert (code, scene.state()) == (0, "new")
    scene.put_back()
    leftovers: list[str] = []
    for number in range(8):
        kind = "SIGKILL" if number % 2 else "SIGTERM"
        ((code, _),) = scene.trial(kind, f"slow{whole * (number + 0.5) / 10:.4f}")
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 143, 0)
        state = scene.state()
        assert state in (before, "new")
        if code == 143 and state == before:
            assert set(scene.left()) <= set(leftovers)
        leftovers = scene.left()
        assert len(leftovers) <= 1
        if state != before:
            scene.put_back()
    ((code, _),) = scene.trial("SIGCONT", "slow0")
    assert (code, scene.state(), scene.left()) == (0, "new", [])


def test_two_processes_write_the_same_out(scene: Scene) -> None:
    """The loser gets an error, or is replaced; the two never mix."""
    codes = [code for code, _ in scene.trial("SIGCONT", "slow0", count=2)]
    assert scene.state() == "new"
    assert scene.left() == []
    assert 0 in codes, (scene.root / "stderr").read_text()
    assert set(codes) <= {0, 1, 2}


def test_killed_while_it_merges_by_statistics(tmp_path: Path, driver: Driver) -> None:
    """Statistics are read beside each model, and are as they were."""
    scene = Scene(tmp_path, driver, force=False)
    root = tmp_path / "family"
    root.mkdir()
    config = data_files.write(root, "fisher")
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    scene.new = data_files.in_memory(root, "fisher")
    files = sorted(root.glob("*/fisher.safetensors"))
    before = [path.read_bytes() for path in files]
    seen = []
    for moment, code in moments(scene, "SIGKILL", 17):
        assert code in (-signal.SIGKILL, DONE), (moment, code)
        state = scene.state()
        assert state in ("absent", "new"), moment
        assert code != DONE or state == "new"
        seen.append(state)
        if state == "new":
            scene.put_back()
    assert seen.count("absent") > 2
    assert scene.left() == []
    assert len(before) == 3
    assert [path.read_bytes() for path in files] == before
