"""Merges on the CPU as a device (tests/host_device.py), for tests that request it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.memory import DeviceSizes
from pymerge.merging import files as checkpoints
from pymerge.merging.gpu import staged
from pymerge.merging.gpu.device import Device
from tests import models

# A tile is smaller than a chunk of 65536 elements, so such a chunk needs a tile of its own.
SMALL = DeviceSizes(buffer_bytes=4096, tile_bytes=1 << 15, resident_bytes=0)
ROOMY = replace(SMALL, resident_bytes=1 << 30)

Merge = Callable[..., pymerge.MergeReport]


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Return merge_checkpoints on a device whose memory is divided as requested."""

    def run(
        config: Any, out: Path, device: Device, sizes: DeviceSizes | None = None, **options: Any
    ) -> pymerge.MergeReport:
        monkeypatch.setattr(checkpoints, "open_device", lambda name: device)
        if sizes is not None:
            monkeypatch.setattr(staged, "device_sizes", lambda budget, most: sizes)
        return pymerge.merge_checkpoints(config, out, device="cuda", **options)

    return run


def two(root: Path, **sizes: int) -> dict[str, Any]:
    """Write a family and return the request for merging it."""
    base, tuned = models.llama(2, torch.float32, **({"layers": 1, "vocabulary": 1100} | sizes))
    models.save_family(root, base, tuned)
    return models.config(root, "ties", 2, density=0.3)
