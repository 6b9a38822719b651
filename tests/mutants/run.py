"""Runs mutants one at a time on the tests that must notice them.

    python -m tests.mutants [-k TEXT] [--jobs N] [--limit SECONDS]

The tests run in copies of the tree, never in the tree itself, each mutant in a process of its own.
First all chosen tests run without a mutant: one that fails anyway would notice everything.
"""

from __future__ import annotations

import argparse
import compileall
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import Mutant, StaleMutant

__all__ = ["Outcome", "main", "run_mutants"]

ROOT = Path(__file__).resolve().parents[2]
_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*cache", "*.so"
)
_PASSED, _FAILED, _FOREIGN = 0, 1, 97
# Seconds for all tests of one mutant beyond the limit of a single test: for what hears no signal.
_SLACK = 300

# A plugin of pytest: the tests must have run the copy, and no installed pymerge.
_GUARD = f"""
import os, sys
from pathlib import Path

def pytest_sessionfinish(session):
    root = os.environ["PYMERGE_MUTANTS_ROOT"]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "pymerge" and file and not Path(file).is_relative_to(root):
            print(f"\\n{{name}} was imported from {{file}}, not from {{root}}")
            session.exitstatus = {_FOREIGN}
            return
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant.

    result: "noticed", "survived", "timed out" (which is noticed, too), or "broken" where the tests
        did not run as they should.
    by: the test that failed first; what was printed, of a broken one.
    """

    mutant: Mutant
    result: str
    seconds: float
    by: str = ""

    @property
    def good(self) -> bool:
        """Whether it is as the list says."""
        if self.mutant.known:
            return self.result == "survived"
        return self.result in ("noticed", "timed out")


class _Copy:
    """A copy of a tree in which tests run."""

    def __init__(self, root: Path, folder: Path, limit: float) -> None:
        self.root = folder / "tree"
        self._limit = limit
        shutil.copytree(root, self.root, ignore=_LEFT_OUT, symlinks=True)
        # The native parts are those of the tree.
        for library in (root / "pymerge").rglob("*.so"):
            (self.root / library.relative_to(root)).symlink_to(library)
        # Without this, an editable install would answer for `pymerge.triton_kernels`.
        if (self.root / "triton_kernels").is_dir():
            (self.root / "pymerge" / "triton_kernels").symlink_to(Path("..", "triton_kernels"))
        # By their hashes: a change within a second that keeps the size must not go unseen.
        checked = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(self.root / "pymerge", quiet=1, invalidation_mode=checked)
        (folder / "pymerge_mutants_guard.py").write_text(_GUARD)
        paths = os.pathsep.join([str(self.root), str(folder)])
        self._environment = os.environ | {
            "PYTHONPATH": paths,
            "PYMERGE_MUTANTS_ROOT": str(self.root),
        }

    def test(self, tests: Sequence[str], *options: str) -> tuple[int | None, str]:
        """Run tests; return pytest's exit status, None if it had to be killed, and the output."""
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
        # Whatever is named runs, also what is marked for another target than `make test`.
        command += ["-m", "", "-p", "pymerge_mutants_guard", f"--timeout={self._limit:g}"]
        command += [*options, *tests]
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            # Every test has the limit; the sum has it for each.
            most = self._limit * max(1, len(tests)) + _SLACK
            try:
                output, _ = process.communicate(timeout=most)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                return None, ""
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def outcome(self, mutant: Mutant) -> Outcome:
        """Run the tests of a mutant."""
        path = self.root / mutant.file
        source = path.read_bytes()
        began = time.monotonic()
        try:
            path.write_text(mutant.applied(self.root), encoding="utf-8")
            status, output = self.test(mutant.tests, "-x")
        finally:
            path.write_bytes(source)
        seconds = time.monotonic() - began
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        by = "" if found is None else found[1]
        if status is None or "from pytest-timeout" in output:
            return Outcome(mutant, "timed out", seconds, by)
        if status == _FAILED or status < 0:  # below 0: a signal ended it
            return Outcome(mutant, "noticed", seconds, by)
        if status == _PASSED:
            return Outcome(mutant, "survived", seconds)
        return Outcome(mutant, "broken", seconds, output[-4000:])


