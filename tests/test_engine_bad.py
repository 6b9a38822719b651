"""Bad input end to end: one clear error that names the culprit, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pymerge
from pymerge.commands.main import main
from tests import models
from tests.models import State

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

COUNT = 2
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "ties-official": {"density": 0.3, "semantics": "official"},
    "ties-untrimmed": {"density": 1.0},
    "ties-empty": {"density": 0.0},
}


def config_of(root: Path, method: str = "linear", **parameters: Any) -> dict[str, Any]:
    arguments = METHODS.get(method, {}) | parameters
    return models.config(root, method.split("-")[0], COUNT, **arguments)


@pytest.fixture(scope="module")
def family() -> tuple[State, list[State]]:
    return models.llama(COUNT, layers=1, hidden=32, mlp=48)


@pytest.fixture
def root(tmp_path: Path, family: tuple[State, list[State]]) -> Iterator[Path]:
    """Three models; whatever a test does, nothing but them and what it made itself may be left."""
    base, tuned = family
    models.save_family(tmp_path, base, tuned, files=2)
    yield tmp_path
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir() if "pymerge" in path.name]
    assert left == []


def replace(root: Path, which: str, state: State, **changes: torch.Tensor) -> None:
    """Write a model anew with some tensors changed (named with __ for .)."""
    shutil.rmtree(root / which)
    changed = state | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    models.save(root / which, changed, files=2)


def refused(
    root: Path, config: dict[str, Any], kind: type[Exception] = pymerge.RequestError, **options: Any
) -> str:
    with pytest.raises(kind) as caught:
        pymerge.merge_checkpoints(config, root / "out", **options)
    return str(caught.value)


# NaN and infinity

PLACES = ("base", "m0", "m1")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_named(
    method: str, value: float, backend: str, root: Path, family: tuple[State, list[State]]
) -> None:
    """Wherever it is, also where nothing of the model is kept, and at the ends of a tensor."""
    states = dict(zip(PLACES, (family[0], *family[1]), strict=True))
    name = "model.layers.0.mlp.up_proj.weight"
    for place, index in zip(PLACES, (0, 777, -1), strict=True):
        if place == "base" and method == "linear":
            continue
        tensor = states[place][name].clone()
        tensor.view(-1)[index] = value
        replace(root, place, states[place], **{name: tensor})
        message = refused(root, config_of(root, method), pymerge.NonFiniteError, backend=backend)
        label = "base_model" if place == "base" else f"models[{place[1]}]"
        assert message.startswith(f"{label} ({root / place}): tensor '{name}' holds {value} ")
        assert f"flat index {index % tensor.numel()};" in message
        assert "nan='keep'" in message
        replace(root, place, states[place])


def test_tiny_tensors_are_looked_at_too(root: Path, family: tuple[State, list[State]]) -> None:
    name = models.MERGED_BUFFERS[0]
    replace(root, "m1", family[1][1], **{name: torch.tensor(float("nan")).bfloat16()})
    for method in METHODS:
        message = refused(root, config_of(root, method), pymerge.NonFiniteError)
        assert f"models[1] ({root / 'm1'}): tensor '{name}' holds nan" in message


def test_an_overflow_is_not_the_inputs_fault(
    tmp_path: Path, family: tuple[State, list[State]]
) -> None:
    """Finite inputs are merged, also where a difference or the result overflows to infinity."""
    base, tuned = family
    name = "model.norm.weight"
    base = base | {name: torch.full_like(base[name], -2e38)}
    tuned = [model | {name: torch.full_like(model[name], 2e38)} for model in tuned]
    models.save_family(tmp_path, base, tuned)
    for method in METHODS:
        if method == "ties-empty":
            continue
        config = config_of(tmp_path, method)
        if method != "ties-official":
            config["parameters"]["normalize"] = False
        for backend in ("reference", "cpu"):
            pymerge.merge_checkpoints(config, tmp_path / method / backend, backend=backend)
        first, second = (models.load(tmp_path / method / name) for name in ("reference", "cpu"))
        models.assert_same(second, first)
        assert bool(torch.isinf(first[name]).any()), method
        assert bool(torch.isfinite(first["lm_head.weight"]).all())


@pytest.mark.parametrize("method", METHODS)
def test_keep_lets_them_through_bit_by_bit(
    method: str, tmp_path: Path, family: tuple[State, list[State]]
) -> None:
    base, tuned = family
    name = "model.layers.0.self_attn.q_proj.weight"
    spoiled = []
    for k, state in enumerate((base, *tuned)):
        tensor = state[name].clone().view(-1)
        tensor[10 * k : 10 * k + 3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        tensor[50:52] = torch.tensor([float("inf"), float("nan")])
        spoiled.append(state | {name: tensor.view_as(state[name])})
    models.save_family(tmp_path, spoiled[0], spoiled[1:])
    config = config_of(tmp_path, method, nan="keep")
    for backend in ("reference", "cpu"):
        pymerge.merge_checkpoints(config, tmp_path / backend, backend=backend)
    first, second = (models.load(tmp_path / backend) for backend in ("reference", "cpu"))
    for key, tensor in first.items():
        same = torch.equal(tensor.nan_to_num(nan=123.0), second[key].nan_to_num(nan=123.0))
        assert same, key
        assert torch.equal(tensor.isnan(), second[key].isnan()), key
    touched = first[name].view(-1)
    assert bool(touched[:3].isnan().any()) or method == "linear"
    assert bool((~touched[50:52].isfinite()).all())
    assert bool(touched[100:].isfinite().all())
    if "official" in method:  # what is not finite counts among the largest of the whole model
        return
    arguments = dict(METHODS[method])
    if method.startswith("ties"):
        arguments["semantics"] = "mergekit"
    origin = None if method == "linear" else base
    clean = pymerge.merge(method.split("-")[0], origin, tuned, **arguments)
    for key in first:
        assert key == name or torch.equal(first[key], clean[key]), key


# models that do not fit, files that are damaged


def test_unequal_integers_are_named(root: Path, family: tuple[State, list[State]]) -> None:
    for name in models.COPIED_BUFFERS:
        tensor = family[1][1][name].clone()
        tensor.view(-1)[5] = ~tensor.view(-1)[5] if tensor.dtype == torch.bool else 999
        replace(root, "m1", family[1][1], **{name: tensor})
        for method in ("linear", "ties", "ties-official"):
            message = refused(root, config_of(root, method))
            assert message.startswith(f"models[1] ({root / 'm1'}): tensor '{name}' is of dtype ")
            assert "must equal" in message
            assert "flat index 5 " in message
            assert ("999 where that has 5" in message) == (tensor.dtype == torch.int64)


def test_everything_wrong_is_listed_at_once(root: Path, family: tuple[State, list[State]]) -> None:
    """Shapes, dtypes and missing tensors of the inputs; OUT; the device; the report: one error."""
    changes = {
        "lm_head.weight": torch.zeros(257, 32),
        "model.norm.weight": torch.zeros(33),
        models.COPIED_BUFFERS[0]: torch.zeros(64),
    }
    replace(root, "m0", family[1][0], **changes)
    second = dict(family[1][1])
    del second["model.embed_tokens.weight"]
    replace(root, "m1", second)
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.merge_checkpoints(
            config_of(root, "task_arithmetic"),
            root / "base" / "out",
            device="cuda:0",
            backend="gpu",
            report=root / "missing" / "report.json",
        )
    problems = "\n".join(caught.value.problems)
    for expected in (
        r"models\[0\] .*'lm_head.weight' has shape \(257, 32\), expected \(256, 32\)",
        r"models\[0\] .*'model.norm.weight' has shape \(33,\), expected \(32,\)",
        r"models\[0\] .*'model.layers.0.position_ids' has dtype F32, expected I64",
        r"models\[1\] .*lacks 1 tensor of base_model: 'model.embed_tokens.weight'",
        r"out \(.*\): lies inside the input ",
        r"device: 'cuda:0' is not available: ",
        r"backend: expected one of auto, .*; got 'gpu'",
        r"report: the directory .*missing does not exist",
    ):
        assert re.search(expected, problems), expected


def test_damaged_files_are_named(root: Path, family: tuple[State, list[State]]) -> None:
    shards = sorted((root / "m1").glob("*.safetensors"))
    whole = shards[0].read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damages = {
        r"is truncated: .*1 bytes? (is|are) missing|1 bytes": whole[:-1],
        r"is truncated: header of": whole[: header // 2],
        r"is no safetensors file: 0 bytes": b"",
        r"is damaged: the header": whole[:8] + b"?" * header + whole[8 + header :],
    }
    for message, content in damages.items():
        shards[0].write_bytes(content)
        for method in ("linear", "ties"):
            found = refused(root, config_of(root, method))
            assert f"models[1] ({root / 'm1'}): {shards[0].name}: " in found
            assert re.search(message, found), found
    shards[0].unlink()
    assert shards[0].name in refused(root, config_of(root))
    shutil.rmtree(root / "m1")
    assert "no such file or directory" in refused(root, config_of(root))


def test_a_file_that_changes_after_the_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file truncated between the plan and the merge must not crash the process."""
    from pymerge.merging import files as checkpoints

    shard = sorted((root / "m1").glob("*.safetensors"))[0]
    original = checkpoints._stream

    def truncating(*arguments: Any) -> None:
        os.truncate(shard, shard.stat().st_size // 2)
        original(*arguments)

    monkeypatch.setattr(checkpoints, "_stream", truncating)
    assert "changed since its header was read" in refused(root, config_of(root))


# requests


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"parameters": {"weigth": 1.0}}, {}, "did you mean 'weight'"),
        ({"merge_method": "tiess"}, {}, "did you mean 'ties'"),
        ({"parameters": {"weight": 0.0}}, {}, "the weights sum to 0"),
        ({"models": []}, {}, "got an empty list"),
        ({"merge_method": "ties"}, {}, "'base_model' is missing"),
        ({"dtype": "float8"}, {}, "dtype"),
        ({"slices": []}, {}, "slices"),
        ({}, {"memory": "1MiB"}, "smallest that works"),
        ({}, {"memory": "lots"}, "memory"),
        ({}, {"shard_size": 0}, "shard_size"),
        ({}, {"threads": 0}, "threads: expected at least 1, got 0"),
        ({}, {"seed": -1}, "seed"),
        ({}, {"device": "cdua"}, "device: expected auto, cpu, cuda or cuda:N; got 'cdua'"),
        ({}, {"backend": "cup"}, "did you mean 'cpu'"),
        ({}, {"backend": "cuda"}, "backend: 'cuda' is not available"),
    ],
)
def test_bad_requests(
    changes: dict[str, Any], options: dict[str, Any], message: str, root: Path
) -> None:
    assert message in refused(root, config_of(root) | changes, **options)


