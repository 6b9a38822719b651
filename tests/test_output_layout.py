"""The layout of the output files."""

from __future__ import annotations

import json
import random

import pytest

from pymerge.checkpoint import DTYPES
from pymerge.errors import RequestError
from pymerge.output import OutputTensor, plan_layout
from tests.output_cases import MIXED


def test_one_file() -> None:
    layout = plan_layout(MIXED, 10**9)
    (shard,) = layout.shards
    assert shard.filename == "model.safetensors"
    assert layout.index is None
    assert layout.total_bytes == sum(tensor.nbytes for tensor in shard.tensors)
    assert shard.nbytes == len(shard.header) + layout.total_bytes
    assert layout.order == [
        "model.0.scalar",
        "model.1.ids",
        "model.0.empty",
        "model.0.w",
        "model.1.w",
        "model.embed",
        "zz.empty",
        "model.0.mask",
    ]


def test_header_is_what_safetensors_reads() -> None:
    (shard,) = plan_layout(MIXED, 10**9, {"format": "pt", "by": "é"}).shards
    length = int.from_bytes(shard.header[:8], "little")
    assert len(shard.header) == 8 + length
    header = json.loads(shard.header[8:])
    assert header.pop("__metadata__") == {"format": "pt", "by": "é"}
    for tensor in shard.tensors:
        begin, end = header[tensor.name]["data_offsets"]
        assert len(shard.header) + begin == tensor.offset
        assert end - begin == tensor.nbytes
        assert header[tensor.name]["shape"] == list(tensor.shape)
        assert header[tensor.name]["dtype"] == tensor.dtype
    assert len(header) == len(MIXED)


@pytest.mark.parametrize("seed", range(20))
def test_random_layouts(seed: int) -> None:
    rng = random.Random(seed)
    tensors = [
        OutputTensor(
            f"layer.{i}.{'x' * rng.randrange(70)}",
            rng.choice(sorted(DTYPES)),
            tuple(rng.randrange(5) for _ in range(rng.randrange(4))),
        )
        for i in range(rng.randrange(1, 40))
    ]
    limit = rng.choice([1, 100, 1000, 10**6])
    layout = plan_layout(tensors, limit)
    assert plan_layout(rng.sample(tensors, len(tensors)), limit) == layout
    assert sorted(layout.order) == sorted(tensor.name for tensor in tensors)
    assert layout.total_bytes == sum(t.nbytes for shard in layout.shards for t in shard.tensors)
    for shard in layout.shards:
        assert len(shard.header) % 64 == 0
        position = len(shard.header)
        for tensor in shard.tensors:
            assert tensor.offset == position
            assert tensor.offset % DTYPES[tensor.dtype] == 0
            position += tensor.nbytes
        assert position == shard.nbytes
        filled = [tensor for tensor in shard.tensors if tensor.nbytes]
        assert len(filled) <= 1 or sum(tensor.nbytes for tensor in filled) <= limit


def test_shards_and_index() -> None:
    sizes = {"a": 10, "b": 10, "c": 50, "d": 5, "e": 15, "f": 1}
    tensors = [OutputTensor(name, "U8", (size,)) for name, size in sizes.items()]
    layout = plan_layout(tensors, 20)
    assert [[t.name for t in shard.tensors] for shard in layout.shards] == [
        ["a", "b"],
        ["c"],  # larger than a shard
        ["d", "e"],
        ["f"],
    ]
    assert [shard.filename for shard in layout.shards] == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert layout.index is not None
    index = json.loads(layout.index)
    assert index["metadata"] == {"total_size": 91}
    assert index["weight_map"]["e"] == "model-00003-of-00004.safetensors"
    assert list(index["weight_map"]) == sorted(sizes)


def test_all_layout_problems_at_once() -> None:
    tensors = [
        OutputTensor("a", "BF61", (2,)),
        OutputTensor("a", "F32", (-1,)),
        OutputTensor("__metadata__", "F32", (1,)),
        OutputTensor("\ud800", "F32", (1,)),
    ]
    with pytest.raises(RequestError) as caught:
        plan_layout(tensors, 0)
    assert caught.value.problems == [
        "shard_size: expected at least 1 byte, got 0",
        "output tensor 'a': unknown dtype 'BF61'; did you mean 'BF16'?",
        "output tensor 'a': the name is given twice",
        "output tensor 'a': negative size in shape (-1,)",
        "output tensor '__metadata__': safetensors reserves this name",
        r"output tensor '\ud800': the name is no valid Unicode",
    ]
