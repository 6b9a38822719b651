"""Merges on a GPU: the command, and tensors in its memory, give the bytes of the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.commands.main import main
from pymerge.methods import METHODS
from pymerge.ops.native import cuda
from tests import models
from tests.test_methods import number_of_models, parameters_of

# PYMERGE_REQUIRE=cuda makes a missing backend an error (tests/conftest.py).
pytestmark = pytest.mark.skipif(cuda.reason() is not None, reason=f"cuda: {cuda.reason()}")

HERE = [
    name
    for name, spec in METHODS.items()
    if "cuda" in spec.backends and name not in models.NEED_FILES
]


def run(config: Path, out: Path, *options: str) -> dict[str, Any]:
    assert main(["merge", str(config), str(out), "--quiet", *options]) == 0
    return json.loads((out / "pymerge_report.json").read_text())


def write(root: Path, name: str, **sizes: int) -> Path:
    count = number_of_models(name)
    base, tuned = models.llama(count, **sizes)
    models.save_family(root, base, tuned, files=2)
    config = models.config(root, name, count, **parameters_of(name))
    if not METHODS[name].needs_base:
        config.pop("base_model", None)
    path = root / "config.yml"
    path.write_text(json.dumps(config))  # which is YAML too
    return path


@pytest.mark.parametrize("memory", ["20MiB", "4GiB"])
@pytest.mark.parametrize("name", HERE)
def test_the_command(name: str, memory: str, tmp_path: Path) -> None:
    """Small enough a budget to cut tensors, and one that keeps them."""
    config = write(tmp_path, name, vocabulary=24_001, layers=1)
    run(config, tmp_path / "cpu", "--device", "cpu")
    report = run(config, tmp_path / "out", "--device", "cuda", "--device-memory", memory)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert report["device"].startswith("cuda:0 (")
    assert "cuda" in report["backends"].values()
    assert report["peak_device"] > 0


@pytest.mark.parametrize("semantics", ["official", "mergekit"])
def test_pieces_and_passes(semantics: str, tmp_path: Path) -> None:
    """The least host memory, a model that does not fit, every stream at work."""
    base, tuned = models.llama(3, vocabulary=120_001, layers=1, hidden=128, mlp=64)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "ties", 3, density=0.3, semantics=semantics)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    pymerge.merge_checkpoints(
        config, tmp_path / "out", device="cuda:0", device_memory="24MiB", memory="1100MiB"
    )
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")


@pytest.mark.parametrize("name", HERE)
def test_tensors_on_the_gpu(name: str) -> None:
    base, tuned = models.llama(number_of_models(name), vocabulary=2101)
    on_gpu = [{key: t.cuda() for key, t in state.items()} for state in (base, *tuned)]
    has_base = METHODS[name].needs_base
    given = parameters_of(name)
    expected = pymerge.merge(name, base if has_base else None, tuned, backend="cpu", **given)
    found = pymerge.merge(name, on_gpu[0] if has_base else None, on_gpu[1:], **given)
    assert all(tensor.is_cuda for tensor in found.values())
    models.assert_same({key: tensor.cpu() for key, tensor in found.items()}, expected)


def test_nan_on_the_gpu() -> None:
    tensors = [{f"t{k}": torch.ones(100, device="cuda") for k in range(300)} for _ in range(2)]
    tensors[1]["t270"][3] = float("nan")
    with pytest.raises(pymerge.NonFiniteError, match=r"models\[1\]: tensor\['t270'\] holds nan"):
        pymerge.linear(tensors)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    config = write(tmp_path, "linear")
    with pytest.raises(pymerge.RequestError, match="'cuda:99' is not available: there is cuda:0"):
        pymerge.merge_checkpoints(
            json.loads(config.read_text()), tmp_path / "out", device="cuda:99"
        )
