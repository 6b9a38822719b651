"""Merges on a device: how much of its memory they take, and what they do when there is less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pymerge
import pymerge.commands.main
from pymerge import memory
from pymerge.memory import DeviceSizes, device_sizes, plan_memory
from pymerge.merging.gpu.stage import Stage
from pymerge.merging.gpu.staged import StagedSource
from pymerge.merging.tensors import MemorySource
from pymerge.ops.array import Array, Flat, as_array
from tests import device_merges, models
from tests.device_merges import SMALL, Merge, two
from tests.host_device import HostDevice

merge, no_waiting = device_merges.merge, models.no_waiting
pytestmark = [pytest.mark.usefixtures("no_waiting"), pytest.mark.compile]


def test_less_memory_than_was_free(merge: Merge, tmp_path: Path) -> None:
    """Whenever the device refuses, the merge begins again with half as much."""
    config = two(tmp_path)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    expected = models.weight_bytes(tmp_path / "cpu")
    for failing in (1, 3, 6, 7):
        device = HostDevice(failing=[failing])
        merge(config, tmp_path / f"out{failing}", device, memory="1100MiB")
        assert models.weight_bytes(tmp_path / f"out{failing}") == expected
    device = HostDevice(largest=9 << 20)
    merge(config, tmp_path / "small", device, memory="2GiB")
    assert models.weight_bytes(tmp_path / "small") == expected
    assert device.most == 8 << 20
    with pytest.raises(
        pymerge.MergeError, match=r"cuda:0 .*: too little memory: .* takes 19.0 MiB"
    ):
        merge(config, tmp_path / "none", HostDevice(largest=7 << 20), memory="2GiB")
    assert not (tmp_path / "none").exists()


def test_memory_is_bounded(merge: Merge, tmp_path: Path) -> None:
    """Neither the tensor nor the number of models makes a block of the device larger."""
    largest = []
    for count, vocabulary in ((2, 1100), (2, 9000), (9, 1100)):
        root = tmp_path / f"{count}-{vocabulary}"
        base, tuned = models.llama(count, layers=1, vocabulary=vocabulary)
        models.save_family(root, base, tuned)
        device = HostDevice(memory=1 << 20)
        config = models.config(root, "ties", count, density=0.3)
        merge(config, root / "out", device, device_memory="20MiB")
        largest.append(device.most)
    assert largest == [8 << 20] * 3


def test_sizes_fit() -> None:
    for budget in (0, 19 << 20, 100 << 20, 10 << 30):
        sizes = device_sizes(budget)
        assert sizes.total <= max(budget, 19 << 20)
        assert sizes.tile_bytes == 8 * sizes.buffer_bytes
        assert sizes.buffer_bytes >= 1 << 20
    sizes: DeviceSizes | None = device_sizes(10 << 30)
    steps = 0
    while sizes is not None:
        smaller = sizes.halved()
        assert smaller is None or smaller.total < sizes.total
        sizes, steps = smaller, steps + 1
    assert steps == 5
    plain = plan_memory(2 << 30, models=2, threads=2, selects=False)
    there = plan_memory(2 << 30, models=2, threads=2, selects=False, staged=True)
    assert plain.buffer_bytes == 0
    assert there.buffer_bytes == memory.MAX_BUFFER_BYTES
    assert there.total - plain.total == memory.CUDA_FIXED_BYTES + 6 * there.buffer_bytes
    least = plan_memory(1032 << 20, models=2, threads=2, selects=False, staged=True)
    assert least.buffer_bytes == 1 << 20


def test_the_plan_tells_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without looking for a GPU."""
    two(tmp_path)
    lines = [f"  - model: {tmp_path}/m{k}\n" for k in range(2)]
    text = f"merge_method: ties\nbase_model: {tmp_path}/base\nmodels:\n" + "".join(lines)
    (tmp_path / "c.yml").write_text(text + "parameters: {density: 0.2}\n")

    def plan(*options: str) -> str:
        assert pymerge.commands.main.main(["plan", str(tmp_path / "c.yml"), *options]) == 0
        return capsys.readouterr().out

    assert "device" not in plan()
    assert "device" not in plan("--device", "cpu")
    said = plan("--device", "cuda:1")
    assert "6 x 16.0 MiB on the way" in said
    parts = "2 x 128.0 MiB of input, 3 x 16.0 MiB of output, the rest for tensors that are read"
    assert f"device    cuda:1: half of what is free ({parts} again)" in said
    said = plan("--backend", "cuda", "--device-memory", "1GiB")
    assert f"device    cuda: 1.00 GiB ({parts} again)" in said
    found = json.loads(plan("--device", "cuda", "--device-memory", "1GiB", "--json"))
    assert (found["device"], found["device_memory"]) == ("cuda", 1 << 30)
    assert found["memory"]["buffer_bytes"] == 16 << 20


def test_room_is_given_back_when_nobody_has_the_tensors() -> None:
    """The engine's variables hold what was merged until the next tensor was loaded."""
    inputs = {name: torch.full((100,), float(k)) for k, name in enumerate("abcd")}

    class Inputs(MemorySource):
        def load(self, name: str) -> tuple[None, list[Flat]]:
            return None, [as_array(inputs[name])]

    sizes = replace(SMALL, resident_bytes=1024)  # for two of them
    stage = Stage(HostDevice(), sizes)
    source = StagedSource(Inputs(["models[0]"], None, [inputs], {}), stage, "abcd")

    def load(name: str) -> bool:
        _, (tensor,) = source.load(name)
        return isinstance(tensor, torch.Tensor) and torch.equal(tensor, inputs[name])

    assert [load("a"), load("b"), stage.room] == [True, True, 0]
    assert not load("c")
    source.forget("a")
    assert [load("c"), load("d")] == [False, True]
    assert isinstance(source.load("a")[1][0], Array)  # it will not be needed again
    source.restart()
    assert [load("a"), load("b")] == [False, True]
    source.forget("b")
    assert [load("c"), load("a")] == [False, True]  # now it is