def run_mutants(
    mutants: Sequence[Mutant], root: Path = ROOT, *, jobs: int = 1, limit: float = 120.0
) -> list[Outcome]:
    """Run mutants and return what came of each, in their order; prints each as it is done.

    Args:
        mutants: of `root`.
        root: the tree, which is copied and not changed.
        jobs: how many run at once, each in a copy of its own.
        limit: seconds for each test.

    Raises:
        StaleMutant: the list does not fit the tree; lists everything.
        RuntimeError: a test fails without any mutant.
    """
    jobs = max(1, min(jobs, len(mutants)))
    stale = [problem for one in mutants if (problem := one.problem(root)) is not None]
    if stale:
        raise StaleMutant("\n".join(stale))
    with tempfile.TemporaryDirectory(prefix="pymerge-mutants-") as name:
        folder = Path(name).resolve()
        copies: SimpleQueue[_Copy] = SimpleQueue()
        for number in range(jobs):
            (folder / str(number)).mkdir()
            copies.put(_Copy(root, folder / str(number), limit))
        tests = sorted({test for one in mutants for test in one.tests})
        shares = [tests[first::jobs] for first in range(min(jobs, len(tests)))]

        def unchanged(share: Sequence[str]) -> str:
            with _taken(copies) as copy:
                status, output = copy.test(share)
            return "" if status == _PASSED else output[-8000:] or "timed out"

        def run(one: Mutant) -> Outcome:
            with _taken(copies) as copy:
                return copy.outcome(one)

        found: dict[str, Outcome] = {}
        with ThreadPoolExecutor(jobs) as pool:
            print(f"{len(tests)} selections without a mutant", flush=True)
            if failing := "\n".join(filter(None, pool.map(unchanged, shares))):
                raise RuntimeError(f"tests fail without any mutant:\n{failing}")
            waiting = [pool.submit(run, one) for one in mutants]
            try:
                for future in as_completed(waiting):
                    outcome = future.result()
                    found[outcome.mutant.name] = outcome
                    print(_line(outcome), flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [found[one.name] for one in mutants]


@contextmanager
def _taken(copies: SimpleQueue[_Copy]) -> Iterator[_Copy]:
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def _line(outcome: Outcome) -> str:
    mutant = outcome.mutant
    mark = "  " if outcome.good else "! "
    by = f"  by {outcome.by}" if outcome.by and outcome.result != "broken" else ""
    return f"{mark}{outcome.result:<9} {outcome.seconds:6.1f} s  {mutant.file}: {mutant.name}{by}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the score, after what is not as it should be."""
    lines = []
    for outcome in outcomes:
        if outcome.good:
            continue
        lines.append(f"\n{outcome.result}: {outcome.mutant.file}: {outcome.mutant.name}")
        if outcome.result == "broken":
            lines.append(outcome.by)
        elif outcome.mutant.known:
            lines.append(f"  is marked as known to survive: {outcome.mutant.known}")
        else:
            lines += [f"  - {outcome.mutant.original}", f"  + {outcome.mutant.replacement}"]
    counted = [outcome for outcome in outcomes if not outcome.mutant.known]
    noticed = sum(outcome.result in ("noticed", "timed out") for outcome in counted)
    share = f" ({100 * noticed / len(counted):.0f} %)" if counted else ""
    known = len(outcomes) - len(counted)
    more = f"; {known} more may survive" if known else ""
    return "\n".join([*lines, f"\nnoticed {noticed} of {len(counted)} mutants{share}{more}"])


def main(mutants: Sequence[Mutant], arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all is as the list says, else 1 or, for a list that does
    not fit the sources, 2."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("-k", default="", metavar="TEXT", help="only those with it in name or file")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at once (default: 1)")
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="S", help="seconds for a test (default: 120)"
    )
    options = parser.parse_args(arguments)
    chosen = [one for one in mutants if options.k in one.name or options.k in one.file]
    if not chosen:
        parser.error(f"-k: there is no mutant with {options.k!r} in its name or file")
    try:
        outcomes = run_mutants(chosen, jobs=options.jobs, limit=options.limit)
    except StaleMutant as error:
        print(f"the list does not fit the sources:\n{error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(summary(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1
