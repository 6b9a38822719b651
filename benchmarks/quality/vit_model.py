"""The Vision Transformer of the vit suite: images to tokens of its lower blocks, and the upper ones.

Only the upper blocks are trained for tasks and merged, as the upper layers of the text suite are:
what comes out of the lower ones is computed once for each image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.demo.language_model import compute_dtype

__all__ = ["Lower", "Shape", "Upper"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the transformer: pixels of an image's side and of a patch's, and the blocks."""

    image: int = 48
    patch: int = 8
    width: int = 192
    heads: int = 3
    lower: int = 3
    upper: int = 3

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        # a Linear each, so that RegMean sees what goes into them
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens after this block: [images, tokens, width]."""
        images, count, width = tokens.shape
        mixed = self.query_key_value(self.attention_norm(tokens))
        query, key, value = mixed.view(images, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # written out: for this few tokens the fused function is slower, its backward 20 times
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
        found = weights.softmax(dim=-1).to(value.dtype) @ value
        tokens = tokens + self.out(found.transpose(1, 2).reshape(images, count, width))
        return tokens + self.narrow(F.gelu(self.wide(self.feed_norm(tokens))))


class Lower(nn.Module):
    """Images [n, 3, image, image] in [-1, 1] -> tokens [n, tokens, width] of the lower blocks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stem = _stem(shape)
        self.places = nn.Parameter(0.02 * torch.randn(shape.tokens, shape.width))
        self.blocks = _blocks(shape, shape.lower)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens."""
        return self.through(self.embed(images))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return what goes into the first block."""
        return self.stem(images).flatten(2).transpose(1, 2) + self.places

    def through(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens after the blocks."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Upper(nn.Module):
    """Tokens [n, tokens, width] -> unit vectors [n, width], float32.

    The matrix products are in bfloat16 where the processor has them, else in float32.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = _blocks(shape, shape.upper)
        self.norm = nn.LayerNorm(shape.width)
        self._compute = compute_dtype()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the direction of the mean of an image's last tokens."""
        return F.normalize(self.pooled(tokens), dim=1)

    def pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean of an image's last tokens: [n, width]."""
        compute = self._compute
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            for block in self.blocks:
                tokens = block(tokens)
        return self.norm(tokens.float()).mean(dim=1)


def _stem(shape: Shape) -> nn.Sequential:
    """Return convolutions that halve the image until a pixel is a patch (arXiv 2106.14881)."""
    layers: list[nn.Module] = []
    before = 3
    for wide in (shape.width // 6, shape.width // 3, shape.width * 2 // 3):
        layers += [
            nn.Conv2d(before, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.GELU(),
        ]
        before = wide
    return nn.Sequential(*layers, nn.Conv2d(before, shape.width, 1))


def _blocks(shape: Shape, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(shape.width, shape.heads) for _ in range(count))
