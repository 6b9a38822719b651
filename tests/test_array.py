"""Arrays without torch: views, dtypes, lifetimes; and that a merge of files never imports torch."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.ops.array import Array, as_array, as_tensor, sample_lines, widen
from tests import models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_views_share_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(10).to(dtype)
    array = as_array(tensor)
    assert (array.numel(), array.nbytes) == (10, tensor.nbytes)
    assert array.data_ptr() == tensor.data_ptr()
    assert torch.equal(as_tensor(array[3:7]), tensor[3:7])
    as_tensor(array)[4] = 100
    assert tensor[4] == 100
    expected = tensor.to(torch.float32).numpy()
    np.testing.assert_array_equal(widen(array, wide=False), expected)
    assert widen(array, wide=True).dtype == np.float64


def test_slices_are_clipped() -> None:
    array = as_array(torch.arange(5.0))
    assert [array[2:9].numel(), array[5:9].numel(), array[4:2].numel()] == [3, 0, 0]
    assert array[5:9].data_ptr() == 0
    assert array[5:9].tensor().dtype == torch.float32
    assert as_tensor(as_array(torch.empty(0, dtype=torch.bfloat16))).numel() == 0


def test_integers_are_bytes() -> None:
    array = as_array(torch.tensor([1, -1], dtype=torch.int64))
    assert (array.code, array.numpy().tolist()) == ("I64", [1] + [0] * 7 + [255] * 8)
    assert as_tensor(array).tolist() == [1, -1]


def test_memory_lives_as_long_as_a_view() -> None:
    def make() -> torch.Tensor:
        return Array.of(np.arange(1 << 16, dtype=np.float32), "F32")[1:].tensor()

    tensor = make()
    gc.collect()
    filler = [np.full(1 << 16, -1, dtype=np.float32) for _ in range(8)]
    assert torch.equal(tensor, torch.arange(1, 1 << 16, dtype=torch.float32))
    assert len(filler) == 8


def test_sampled_lines() -> None:
    array = as_array(torch.arange(100, dtype=torch.bfloat16))
    sample = sample_lines(array, 30, 3, 4)
    assert as_tensor(sample).tolist() == [0, 1, 2, 3, 30, 31, 32, 33, 60, 61, 62, 63]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_a_merge_of_files_needs_no_torch(method: str, tmp_path: Path) -> None:
    """Importing torch takes longer than merging small models."""
    base, tuned = models.llama(2)
    models.save_family(tmp_path, base, tuned)
    config = models.config(Path(), method, 2, weights=[1.0, 1.0])
    code = (
        "import sys; from pymerge import merge_checkpoints; "
        f"merge_checkpoints({config!r}, 'out'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(pymerge.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
