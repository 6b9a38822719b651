"""Trimmed task vectors as bit masks and values, made without `pymerge.adamerging.packed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

CHUNK = 1024  # elements per offset


def pack(models: Sequence[torch.Tensor], shares: Sequence[float]) -> dict[str, list[torch.Tensor]]:
    """Return masks, values and offsets that keep about these shares of the models, at random; 0
    keeps nothing and 1 everything. If a model is not aligned, neither are its results.
    """
    found: dict[str, list[torch.Tensor]] = {"masks": [], "values": [], "offsets": []}
    for k, (model, share) in enumerate(zip(models, shares, strict=True)):
        numel = model.numel()
        generator = torch.Generator().manual_seed(1000 * k + numel)
        kept = torch.rand(numel, generator=generator) < share
        room = np.zeros(-(-numel // 32) * 32, np.uint8)
        room[:numel] = kept.numpy()
        mask = np.packbits(room, bitorder="little").view(np.int32)
        counts = [int(part.sum()) for part in kept.split(CHUNK)] if numel else []
        offsets = np.cumsum([0, *counts], dtype=np.int64)
        packed = torch.from_numpy(mask), model[kept.to(model.device)], torch.from_numpy(offsets)
        for own, tensor in zip(found.values(), packed, strict=True):
            own.append(_beside(tensor.to(model.device), model))
    return found


def _beside(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a tensor one element past an aligned address if the model is at such an address."""
    if model.data_ptr() % 16 == 0:
        return tensor
    padded = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    padded[1:] = tensor
    return padded[1:]


def part_of(arguments: dict[str, Any], start: int, stop: int) -> dict[str, list[torch.Tensor]]:
    """Return masks, values and offsets of elements [start, stop); start must begin a chunk."""
    chunks = slice(start // CHUNK, -(-stop // CHUNK) + 1)
    ends = [(int(own[chunks][0]), int(own[chunks][-1])) for own in arguments["offsets"]]
    return {
        "masks": [mask[start // 32 : -(-stop // 32)] for mask in arguments["masks"]],
        "values": [v[a:b] for v, (a, b) in zip(arguments["values"], ends, strict=True)],
        "offsets": [own[chunks] - own[chunks][0] for own in arguments["offsets"]],
    }
