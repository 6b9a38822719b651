"""An error names an element by its index in the whole tensor, in whatever pieces it was met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pymerge
from pymerge.adapters import extract_lora, run_merge_adapters
from pymerge.checkpoint.statistics import StatisticsRecord
from tests import models
from tests.adapter_files import factors, save_lora

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

NAN = float("nan")
SMALL: dict[str, Any] = {"memory": "262MiB", "threads": 1}  # pieces of 1 MiB
PIECE = (1 << 20) // 4  # elements of float32 in one


def refused(config: dict[str, Any], out: Path, **options: Any) -> str:
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.merge_checkpoints(config, out, **options)
    return str(caught.value)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "magmax"])
@pytest.mark.parametrize("value", [NAN, float("-inf")])
def test_in_memory(method: str, value: float) -> None:
    """A tensor is searched 2^22 elements at a time."""
    index = (1 << 22) + 7
    clean = torch.ones((1 << 22) + 64, dtype=torch.bfloat16)
    bad = clean.clone()
    bad[index:] = value
    parameters = {"t": 0.5} if method == "slerp" else {}
    for base, models_, label in ((clean, [bad], r"models\[0\]"), (bad, [clean], "base")):
        if method == "linear" and label == "base":
            continue
        expected = f"{label}: the tensor holds {value} at flat index {index};"
        with pytest.raises(pymerge.NonFiniteError, match=expected):
            pymerge.merge(method, base, models_, **parameters)


@pytest.mark.parametrize("index", [PIECE + 7, 2 * PIECE + 99])
def test_files(index: int, tmp_path: Path) -> None:
    """A tensor is written 1 MiB at a time: NaN, and integers that differ."""
    clean = {"ids": torch.arange(PIECE + 100), "w": torch.ones(2 * PIECE + 100)}
    bad = {name: tensor.clone() for name, tensor in clean.items()}
    bad["w"][index] = NAN
    models.save_family(tmp_path, clean, [clean, bad])
    for method in ("linear", "ties", "slerp"):
        entries = 1 if method == "slerp" else 2
        parameters: dict[str, Any] = {"t": 0.5} if method == "slerp" else {}
        config = models.config(tmp_path, method, entries, **parameters)
        config["models"][-1]["model"] = str(tmp_path / "m1")
        said = refused(config, tmp_path / "out", **SMALL)
        assert f"m1): tensor 'w' holds nan at flat index {index};" in said
    place = index // 2  # integers of 8 bytes
    models.save(tmp_path / "m2", clean | {"ids": clean["ids"] - (clean["ids"] == place).long()})
    config = models.config(tmp_path, "linear", 1)
    config["models"].append({"model": str(tmp_path / "m2")})
    assert f"at flat index {place} it has {place - 1} where that has {place}" in refused(
        config, tmp_path / "out", **SMALL
    )


@pytest.mark.parametrize("value", [NAN, -1.0])
@pytest.mark.parametrize("index", [7, 70_000, PIECE + 70_000])
def test_statistics(index: int, value: float, tmp_path: Path) -> None:
    """Fisher information is read in pieces, 2^16 elements at a time."""
    state = {"w": torch.ones(PIECE + 100_000)}
    fisher = {"w": torch.ones(PIECE + 100_000)}
    models.save_family(tmp_path, state, [state, state])
    entries = []
    for k in range(2):
        fisher["w"][index] = 1.0 if k == 0 else value
        record = StatisticsRecord("fisher", model_tensors=("w",)).to_metadata()
        save_file(fisher, tmp_path / f"m{k}" / "fisher.safetensors", metadata=record)
        path = str(tmp_path / f"m{k}")
        entries.append({"model": path, "parameters": {"statistics": path}})
    said = refused({"merge_method": "fisher", "models": entries}, tmp_path / "out", **SMALL)
    assert "models[1].statistics" in said
    assert f"'w' holds {value} at flat index {index};" in said


@pytest.mark.parametrize("which", ["base", "model"])
def test_what_a_lora_is_taken_from(which: str, tmp_path: Path) -> None:
    from pymerge.adapters import extract

    rows, columns = 2 * extract._AT_ONCE // 1024 + 1, 1024
    states = {name: {"fc.weight": torch.zeros(rows, columns)} for name in ("base", "model")}
    states["model"]["fc.weight"][0] = 1.0
    index = extract._AT_ONCE + 5
    states[which]["fc.weight"].view(-1)[index] = NAN
    for name, state in states.items():
        models.save(tmp_path / name, state)
    expected = rf"{which}\): tensor 'fc.weight' holds nan at flat index {index}"
    with pytest.raises(pymerge.NonFiniteError, match=expected):
        extract_lora(tmp_path / "base", tmp_path / "model", tmp_path / "out", rank=1)


def test_the_base_of_adapters(tmp_path: Path) -> None:
    base = {"fc.weight": torch.zeros(6, 5), "z.weight": torch.zeros(PIECE + 10)}
    save_lora(tmp_path / "m0", factors({"fc": (6, 5)}))
    base["z.weight"][PIECE + 3] = NAN
    models.save(tmp_path / "base", base)
    config = models.config(tmp_path, "task_arithmetic", 1)
    expected = rf"tensor 'z.weight' holds NaN or infinity at flat index {PIECE + 3}"
    with pytest.raises(pymerge.NonFiniteError, match=expected):
        run_merge_adapters(config, tmp_path / "out", memory=262 << 20, threads=1)
