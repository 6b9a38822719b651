"""Checkpoints in torch's pickle formats: those that are read, and those that are refused."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pymerge.checkpoint import Checkpoint, dtype_code, open_checkpoint
from pymerge.errors import CheckpointError

LABEL = "models[2] (ft)"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5).to(torch.bfloat16),
        "a.weight": torch.randn(3, 4),
        "c.empty": torch.zeros(0, 4),
        "d.ids": torch.arange(11),
    }


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == dtype_code(tensor.dtype)
        assert torch.equal(checkpoint.flat(name), tensor.reshape(-1))


def refusal(path: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, LABEL)
    assert all(problem.startswith(f"{LABEL}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{LABEL}: ") for problem in caught.value.problems]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "x.pt", "x.pth"])
def test_pickled_directory(tmp_path: Path, name: str) -> None:
    torch.save(weights(), tmp_path / name)
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    torch.save({"lr": 1.0}, tmp_path / "optimizer.pt")
    (tmp_path / "rng_state_0.pth").write_bytes(b"")
    with open_checkpoint(tmp_path, LABEL) as checkpoint:
        assert_holds(checkpoint, weights())
        assert len(checkpoint.warnings) == 1
        assert f"{name}: pickle, read with weights_only" in checkpoint.warnings[0]
        assert "held in memory" not in checkpoint.warnings[0]
        assert [path.name for path, _ in checkpoint.files] == [name]


def test_pickled_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "p-1.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "p-2.bin")
    content = {"metadata": {}, "weight_map": {"a": "p-1.bin", "b": "p-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    checkpoint = open_checkpoint(tmp_path, LABEL)
    assert_holds(checkpoint, {"a": torch.ones(2), "b": torch.zeros(3)})
    assert len(checkpoint.warnings) == 2


def test_pickled_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    tensors = {
        "transposed": whole.t(),
        "strided": whole[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "shared": whole,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "negated": torch.tensor([1 + 2j]).conj().imag,
    }
    path = tmp_path / "x.pt"
    torch.save({"state_dict": tensors}, path)
    checkpoint = open_checkpoint(path, LABEL)
    for name, tensor in tensors.items():
        flat = checkpoint.flat(name)
        checkpoint.will_need(name)
        checkpoint.release(name)
        assert torch.equal(flat, tensor.detach().reshape(-1))
        assert flat.is_contiguous()
        assert not flat.is_neg()
        assert not flat.requires_grad
    assert checkpoint.flat("shared").data_ptr() == checkpoint.flat("shared").data_ptr()  # a view


def test_legacy_pickle_is_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(path, LABEL)
    assert_holds(checkpoint, weights())
    assert "held in memory" in checkpoint.warnings[0]


# ------------------------------------------------------------------ refused


class Harmful:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, ("touch harmed",)


def write_pickle(path: Path, value: object) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: write_pickle(path, value)])
def test_a_harmful_pickle_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[object, Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    write({"a": Harmful()}, tmp_path / "x.bin")
    (problem,) = refusal(tmp_path / "x.bin")
    assert problem.startswith("x.bin: weights_only loading refused it: ")
    assert "posix.system" in problem or "Unsupported operand" in problem
    assert "save the plain weights as safetensors" in problem
    assert "set to `False`" not in problem
    assert not (tmp_path / "harmed").exists()


FLAT = 'x.pt: expected a dict of tensors, or one under the single key "state_dict", '


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(2), f"{FLAT}got Tensor"),
        ([torch.ones(2)], f"{FLAT}got list"),
        ({"model": {"a": torch.ones(2)}, "epoch": 3}, f"{FLAT}found 'model': dict, 'epoch': int"),
        ({"model": OrderedDict(a=torch.ones(2))}, f"{FLAT}found 'model': OrderedDict"),
        ({"state_dict": {"a": 1}}, f"{FLAT}found 'a': int"),
        ({3: torch.ones(2)}, f"{FLAT}found 3: Tensor"),
        ({}, "holds no tensors"),
        (
            {"a": torch.ones(2).to_sparse()},
            "x.pt: tensor 'a': expected a dense tensor, got torch.sparse_coo on cpu",
        ),
        (
            {"a": torch.ones(2, dtype=torch.complex128)},
            "x.pt: tensor 'a': dtype: safetensors has no code for torch.complex128",
        ),
    ],
)
def test_pickles_without_a_flat_state_dict(tmp_path: Path, value: object, expected: str) -> None:
    torch.save(value, tmp_path / "x.pt")
    (problem,) = refusal(tmp_path / "x.pt")
    assert problem.startswith(expected)


@pytest.mark.parametrize("kept", [0, 2, 100, 0.5, -30])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickles(tmp_path: Path, kept: float, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    (problem,) = refusal(path)
    assert problem.startswith(("x.bin: weights_only loading refused it", "x.bin: is truncated or"))
