"""EfficientNet-Lite0 for the vision suite: images to maps of its lower blocks, and the upper part.

Only the upper eleven of sixteen blocks and the last convolution are trained and merged. They are
98 % of the parameters and a quarter of the time: the output of the lower ones, which work on the
large maps, is computed once for each image. BatchNorm keeps the statistics of the pretrained model
everywhere, as the heads are computed from its features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo import image_model
from benchmarks.demo.console import Advance

__all__ = ["FIXED_BLOCKS", "Maps", "UpperBlocks", "batches_of", "load", "lower_maps"]

FIXED_BLOCKS = 5
_BATCH = 100


class UpperBlocks(nn.Module):
    """Maps of the lower blocks [n, 40, 8, 8] -> unit features [n, 1280]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.blocks = network._blocks[FIXED_BLOCKS:]
        self.head, self.norm = network._conv_head, network._bn1
        self._act = network._swish

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the features."""
        maps = maps.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            maps = block(maps)
        maps = self._act(self.norm(self.head(maps)))
        return nn.functional.normalize(maps.mean(dim=(2, 3)), dim=1)


class Maps:
    """Maps of images, [n, 40, 8, 8]; `maps[positions]` is a batch."""

    def __init__(self, maps: torch.Tensor) -> None:
        self.maps = maps

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        return self.maps[positions]

    def batches(self, size: int) -> list[torch.Tensor]:
        """Return the positions of all images in batches."""
        return list(torch.arange(len(self)).split(size))


def load(checkpoint: Path) -> UpperBlocks:
    """Return the upper part of a checkpoint, in evaluation mode, also for fine-tuning."""
    return UpperBlocks(image_model.load(checkpoint)).eval()


@torch.inference_mode()
def lower_maps(checkpoint: Path, images: torch.Tensor, advance: Advance | None = None) -> Maps:
    """Return the input of `UpperBlocks`.

    Args:
        checkpoint: the pretrained model.
        images: grey [n, size, size], or coloured [n, 3, size, size], uint8.
        advance: called after every batch.
    """
    network = image_model.load(checkpoint)
    found = []
    for batch in images.split(_BATCH):
        values = batch.float() / 127.5 - 1.0
        if values.dim() == 3:
            values = values[:, None].expand(-1, 3, -1, -1)
        values = values.contiguous(memory_format=torch.channels_last)
        maps = network._swish(network._bn0(network._conv_stem(values)))
        for block in network._blocks[:FIXED_BLOCKS]:
            maps = block(maps)
        found.append(maps)
        if advance is not None:
            advance()
    return Maps(torch.cat(found))


def batches_of(images: torch.Tensor) -> int:
    """Return how many batches `lower_maps` takes."""
    return -(-len(images) // _BATCH)
