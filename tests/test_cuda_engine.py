"""The engine over the CUDA kernels, which run on the processor (see test_cuda_host.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.memory import DeviceSizes
from pymerge.merging import files as checkpoints
from pymerge.merging.gpu import staged
from pymerge.methods import METHODS
from tests import models
from tests.host_device import HostDevice
from tests.test_cuda_host import launches, library, pytestmark  # noqa: F401
from tests.test_methods import number_of_models, parameters_of

HERE = [
    name
    for name, spec in METHODS.items()
    if "cuda" in spec.backends and name not in models.NEED_FILES
]
SMALL = DeviceSizes(buffer_bytes=4096, tile_bytes=1 << 15, resident_bytes=1 << 20)


def merged(name: str, backend: str, base: Any, tuned: list[Any], **parameters: Any) -> Any:
    origin = base if METHODS[name].needs_base else None
    given = parameters_of(name) | parameters
    return pymerge.merge(name, origin, tuned, backend=backend, **given)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", HERE)
def test_tensors_in_memory(name: str) -> None:
    base, tuned = models.llama(number_of_models(name), layers=1, vocabulary=1100)
    expected = merged(name, "cpu", base, tuned)
    models.assert_same(merged(name, "cuda", base, tuned), expected)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_many_tensors_are_few_launches(name: str, launches: Callable[[], int]) -> None:  # noqa: F811
    base = {f"t{k}": torch.full((10 + k,), 0.5) for k in range(40)}
    tuned = [{key: tensor + 1 + k for key, tensor in base.items()} for k in range(2)]
    before = launches()
    models.assert_same(merged(name, "cuda", base, tuned), merged(name, "reference", base, tuned))
    assert 0 < launches() - before < 5


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
def test_nan_is_found_when_all_was_launched(name: str) -> None:
    base = {f"t{k}": torch.full((10 + k,), 0.5) for k in range(5)}
    tuned = [{key: tensor + 1 + k for key, tensor in base.items()} for k in range(2)]
    tuned[1]["t3"][7] = float("inf")
    parameters = {"semantics": "official"} if name == "ties" else {}
    with pytest.raises(pymerge.NonFiniteError, match=r"models\[1\]: tensor\['t3'\] holds inf .* 7"):
        merged(name, "cuda", base, tuned, **parameters)


@pytest.mark.usefixtures("launches", "no_waiting")
@pytest.mark.parametrize("name", HERE)
def test_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = number_of_models(name)
    base, tuned = models.llama(count, layers=1, vocabulary=1100)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, name, count, **parameters_of(name))
    if not METHODS[name].needs_base:
        config.pop("base_model", None)
    pymerge.merge_checkpoints(config, tmp_path / "cpu", backend="cpu")
    monkeypatch.setattr(checkpoints, "open_device", lambda name: HostDevice("cuda"))
    monkeypatch.setattr(staged, "device_sizes", lambda budget, most: SMALL)
    report = pymerge.merge_checkpoints(config, tmp_path / "out", device="cuda")
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert report.backend == "cuda"


@pytest.mark.usefixtures("launches")
def test_more_models_than_a_launch_takes() -> None:
    """Where no backend is named, another one takes them."""
    tensors = [torch.full((20,), float(k)) for k in range(500)]
    assert pymerge.linear(tensors).tolist() == [249.5] * 20
    with pytest.raises(ValueError, match="more models than a launch"):
        pymerge.linear(tensors, backend="cuda")


@pytest.mark.usefixtures("launches", "no_waiting")
def test_files_of_more_models_than_a_launch_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = models.llama(1, layers=1, hidden=8, mlp=8, vocabulary=16)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "linear", 1)
    config["models"] *= 500
    pymerge.merge_checkpoints(config, tmp_path / "cpu", backend="cpu")
    monkeypatch.setattr(checkpoints, "open_device", lambda name: HostDevice("cuda"))
    report = pymerge.merge_checkpoints(config, tmp_path / "out", device="cuda")
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert report.backends["weighted_sum_"].endswith(" on the host")


no_waiting = models.no_waiting
