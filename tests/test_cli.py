"""The command line: what it prints, exit codes, what it does not import.

The engine is a stand-in here.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pymerge.commands.main
from pymerge.config import load_config
from pymerge.errors import CheckpointError, MergeError, NonFiniteError, RequestError
from pymerge.memory import PeakMemory, available_memory
from pymerge.merging import files as merging
from pymerge.merging.card import model_card
from pymerge.merging.report import InputFile, InputReport, MergeReport, OutputReport, Phase
from pymerge.methods import METHODS


def run(*arguments: str | Path) -> int:
    """Return the exit code of a command, whichever way it comes."""
    try:
        return pymerge.commands.main.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


def make_report(**changes: Any) -> MergeReport:
    values: dict[str, Any] = {
        "method": "ties",
        "config": {"merge_method": "ties"},
        "config_text": "merge_method: ties\n",
        "seed": 0,
        "backend": "cpu",
        "isa": "avx2",
        "device": "cpu",
        "threads": 2,
        "inputs": [InputReport("base_model (b)", "/b", [InputFile("model.safetensors", 10, "ab")])],
        "output": OutputReport("/a/very/long/path" * 20, {"model.safetensors": 2048}, 2048),
        "tensors": 3,
        "parameters": 1000,
        "phases": {"plan": Phase(0.01), "merge": Phase(2.0, 4_000_000_000)},
        "seconds": 2.5,
        "peak_anonymous": 300 << 20,
        "peak_resident": 2 << 30,
        "warnings": ["config.yml:1: something odd"],
    }
    return MergeReport(**{**values, **changes})


class FakeEngine:
    """Records the call, and returns a report or raises."""

    def __init__(self, result: MergeReport | BaseException) -> None:
        self.result = result
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> MergeReport:
        self.calls.append((args, kwargs))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    stand_in = FakeEngine(make_report())
    monkeypatch.setattr(merging, "merge_checkpoints", stand_in)
    monkeypatch.delenv("PYMERGE_DEBUG", raising=False)
    return stand_in


# merge


def test_merge_passes_its_options_to_the_engine(fake: FakeEngine) -> None:
    assert run("merge", "c.yml", "out") == 0
    assert fake.calls == [
        (
            ("c.yml", "out"),
            {
                "device": "auto",
                "backend": "auto",
                "memory": 2 << 30,
                "device_memory": None,
                "threads": None,
                "shard_size": 5_000_000_000,
                "seed": 0,
                "report": None,
                "force": False,
                "quiet": False,
                "checksums": False,
            },
        )
    ]
    options = (
        "--device cuda:1 --backend reference --memory 512MiB --device-memory 4GiB --threads 3 "
        "--shard-size 1GB --seed 7 --report r.json --force --quiet --checksums"
    )
    assert run("merge", "c.yml", "out", *options.split()) == 0
    assert fake.calls[1][1] == {
        "device": "cuda:1",
        "backend": "reference",
        "memory": 512 << 20,
        "device_memory": 4 << 30,
        "threads": 3,
        "shard_size": 10**9,
        "seed": 7,
        "report": "r.json",
        "force": True,
        "quiet": True,
        "checksums": True,
    }


def test_options_take_their_least_numbers(
    fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", "c.yml", "out", "--seed", "0", "--threads", "1") == 0
    assert (fake.calls[0][1]["seed"], fake.calls[0][1]["threads"]) == (0, 1)
    for option, least in (("--seed", 0), ("--threads", 1)):
        assert run("merge", "c.yml", "out", f"{option}={least - 1}") == 2
        assert f"expected an integer >= {least}, got '{least - 1}'" in capsys.readouterr().err


def test_merge_prints_a_summary_and_keeps_long_paths_whole(
    fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", "c.yml", "out") == 0
    captured = capsys.readouterr()
    assert "ties: 3 tensors, 1,000 parameters -> " + "/a/very/long/path" * 20 in captured.out
    assert "wrote 2.00 KiB in 1 file, 2.50 s, backend cpu (avx2) on cpu, 2 threads" in captured.out
    assert "merge: 2.00 s, 3.73 GiB at 2.00 GB/s" in captured.out
    assert "peak memory 300.0 MiB allocated, 2.00 GiB with mapped files" in captured.out
    assert captured.err == "pymerge: warning: config.yml:1: something odd\n"


def test_quiet_prints_nothing(fake: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "c.yml", "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestError(["first", "second"]), 2, "2 problems:\n  - first\n  - second\n"),
        (CheckpointError("models[0]: damaged"), 2, "models[0]: damaged\n"),
        (NonFiniteError("models[0]: 'x' holds NaN"), 2, "models[0]: 'x' holds NaN\n"),
        (MergeError("out: no space left"), 1, "out: no space left\n"),
        (
            PermissionError(13, "Permission denied", "/out"),
            1,
            "[Errno 13] Permission denied: '/out'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    fake: FakeEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.result = error
    assert run("merge", "c.yml", "out", "--quiet") == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"pymerge: error: {message}"


def test_debug_shows_the_traceback(
    fake: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMERGE_DEBUG", "1")
    fake.result = RequestError("bad")
    assert run("merge", "c.yml", "out") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_an_error(fake: FakeEngine) -> None:
    fake.result = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run("merge", "c.yml", "out")


def test_sigterm_unwinds_the_merge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unwound: list[bool] = []

    def merge(*_args: Any, **_kwargs: Any) -> MergeReport:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)
        raise AssertionError

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(merging, "merge_checkpoints", merge)
    assert run("merge", "c.yml", "out") == 143
    assert unwound == [True]
    assert capsys.readouterr().err == "pymerge: error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("merge c.yml", "the following arguments are required: OUT"),
        ("merge c.yml out --memory 2G", "did you mean 2GiB or 2GB?"),
        ("merge c.yml out --memory 0", "argument --memory: expected a size such as 2GiB"),
        ("merge c.yml out --shard-size big", "argument --shard-size: expected a size"),
        ("merge c.yml out --threads 0", "argument --threads: expected an integer >= 1, got '0'"),
        ("merge c.yml out --seed -1", "argument --seed: expected an integer >= 0, got '-1'"),
        ("merge c.yml out --seed 1.5", "argument --seed: expected an integer >= 0, got '1.5'"),
        ("merge c.yml out --device gpu", "expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (
            "merge c.yml out --backend numpy",
            "argument --backend: expected one of auto, reference, cpu, cuda, tri",
        ),
        ("merge c.yml out --nonsense", "unrecognized arguments: --nonsense"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("methods tise", "unknown merge method 'tise'; did you mean 'ties'?"),
        ("plan no/such/config.yml", "no/such/config.yml: no such file"),
        ("", "usage: pymerge"),
    ],
)
def test_bad_requests_exit_with_2(
    arguments: str, message: str, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert fake.calls == []


# methods, info, start-up


def test_every_module_of_the_commands_is_a_command() -> None:
    folder = Path(pymerge.commands.main.__file__).parent
    found = {path.stem for path in folder.glob("*.py")} - {"__init__", "main", "options", "words"}
    listed = {command.__name__.rpartition(".")[2] for command in pymerge.commands.main.COMMANDS}
    assert found == listed


def test_methods_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods") == 0
    out = capsys.readouterr().out
    for name in ("linear", "task_arithmetic", "ties"):
        assert f"\n{name} " in out
    assert run("methods", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == list(METHODS)


def test_methods_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "ties") == 0
    out = capsys.readouterr().out
    for part in (
        "Yadav et al.",
        "arxiv.org/abs/2306.01708",
        "lambda / scale",
        "sd_mecha",
        "[0, 1]",
    ):
        assert part in out
    assert run("methods", "ties", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    density = next(item for item in record["parameters"] if item["name"] == "density")
    assert (density["default"], density["yaml_default"]) == (0.2, 1.0)
    assert (density["minimum"], density["maximum"]) == (0.0, 1.0)
    assert density["scope"] == "model"


def test_info_says_what_runs_and_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {
        "native": {"isa": "avx2", "isa_built": {"avx2": True, "avx512": False}},
        "backends": {
            "cpu": {"available": True, "reason": "C++"},
            "cuda": {"available": False, "reason": "no CUDA"},
        },
    }
    methods = {
        "ties": {"cpu": True, "cuda": "no CUDA"},
        "linear": {"cpu": "odd", "cuda": True},
    }
    monkeypatch.setattr("pymerge.ops.backends.describe", lambda: described)
    monkeypatch.setattr("pymerge.commands.info.support", lambda _backends: methods)
    assert run("info") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("torch ") for line in lines)
    assert "isa_built   avx2, no avx512" in lines
    assert "cpu         available: C++" in lines
    assert "cuda        not available: no CUDA" in lines
    assert "ties              cpu" in lines
    assert "cpu: odd" in lines
    assert run("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backends"] == described["backends"]
    assert info["methods"] == methods
    assert {"pymerge", "python", "torch", "platform", "cuda", "triton"} <= set(info)


def test_info_of_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backends"]["reference"]["available"] is True


@pytest.mark.parametrize(
    "command", ["--help", "--version", "methods", "methods ties", "merge --help"]
)
def test_light_commands_do_not_import_torch(command: str) -> None:
    code = (
        "import sys\nfrom pymerge.commands.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as e:\n    code = e.code\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_python_m_pymerge_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pymerge", "methods", "nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown merge method 'nope'" in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pymerge", "methods"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


# The report and the card


def test_a_report_survives_json(tmp_path: Path) -> None:
    report = make_report()
    report.write(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert MergeReport.from_json(text) == report
    with pytest.raises(RequestError, match="report: expected a report of format 1"):
        MergeReport.from_json(text.replace('"format": 1', '"format": 2'))
    assert set(json.loads(text)["versions"]) == {"pymerge", "python", "torch", "platform"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "method": "ties"}']
)
def test_what_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="report: "):
        MergeReport.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 1e999}, "report: holds a number that is too large"),
        ({"config": {"a": [1, 1e999]}}, "report: holds a number that is too large"),
        ({"phases": {"\ud800": {"seconds": 1.0}}}, r"report: holds '\\ud800', which UTF-8 cannot"),
        ({"threads": True}, "report: threads: expected an integer, got True"),
        ({"threads": 2.0}, r"report: threads: expected an integer, got 2\.0"),
        ({"later": 1}, "report: expected the fields "),
    ],
)
def test_a_report_that_no_merge_writes_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_report().write(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    text = json.dumps(data | changes).replace("Infinity", "1e999")
    with pytest.raises(RequestError, match=message):
        MergeReport.from_json(text)


def test_the_card_holds_the_config_and_valid_front_matter(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "config.yml"
    path.write_text(
        "# ``` in a comment\nmerge_method: ties\nbase_model: /data/secret/base\n"
        "models: [{model: /data/secret/a`b}, {model: org/c}]",
        encoding="utf-8",
    )
    card = model_card(
        "my_*model*", load_config(path), version="1.2", side_files=["config.json", "tokenizer.json"]
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "pymerge"]}
    assert body.startswith("# my\\_\\*model\\*\n")
    assert "pymerge 1.2" in body
    assert "[TIES (trim, elect sign, disjoint merge)](https://arxiv.org/abs/2306.01708)" in body
    assert "* ``a`b``\n* `org/c`\n" in body
    assert f"````yaml\n{path.read_text(encoding='utf-8')}\n````\n" in body
    bare = model_card("x", load_config(path), version="1.2")
    assert "library_name" not in bare


def test_peak_memory_sees_an_allocation_that_is_gone_again() -> None:
    size = 64 << 20
    with PeakMemory() as before:
        pass
    with PeakMemory(interval=0.001) as peak:
        # Pages of its own: malloc may give what another test has freed, and what is counted yet.
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[::4096] = b"x" * len(block[::4096])
        for _ in range(200):
            if peak.anonymous >= before.anonymous + size // 2:
                break
            time.sleep(0.005)
        block.close()
    assert peak.anonymous >= before.anonymous + size // 2
    assert peak.resident >= peak.anonymous // 2


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_available_memory_is_in_bytes() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total / 200 < available_memory() <= total


def test_commands_run_in_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the main thread may say what SIGTERM does."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run("methods", "ties")))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "elects signs" in capsys.readouterr().out
