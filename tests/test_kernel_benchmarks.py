"""`pytest benchmarks`: right results have times beside the streaming loop, wrong ones have none."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_table, run
from benchmarks.kernel_tables import GATHERING_CASES, MAIN_CASES, METHOD_CASES, tables
from benchmarks.tables import machine

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--elements", "16Ki", "--isa", "baseline", "--threads", "1", "--benchmark-max-time", "0")
ROWS = "linear-baseline or ties_mean-baseline"


def run_pytest(*arguments: object, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run pytest by itself, as none of the processes that run this test."""
    ours = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@dataclass(frozen=True)
class Saved:
    """A run that pytest-benchmark has saved in `storage`."""

    storage: Path
    printed: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    storage, measured = folder / "storage", folder / "measured.json"
    options = ("--benchmark-only", "--benchmark-storage", storage, "--benchmark-save", "before")
    # The limit of a test would end a benchmark; it has one of its own.
    options += ("--benchmark-json", measured, "--timeout", "0.01")
    done = run_pytest("benchmarks", *options, *SMALL, "-k", f"{ROWS} or torch")
    assert done.returncode == 0, done.stdout + done.stderr
    return Saved(storage, done.stdout, json.loads(measured.read_text()))


def kernels_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in result["benchmarks"] if "test_kernel[" in one["name"]}


def test_a_kernel_is_timed_in_turns_with_the_loop(saved: Saved) -> None:
    found = kernels_of(saved.result)
    assert len(found) > 2
    for one in found.values():
        stats, more = one["stats"], one["extra_info"]
        assert more["elements"] == 16 << 10
        assert stats["rounds"] == len(more["loop_seconds"]) == 5
        assert more["GB/s"] == pytest.approx(more["bytes"] / stats["median"] / 1e9)
        pairs = zip(more["loop_seconds"], stats["data"], strict=True)
        ratio = statistics.median(loop / kernel for loop, kernel in pairs)
        expected = ratio * more["bytes"] / more["loop_bytes"]
        assert more["of_streaming"] == pytest.approx(expected)
    linear = found["test_kernel[linear-baseline-1]"]
    assert linear["params"] == {"case": "linear", "isa": "baseline", "threads": 1}
    assert linear["extra_info"]["bytes"] == linear["extra_info"]["loop_bytes"] == 5 * 2 * (16 << 10)
    assert saved.result["machine_info"] == machine()


def test_the_terminal_shows_shares_beside_times(saved: Saved) -> None:
    lines = saved.printed.splitlines()
    assert any(line.startswith("test_kernel[ties_mean-baseline-1]") for line in lines)
    cells = [line.split("│")[1:-1] for line in lines if line.startswith("│ ties_mean ")]
    (ties,) = ([cell.strip() for cell in row] for row in cells)
    share = kernels_of(saved.result)["test_kernel[ties_mean-baseline-1]"]["extra_info"]
    assert ties[1:3] == ["baseline", "1"]
    assert ties[6:8] == ["12", f"{share['of_streaming']:.0%}"]
    assert ties[8].isdecimal()  # milliseconds of plain torch


