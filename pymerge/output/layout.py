"""Plans the output: files, headers and offsets, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from pymerge.dtypes import DTYPES
from pymerge.errors import RequestError, nearest

__all__ = ["INDEX_NAME", "Layout", "OutputTensor", "PlacedTensor", "Shard", "plan_layout"]

INDEX_NAME = "model.safetensors.index.json"
DATA_ALIGNMENT = 64  # a cache line and the widest vector: the first tensor of a file is aligned
_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write; `dtype` is a safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and its place; `offset` counts from the start of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file: `header` is everything before the data, `nbytes` the size of the whole file."""

    filename: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """All files; `index` is the content of model.safetensors.index.json if there are several."""

    shards: tuple[Shard, ...]
    index: bytes | None
    total_bytes: int

    @property
    def order(self) -> list[str]:
        """Return the names of all tensors in the order in which they are written."""
        return [tensor.name for shard in self.shards for tensor in shard.tensors]


def plan_layout(
    tensors: Sequence[OutputTensor], shard_size: int, metadata: Mapping[str, str] = _METADATA
) -> Layout:
    """Lay tensors out in safetensors files, named as transformers names them.

    The result does not depend on the order of `tensors`. Files are filled in the order of the
    names; within a file, the tensors with the widest elements come first, so that every element is
    aligned to its size.

    Args:
        tensors: the tensors to write; names are unique.
        shard_size: maximum bytes of tensor data in a file, at least 1; a larger tensor gets a file
            of its own.
        metadata: the `__metadata__` of every file.

    Raises:
        RequestError: listing every problem: a repeated or reserved name, an unknown dtype, ...
    """
    problems = _problems(tensors, shard_size)
    if problems:
        raise RequestError(problems)
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        size = _nbytes(tensor)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    shards = tuple(
        _shard(_filename(i, len(groups)), group, metadata) for i, group in enumerate(groups)
    )
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return Layout(shards, _index(shards, total) if len(shards) > 1 else None, total)


def _problems(tensors: Sequence[OutputTensor], shard_size: int) -> list[str]:
    problems: list[str] = []
    if shard_size < 1:
        problems.append(f"shard_size: expected at least 1 byte, got {shard_size}")
    seen: set[str] = set()
    for tensor in tensors:
        name = tensor.name
        if name in seen:
            problems.append(f"output tensor {name!r}: the name is given twice")
        try:
            name.encode()
        except UnicodeEncodeError:
            problems.append(f"output tensor {name!r}: the name is no valid Unicode")
        if name == "__metadata__":
            problems.append(f"output tensor {name!r}: safetensors reserves this name")
        if tensor.dtype not in DTYPES:
            hint = nearest(tensor.dtype, DTYPES)
            problems.append(f"output tensor {name!r}: unknown dtype {tensor.dtype!r}{hint}")
        if any(size < 0 for size in tensor.shape):
            problems.append(f"output tensor {name!r}: negative size in shape {tensor.shape}")
        seen.add(name)
    return problems


def _nbytes(tensor: OutputTensor) -> int:
    return prod(tensor.shape) * DTYPES[tensor.dtype]


def _filename(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shard(filename: str, group: list[OutputTensor], metadata: Mapping[str, str]) -> Shard:
    group = sorted(group, key=lambda tensor: (-DTYPES[tensor.dtype], tensor.name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for tensor in group:
        end = position + _nbytes(tensor)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)  # the format allows trailing spaces
    header = len(text).to_bytes(8, "little") + text
    placed: list[PlacedTensor] = []
    offset = len(header)
    for tensor in group:
        size = _nbytes(tensor)
        placed.append(PlacedTensor(tensor.name, tensor.dtype, tensor.shape, offset, size))
        offset += size
    return Shard(filename, header, tuple(placed), offset)


def _index(shards: tuple[Shard, ...], total: int) -> bytes:
    weight_map = {tensor.name: shard.filename for shard in shards for tensor in shard.tensors}
    content = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
