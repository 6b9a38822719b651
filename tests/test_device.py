"""Merges on a device: the same bytes as on the CPU, in bounded memory, with everything ordered.

The device is the processor (tests/host_device.py): what needs a GPU is in tests/test_cuda_merge.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pymerge
from pymerge.engine import checkpoints, staged
from pymerge.engine.device import OUT
from pymerge.memory import DeviceSizes
from pymerge.methods import METHODS
from tests import models
from tests.host_device import HostDevice
from tests.test_engine import METHODS as DIALECTS
from tests.test_methods import number_of_models, parameters_of

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

# Those with kernels, so that they run on a device that runs the CPU's kernels.
NATIVE = [name for name, spec in METHODS.items() if "cpu" in spec.backends]
# A tile holds less than a chunk of 65536 elements, so that it takes one that is made for it.
SMALL = DeviceSizes(buffer_bytes=4096, tile_bytes=1 << 15, resident_bytes=0)
ROOMY = replace(SMALL, resident_bytes=1 << 30)

Merge = Callable[..., pymerge.MergeReport]


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Return merge_checkpoints on a device, whose memory is cut as told."""

    def run(
        config: Any, out: Path, device: HostDevice, sizes: DeviceSizes | None = None, **options: Any
    ) -> pymerge.MergeReport:
        monkeypatch.setattr(checkpoints, "open_device", lambda name: device)
        if sizes is not None:
            monkeypatch.setattr(staged, "device_sizes", lambda budget, most: sizes)
        return pymerge.merge_checkpoints(config, out, device="cuda", **options)

    return run


def config_of(root: Path, name: str, count: int) -> dict[str, Any]:
    config = models.config(root, name, count, **parameters_of(name))
    if not METHODS[name].needs_base:
        config.pop("base_model", None)
    return config


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_method(name: str, sizes: DeviceSizes, merge: Merge, tmp_path: Path) -> None:
    """Some tensors of more than a chunk, some of less, of several pieces of output."""
    count = number_of_models(name)
    base, tuned = models.llama(count, coarse=name == "ties", vocabulary=2101, layers=1)
    models.save_family(tmp_path, base, tuned, files=2)
    config = config_of(tmp_path, name, count)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    device = HostDevice()
    report = merge(config, tmp_path / "out", device, sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert report.device == "cuda:0 (the processor)"
    assert set(report.backends.values()) == {"cpu"}
    assert report.why.startswith("the device was asked for")
    assert device.copied[OUT] > 0.9 * report.output.bytes


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_of_ties(name: str, sizes: DeviceSizes, merge: Merge, tmp_path: Path) -> None:
    """Order statistics over tensors and models, exact positions, votes of zero, restarts."""
    base, tuned = models.llama(3, coarse=True, vocabulary=2101, layers=1)
    models.save_family(tmp_path, base, tuned)
    arguments = dict(DIALECTS[name])
    config = models.config(tmp_path, arguments.pop("method"), 3, **arguments)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    merge(config, tmp_path / "out", HostDevice(), sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