def test_a_wrong_kernel_has_no_time(saved: Saved, tmp_path: Path) -> None:
    """Nor is it compared with a run in which it was right; the others are."""
    (tmp_path / "wrong_ties.py").write_text(
        "from pymerge.ops.native import cpu\n"
        "right = cpu.ties\n"
        "def ties(*arguments):\n"
        "    right(*arguments)\n"
        "    arguments[0][-1] += 1\n"
        "cpu.ties = ties\n"
    )
    measured = tmp_path / "measured.json"
    options = ("--benchmark-only", "--benchmark-storage", saved.storage, "--benchmark-compare")
    options += ("--benchmark-json", measured, "-p", "wrong_ties")
    done = run_pytest("benchmarks", *options, *SMALL, "-k", ROWS, path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WrongResult: ties_mean on baseline, 1 threads: at " in done.stdout
    assert "test_kernel[linear-baseline-1]" in kernels_of(json.loads(measured.read_text()))
    assert not [name for name in kernels_of(json.loads(measured.read_text())) if "ties" in name]
    lines = done.stdout.splitlines()
    linear = [line for line in lines if line.startswith("test_kernel[linear-baseline-1] (")]
    assert len(linear) == 2
    assert any("(NOW)" in line for line in linear)
    assert any("(0001_before)" in line for line in linear)
    before = kernels_of(saved.result)["test_kernel[linear-baseline-1]"]["extra_info"]
    (row,) = (line.split("│") for line in lines if line.startswith("│ linear "))
    assert row[-2].strip() == f"{before['of_streaming']:.0%}"
    assert not [line for line in lines if line.startswith(("test_kernel[ties", "│ ties"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--benchmark-compare", "--elements", "8Ki"), "with --elements 16384, this run has 8192"),
        (("--benchmark-compare", "0099"), "no saved run named 0099 in "),
    ],
    ids=["other size", "none"],
)
def test_what_cannot_be_compared(saved: Saved, arguments: tuple[str, ...], message: str) -> None:
    options = ("--benchmark-only", "--benchmark-storage", saved.storage, *SMALL, *arguments)
    done = run_pytest("benchmarks", *options, "-k", ROWS)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("ERROR: "))
    assert error.startswith("ERROR: --benchmark-compare: ")
    assert message in error


def test_turns_and_checks(tmp_path: Path) -> None:
    """What is not a kernel: the order of calls, and which benchmarks keep their time."""
    tests = tmp_path / "test_turns.py"
    tests.write_text(
        "import time\n"
        "def test_turns(timed):\n"
        "    calls = []\n"
        "    def beside():\n"
        "        time.sleep(0.01 * calls.count('beside'))\n"
        "        calls.append('beside')\n"
        "    turns = timed(\n"
        "        lambda: calls.append('function'),\n"
        "        beside=beside,\n"
        "        prepare=lambda: calls.append('prepare'),\n"
        "        check=lambda: calls.append('check'),\n"
        "    )\n"
        # One round to warm up, one to see how many rounds fit.
        "    assert calls == ['beside', 'prepare', 'function'] * (2 + 3) + ['check']\n"
        "    assert len(turns.seconds) == len(turns.beside) == 3\n"
        "    assert all(turns.beside[k] >= 0.01 * (k + 2) for k in range(3))\n"
        "def test_wrong(timed):\n"
        "    def check():\n"
        "        raise ValueError('wrong')\n"
        "    timed(lambda: None, check=check)\n"
        "def test_interrupted(timed):\n"
        "    calls = []\n"
        "    def function():\n"
        "        calls.append('function')\n"
        "        if len(calls) == 4:\n"
        "            raise KeyboardInterrupt\n"
        "    timed(function, check=lambda: None)\n"
    )
    measured = tmp_path / "measured.json"
    options = ("--benchmark-max-time", "0", "--benchmark-min-rounds", "3")
    options += ("--benchmark-storage", tmp_path / "storage", "--benchmark-json", measured)
    done = run_pytest("-p", "benchmarks.conftest", *options, "-c", os.devnull, tests)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    result = json.loads(measured.read_text())
    assert [one["name"] for one in result["benchmarks"]] == ["test_turns"]
    shown = [line for line in done.stdout.splitlines() if line.startswith("test_")]
    assert len([line for line in shown if line.startswith("test_turns ")]) == 1
    assert not [line for line in shown if line.startswith(("test_wrong ", "test_interrupted "))]


ISAS = ["baseline", "avx2", "avx512"]


def documented() -> dict[str, Any]:
    """Return the JSON of a run of what the documents show, each thing with a time of its own."""

    def records() -> Iterator[dict[str, Any]]:
        others = {*METHOD_CASES.values(), *GATHERING_CASES.values()} - set(MAIN_CASES)
        rows = [(case, isa, n) for case in MAIN_CASES for n in (1, 2) for isa in ISAS]
        rows += [(case, "avx512", 2) for case in sorted(others)]
        for place, (case, isa, threads) in enumerate(rows):
            name = f"test_kernel[{case}-{isa}-{threads}]"
            yield {
                "name": name,
                "fullname": f"benchmarks/test_kernels.py::{name}",
                "params": {"case": case, "isa": isa, "threads": threads},
                "stats": {"median": 0.01 + 0.0001 * place, "iqr": 0.001},
                "extra_info": {"elements": 2**20, "bytes": 12 * 2**20, "of_streaming": 0.75},
            }
        yield {
            "name": "test_plain_torch[ties_mean-2]",
            "fullname": "",
            "params": {"case": "ties_mean", "threads": 2},
            "stats": {"median": 4.5, "iqr": 0.1},
            "extra_info": {"elements": 2**20},
        }
        yield {
            "name": "test_vector_units[2]",
            "fullname": "",
            "params": {"threads": 2},
            "stats": {"median": 0.0001, "iqr": 0.0},
            "extra_info": {"times_one_thread": 1.25},
        }

    on = {**machine(), "isa": ISAS}
    return {
        "machine_info": on,
        "commit_info": {},
        "benchmarks": list(records()),
        "datetime": "2020-01-02T03:04:05+00:00",
        "version": "5",
    }


def test_tables_are_those_of_the_json() -> None:
    made = tables(documented())
    assert list(made) == ["kernels", "kernels-all", "methods"]
    assert made["kernels"].title == "CPU kernels, 1 Mi elements, bf16, K = 4, avx512, 2 threads"
    ties = next(row for row in made["kernels"].rows if row[0] == "ties_mean")
    # The sixth of six rows of the third of the cases.
    assert ties == ["ties_mean", "11.7", "1.1", "75%", "4500 ms (385x)"]
    assert len(made["kernels-all"].rows) == len(MAIN_CASES) * 3 * 2
    first = made["kernels-all"].rows[0]
    assert first == ["linear", "baseline", "1", "10.0", "10%", "1.3", "12", "75%", ""]
    assert [row[0] for row in made["methods"].rows] == [*METHOD_CASES, *GATHERING_CASES]
    assert any("1.25 times the work of one" in note for note in made["kernels"].notes)


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        ("ties_mean-avx2-1", ["kernels", "methods"]),
        ("ties_mergekit-avx512-2", ["methods"]),
        ("row_ranks-avx512-2", ["kernels", "kernels-all"]),
        ("torch", ["kernels", "kernels-all", "methods"]),
    ],
)
def test_a_part_of_a_run_makes_no_table(missing: str, left: list[str]) -> None:
    result = documented()
    result["benchmarks"] = [one for one in result["benchmarks"] if missing not in one["name"]]
    assert list(tables(result)) == left


