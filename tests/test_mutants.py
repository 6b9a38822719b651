"""The list of mutants fits the sources, and its runner reports what tests notice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.faults import MUTANTS
from tests.mutants.mutant import StaleMutant, mutant
from tests.mutants.run import ROOT, run_mutants, summary


def test_the_list_fits_the_sources() -> None:
    """Each original occurs once, what replaces it is Python, and the tests are there."""
    names = [one.name for one in MUTANTS]
    problems = [f"{name}: is the name of several" for name in set(names) if names.count(name) > 1]
    sources: dict[str, str] = {}
    for one in MUTANTS:
        if (problem := one.problem(ROOT)) is not None:
            problems.append(problem)
        problems += [] if one.tests else [f"{one.name}: has no tests"]
        for test in one.tests:
            file, *parts = test.split("::")
            if file not in sources:
                path = ROOT / file
                sources[file] = path.read_text(encoding="utf-8") if path.is_file() else ""
            defined = [rf"^(async )?def {part.partition('[')[0]}\(" for part in parts]
            if not sources[file] or not all(re.search(d, sources[file], re.M) for d in defined):
                problems.append(f"{one.name}: there is no test {test}")
    assert not problems, "\n".join(problems)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package with two functions, of which one is tested."""
    files = {
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        "pymerge/__init__.py": "",
        "pymerge/sums.py": (
            "def total(values):\n    return sum(values)\n\n"
            "def count(values):\n    return len(values)\n"
        ),
        "tests/test_sums.py": (
            "from pymerge.sums import count, total\n\n"
            "def test_total():\n    assert total([1, 2]) == 3\n\n"
            "def test_count():\n    assert count([0]) + 1\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


TOTAL, COUNT = "tests/test_sums.py::test_total", "tests/test_sums.py::test_count"
FILE = "pymerge/sums.py"


def test_what_tests_notice(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytest_timeout")
    before = {path: path.read_bytes() for path in tree.rglob("*.*")}
    outcomes = run_mutants(
        [
            mutant("maximum", FILE, "sum(values)", "max(values)", TOTAL),
            mutant("one more", FILE, "len(values)", "len(values) + 1", COUNT),
            mutant(
                "endless", FILE, "    return sum", "    while True: pass\n    return sum", TOTAL
            ),
            mutant("zero", FILE, "len(values)", "0", COUNT, known="the test looks at nothing"),
            mutant("no module", FILE, "def count", "def counted", COUNT),
        ],
        tree,
        jobs=2,
        limit=1.0,
    )
    expected = ["noticed", "survived", "timed out", "survived", "broken"]
    assert [outcome.result for outcome in outcomes] == expected
    assert [outcome.good for outcome in outcomes] == [True, False, True, True, False]
    assert outcomes[0].by == TOTAL
    assert "noticed 2 of 4 mutants (50 %); 1 more may survive" in summary(outcomes)
    assert "survived: pymerge/sums.py: one more" in summary(outcomes)
    assert "timed out" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tree.rglob("*.*")} == before


def test_lists_that_do_not_fit(tree: Path) -> None:
    for stale, why in (
        (mutant("a", "pymerge/gone.py", "x", "y", TOTAL), "No such file"),
        (mutant("b", FILE, "values", "value", TOTAL), "found it 4 times"),
        (mutant("c", FILE, "sum(values)", "sum(values", TOTAL), "is no Python"),
        (mutant("d", FILE, "sum(values)", "(sum(values))", TOTAL), "changes nothing"),
    ):
        with pytest.raises(StaleMutant, match=why):
            run_mutants([stale], tree)


def test_what_notices_nothing_is_refused(tree: Path) -> None:
    """A test that fails anyway, one that is not there, an installed package in the copy's place."""
    maximum = mutant("maximum", FILE, "sum(values)", "max(values)", TOTAL)
    (tree / "tests" / "test_sums.py").write_text("def test_total():\n    assert False\n")
    with pytest.raises(RuntimeError, match="fail without any mutant"):
        run_mutants([maximum], tree)
    installed = f"__path__ = [{str(ROOT / 'pymerge')!r}]\n"
    (tree / "pymerge" / "__init__.py").write_text(installed)
    (tree / "tests" / "test_sums.py").write_text(
        "from pymerge import errors\n\ndef test_total():\n    pass\n"
    )
    with pytest.raises(RuntimeError, match=r"pymerge\.errors was imported from"):
        run_mutants([maximum], tree)
