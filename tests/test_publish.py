"""What surrounds the making of an output directory: problems together, nothing half done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.adapters import extract_lora, fold, run_merge_adapters
from pymerge.errors import MergeError, RequestError
from pymerge.merging.publish import Publication
from tests import models
from tests.adapter_files import factors, save_lora

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting

SHAPES = {"h.0.q": (12, 20), "h.0.k": (16, 20)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, a fine-tune of it, and two adapters."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    tuned = {n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        Path(name).mkdir()
        save_file(tensors, f"{name}/model.safetensors")
    for seed, name in enumerate("ab"):
        save_lora(Path(name), factors(SHAPES, 4, seed))
    return tmp_path


def merge(out: str, **more: Any) -> Any:
    config = {"merge_method": "linear", "models": [{"model": "base"}, {"model": "tuned"}]}
    return pymerge.merge_checkpoints(config, out, **more)


def merge_adapters(out: str, **more: Any) -> Any:
    entries = [{"model": name} for name in "ab"]
    return run_merge_adapters({"merge_method": "task_arithmetic", "models": entries}, out, **more)


def merge_onto(out: str, **more: Any) -> Any:
    entries = [{"model": name} for name in "ab"]
    config = {"merge_method": "task_arithmetic", "models": entries, "base_model": "base"}
    return run_merge_adapters(config, out, **more)


RUNS = {
    "merge": merge,
    "fold": lambda out, **more: fold("base", "a", out, **more),
    "merge-adapters": merge_adapters,
    "onto": merge_onto,
    "extract": lambda out, **more: extract_lora("base", "tuned", out, rank=2, **more),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_ritual(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is in the directory; existing files are not replaced unasked, or in part."""
    before = set(here.iterdir())
    run("out")
    (name,) = [path.name for path in Path("out").glob("pymerge_*.json")]
    assert json.loads(Path("out", name).read_text())["seconds"] > 0
    files = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(RequestError, match=r"out \(out\): exists already"):
        run("out")
    for target in ("base", "a") if run is not RUNS["extract"] else ("base", "tuned"):
        if (run, target) not in ((merge, "a"), (merge_adapters, "base")):
            with pytest.raises(RequestError, match=rf"out \({target}\): is the input {target}"):
                run(target, force=True)
    original = Path.write_text

    def failing(path: Path, *arguments: Any, **keywords: Any) -> int:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return original(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", failing)
        with pytest.raises(MergeError, match=rf"{name}: cannot be written: No space"):
            run("out", force=True)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == files
    assert set(here.iterdir()) == before | {here / "out"}
    report = run("out", force=True)
    assert report.seconds > 0
    assert report.warnings == []


def test_problems_come_together(here: Path) -> None:
    with pytest.raises(RequestError) as caught:
        merge("base", threads=0, report="gone/report.json", device="mars", force=True)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("device", "threads: expected at least 1", "report: the directory gone", "input"):
        assert part in text


def test_an_adapter_of_the_base_is_folded_in(here: Path) -> None:
    """`base_model: BASE+ADAPTER` in a configuration of adapters."""
    entries = [{"model": "b"}]
    config = {"merge_method": "task_arithmetic", "models": entries, "base_model": "base+a"}
    run_merge_adapters(config, "out")
    fold("base", "a", "one")
    fold("one", "b", "two")
    expected, got = (load_file(f"{name}/model.safetensors") for name in ("two", "out"))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor)
    inputs = json.loads(Path("out/pymerge_report.json").read_text())["inputs"]
    assert [len(one["files"]) for one in inputs] == [3, 2]


@pytest.mark.skipif(os.name != "posix", reason="needs paths of bytes")
def test_paths_that_are_not_utf8(here: Path) -> None:
    out = os.fsdecode(b"out-\xff")
    merge(out)
    report = json.loads(Path(out, "pymerge_report.json").read_text())
    assert report["output"]["path"] == str(Path(out).absolute())


def test_nothing_is_left_of_a_failure(here: Path) -> None:
    before = set(here.iterdir())
    with Publication("out", [], force=False) as output:
        output.begin()
        output.write("x", "x")
    assert set(here.iterdir()) == before