def test_documents_keep_a_table_that_the_newest_run_has_not(tmp_path: Path) -> None:
    old, new = documented(), copy.deepcopy(documented())
    new["datetime"] = "2021-05-06T07:08:09+00:00"
    new["benchmarks"] = [one for one in new["benchmarks"] if "row_ranks" not in one["name"]]
    for result in (old, new):
        run.keep_kernels(json.dumps(result), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"kernels-{day}.{kind}" for day in ("2020-01-02", "2021-05-06") for kind in ("json", "md")
    ]
    found = readme_table.latest_tables(tmp_path)
    assert found["kernels"].endswith("2021-05-06.\n")
    assert found["methods"].endswith("2020-01-02.\n")
    assert "2020-01-02." in (tmp_path / "kernels-2020-01-02.md").read_text()


@pytest.mark.parametrize(
    ("code", "arguments", "kept"), [(0, [], 2), (1, [], 0), (0, ["--quick"], 0)]
)
def test_only_what_was_right_is_kept(
    code: int,
    arguments: list[str],
    kept: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        assert command[len(command) - len(arguments) :] == arguments
        (path,) = (part for part in command if part.startswith("--benchmark-json="))
        Path(path.partition("=")[2]).write_text(json.dumps(documented()))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", measure)
    assert run.run_kernels(tmp_path, arguments) == code
    assert len(list(tmp_path.iterdir())) == kept
