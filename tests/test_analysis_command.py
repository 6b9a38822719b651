"""`pymerge analyze`, the files it writes, bad input, and advice."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
import pymerge.commands.main
from pymerge.analysis import advise, averaging_coefficient, output, write_analysis
from pymerge.analysis.summary import print_summary
from pymerge.ops.native import cpu
from tests import models
from tests.models import State

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting


def run(*arguments: str | Path) -> int:
    """Return the exit code of a command, whichever way it comes."""
    try:
        return pymerge.commands.main.main(["analyze", *(str(argument) for argument in arguments)])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base, tuned = models.llama(2, layers=1)
    models.save_family(tmp_path, base, tuned, files=(2, 1, 3))
    return tmp_path


def test_command_writes_and_says_what_it_found(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root / "report"
    arguments = (root / "base", root / "m0", root / "m1", "--out", out, "--no-html")
    assert run(*arguments, "--names", "german,legal", "--scores", "0.9,0.8") == 0
    printed = capsys.readouterr().out
    for wanted in ("german / legal", "conflict @0.2", "3 passes", "heuristic: Average of german"):
        assert wanted in printed
    assert "left out, since they hold integers or booleans" in printed
    assert max(len(line) for line in printed.splitlines() if " / " in line) <= 140
    assert sorted(path.name for path in out.iterdir()) == [
        "analysis.json",
        "groups.csv",
        "pairs.csv",
    ]
    found = output.load_analysis(out)
    assert found == output.load_analysis(out / "analysis.json")
    assert found.labels == ("german", "legal")
    groups = list(csv.DictReader(io.StringIO((out / "groups.csv").read_text())))
    assert len(groups) == 2 * (1 + len(found.layers) + len(found.module_types) + len(found.tensors))
    assert float(groups[1]["l2"]) == found.whole.l2[1]
    assert float(groups[0]["kept@0.2"]) == found.whole.trimmed[1].kept[0]
    pairs = list(csv.DictReader(io.StringIO((out / "pairs.csv").read_text())))
    assert (pairs[0]["scope"], pairs[0]["model_a"]) == ("whole", "german")
    assert float(pairs[0]["overlap@0.5"]) == found.whole.trimmed[2].overlap[0][1]
    empty = next(row for row in pairs if row["name"] == "model.none.weight")
    assert empty["cosine"] == ""
    assert run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(*arguments, "--force", "--quiet", "--densities", "") == 0
    assert capsys.readouterr().out == ""
    assert output.load_analysis(out).densities == ()


def test_command_prints_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root / "base", root / "m0", "--json", "--quiet", "--thresholds", "exact") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["models"] == [{"label": "m0", "path": str(root / "m0")}]
    assert data["facts"]["thresholds"] == "exact"
    assert data["whole"]["cosine"] == [[1.0]]


def test_files_are_analysed_without_torch(root: Path) -> None:
    """Importing torch takes longer than analysing half a billion parameters."""
    if cpu.reason() is not None:
        pytest.skip("the native library is not there")
    code = (
        "import sys\nfrom pymerge.commands.main import main\n"
        f"code = main(['analyze', {str(root / 'base')!r}, {str(root / 'm0')!r},"
        f" '--no-html', '--out', {str(root / 'out')!r}])\n"
        "assert code == 0 and 'torch' not in sys.modules, code\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_spectra_have_a_table(root: Path) -> None:
    out = root / "report"
    options = ("--no-html", "--quiet", "--spectra", "--rank", "2", "--out", out)
    assert run(root / "base", root / "m0", root / "m1", *options) == 0
    rows = list(csv.DictReader(io.StringIO((out / "spectra.csv").read_text())))
    assert {row["model"] for row in rows} == {"m0", "m1"}
    assert 1 < float(rows[0]["effective_rank"]) < 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "1"], "--scores: expected 2, one for each model; got 1"),
        (["--scores", "a,b"], "expected numbers with commas between them, got 'a,b'"),
        (["--densities", "0,0.5"], "densities: expected numbers in (0, 1], got 0.0"),
        (["--names", "a,a"], "names: expected 2 different names"),
        (["--rank", "0"], "expected an integer >= 1, got '0'"),
        (["--out", "base", "--force"], "base"),
    ],
)
def test_bad_arguments(
    root: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(root)
    assert run("base", "m0", "m1", "--no-html", *arguments) == 2
    assert message in capsys.readouterr().err
    assert (root / "base" / "config.json").exists()


def changed(root: Path, name: str, **tensors: torch.Tensor | None) -> Path:
    """Write a copy of a model with tensors replaced or (None) left out."""
    state: State = models.load(root / "m0")
    for key, tensor in tensors.items():
        key = key.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return models.save(root / name, state)


def test_models_that_do_not_fit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacks = changed(root, "lacks", model__norm__weight=None)
    extra = changed(root, "extra", new=torch.zeros(2))
    other = changed(root, "other", model__norm__weight=torch.zeros(3).bfloat16())
    assert run(root / "base", lacks, extra, other, root / "nowhere") == 2
    error = capsys.readouterr().err
    for wanted in (
        "lacks 1 tensor of base_model: 'model.norm.weight'",
        "has 1 tensor that base_model lacks: 'new'",
        "'model.norm.weight' has shape (3,), expected (64,) like base_model",
        "analyze: models[3]: no such file or directory",
    ):
        assert wanted in error


def test_nan_and_infinity(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = torch.ones(64).bfloat16()
    norm[3], norm[7] = float("nan"), float("inf")
    bad = changed(root, "bad", model__norm__weight=norm)
    assert run(root / "base", root / "m0", bad) == 2
    error = capsys.readouterr().err
    assert "tensor 'model.norm.weight' holds NaN or infinity, 2 of them" in error
    assert str(bad) in error
    found = pymerge.analyze(root / "base", [root / "m0", bad], nan="skip")
    assert "model.norm.weight" not in [tensor.name for tensor in found.inventory]
    assert any("left out" in note and "'model.norm.weight'" in note for note in found.notes)
    base, tuned = models.llama(2, layers=1)
    for state in (base, *tuned):
        del state["model.norm.weight"]
    alone = pymerge.analyze(base, [tuned[0], tuned[0]])
    assert found.whole.l2[0] == alone.whole.l2[0]
    assert found.whole.trimmed[0].threshold == alone.whole.trimmed[0].threshold


@pytest.mark.parametrize(
    ("base", "tuned", "options", "message"),
    [
        (torch.zeros(2), torch.zeros(2), {}, "models: expected a list of models, got Tensor"),
        (torch.zeros(2), [], {}, "models: expected 1 to 64 models, got 0"),
        (torch.zeros(2), [torch.zeros(3)], {}, r"has shape \(3,\), expected \(2,\) like base"),
        ({"a": torch.zeros(1)}, [{}], {}, r"models\[0\] lacks \['a'\] of base"),
        (torch.zeros(2), ["x"], {}, "expected paths only, or models in memory only"),
        (torch.zeros(2).int(), [torch.zeros(2).int()], {}, "holds no tensors of floats"),
        (torch.zeros(2), [torch.zeros(2)], {"nan": "keep"}, "nan: expected 'error' or 'skip'"),
        (torch.zeros(2), [torch.zeros(2)], {"backend": "cuda"}, "backend: expected cpu, reference"),
        (torch.zeros(2), [torch.zeros(2)], {"thresholds": "x"}, "expected 'sampled' or 'exact'"),
        (torch.zeros(2), [torch.zeros(2)], {"threads": 0}, "threads: expected an integer"),
    ],
)
def test_bad_calls(base: Any, tuned: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(pymerge.RequestError, match=message):
        pymerge.analyze(base, tuned, **options)


def test_output_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pymerge.analyze(torch.zeros(3), [torch.ones(3)])

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(pymerge.MergeError, match="No space left"):
        write_analysis(found, tmp_path / "out", html=False)
    assert list(tmp_path.iterdir()) == []


def test_summary_of_many_models_is_short() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{k}.w": torch.zeros(4) for k in range(20)}
    tuned = [{name: torch.randn(4, generator=generator) for name in base} for _ in range(9)]
    for model in tuned:
        model["layers.3.w"] /= 100
        model["layers.7.w"] *= 100
    text = io.StringIO()
    print_summary(pymerge.analyze(base, tuned), stream=text)
    assert "Pairs (28 of 36, of largest cosine)" in text.getvalue()
    layers = text.getvalue().partition("Layers (12 of 20, of largest norm)")[2].split()
    assert "7" in layers
    assert "3" not in layers
    assert "\x1b" not in text.getvalue()


def test_averaging_coefficient() -> None:
    assert averaging_coefficient(1.0, 0.9, 0.1) == 0.5
    assert averaging_coefficient(0.0, 0.9, 0.1) == 1.0
    assert averaging_coefficient(-0.5, 0.1, 0.9) == 0.0
    assert averaging_coefficient(0.4, 0.80, 0.82) == pytest.approx(0.5 - 0.4 * 0.6 / 2)
    assert averaging_coefficient(0.0, 70.0, 60.0, decisive=20.0) == 0.75
    for arguments in ((1.1, 0, 0), (0, math.nan, 0)):
        with pytest.raises(pymerge.RequestError, match="averaging_coefficient"):
            averaging_coefficient(*arguments)
    with pytest.raises(pymerge.RequestError, match="decisive: expected above 0"):
        averaging_coefficient(0.0, 0.0, 0.0, decisive=0.0)


def test_advice() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(20_000)
    tuned = [torch.randn(20_000, generator=generator) for _ in range(4)]
    found = pymerge.analyze(base, tuned)
    advice = advise(found, scores=[0.9, 0.9, 0.5, 0.1])
    assert advice.scale is not None
    assert advice.scale == pytest.approx(0.5, abs=0.02)  # orthogonal: 1 / sqrt(4)
    assert advice.scale_range == pytest.approx((advice.scale / 2, advice.scale * 1.5))
    assert advice.density == 0.2  # 65 % of the squared norm of normal numbers
    alphas = {(i, j): alpha for i, j, alpha in advice.averages}
    assert alphas[0, 1] == pytest.approx(0.5, abs=0.02)
    assert alphas[0, 3] == pytest.approx(1.0, abs=0.02)
    same = advise(pymerge.analyze(base, [tuned[0]] * 3, densities=[0.01]))
    assert same.scale == pytest.approx(1 / 3)
    assert same.density is None
    few = torch.zeros(20_000)
    few[:100] = 1.0  # which any density keeps
    assert advise(pymerge.analyze(base, [tuned[0], few], densities=[0.1, 0.5])).density == 0.5
    assert advise(pymerge.analyze(base, [tuned[0], -tuned[0]])).scale is None
    zero = advise(pymerge.analyze(base, [base, base]), scores=[1.0, 2.0])
    assert (zero.scale, zero.density, zero.averages) == (None, None, ((0, 1, None),))
    with pytest.raises(pymerge.RequestError, match="scores: expected 4, one for each model"):
        advise(found, scores=[1.0])