def test_out_and_the_inputs_are_not_endangered(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    (root / "old").mkdir()
    (root / "old" / "precious").write_text("x")
    (root / "file").write_text("x")
    cases = {
        "old": "exists already",
        "file": "is a file",
        "file/out": "is not a directory",
        "m0/out": "lies inside the input",
        "m0": "is the input",
        ".": "holds the input",
    }
    for out, message in cases.items():
        with pytest.raises(pymerge.RequestError, match=message):
            pymerge.merge_checkpoints(config_of(root), root / out, force=out != "old")
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert after == before | {root / "old" / "precious": b"x", root / "file": b"x"}


# failures that are not the request's


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk(after: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = os.pwrite, []

    def full(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    message = refused(root, config_of(root), pymerge.MergeError, shard_size="20KB")
    assert re.search(
        r"safetensors: cannot be written: No space left .*the output takes \d+ bytes, "
        r"\d+ are free in ",
        message,
    )
    assert len(calls) == after + 1


def test_a_disk_that_is_full_beforehand(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymerge.output import writer

    def full(path: Path, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "preallocate", full)
    assert "No space left" in refused(root, config_of(root, "ties-official"), pymerge.MergeError)


def test_small_files_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README, the report and the copies fail as clearly as the weights."""
    for name in ("README.md", "pymerge_report.json"):
        original = Path.write_text

        def failing(path: Path, *arguments: Any, **keywords: Any) -> int:
            if path.name == name:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            return original(path, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", failing)
            message = refused(root, config_of(root), pymerge.MergeError)
        assert name in message
        assert os.strerror(errno.EDQUOT) in message


def test_a_broken_config_json_of_the_base(root: Path) -> None:
    (root / "base" / "config.json").write_text("{broken")
    assert "config.json" in refused(root, config_of(root, "task_arithmetic"))


# the command


def test_exit_codes(root: Path) -> None:
    """0 done, 2 a bad request, 1 a failure; what is said goes to stderr."""
    (root / "c.yml").write_text(yaml.safe_dump(config_of(root)))
    (root / "bad.yml").write_text(yaml.safe_dump(config_of(root, "ties", density=1.5)))
    environment = os.environ | {"PYTHONPATH": str(Path(pymerge.__file__).parent.parent)}

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "pymerge", "merge", *arguments]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    assert run("c.yml", "done", "--quiet") == (0, "", "")
    assert json.loads((root / "done" / "pymerge_report.json").read_text())["method"] == "linear"
    code, out, said = run("bad.yml", "out")
    assert (code, out) == (2, "")
    place = r"pymerge: error: bad.yml:\d+: parameters.density: "
    assert re.match(place + r"expected a finite number in \[0, 1\], got 1.5\n$", said)


def test_exit_codes_of_failures(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "c.yml").write_text(yaml.safe_dump(config_of(root)))
    command = ["merge", str(root / "c.yml"), str(root / "out"), "--quiet"]
    assert main([*command, "--report", str(root / "missing" / "r.json")]) == 2
    assert "report: the directory" in capsys.readouterr().err
    assert main([*command, "--report", str(root)]) == 2
    assert "report: expected a file to write, got the directory" in capsys.readouterr().err
    assert not (root / "out").exists()

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", failing)
    assert main(command) == 1
    shown = capsys.readouterr()
    assert re.match(r"pymerge: error: .*safetensors: cannot be written: Input/output", shown.err)
    assert shown.out == ""
