"""The vit suite's network: convolutions that make tokens of images, and a transformer on these.

Only the transformer is trained for tasks and merged, as the upper layers of the text suite are:
what comes out of the convolutions is computed once for each image.
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
    """Sizes: pixels of an image's side; width of a token; attention's heads; blocks."""

    image: int = 32
    width: int = 192
    heads: int = 3
    blocks: int = 3

    @property
    def tokens(self) -> int:
        """Patches of an image, 8 x 8 pixels each."""
        return (self.image // 8) ** 2


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
    """Images [n, 3, image, image] in [-1, 1] -> tokens [n, tokens, width], by convolutions.

    Each stage halves the image and then adds to it what a second convolution finds in it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        before = 3
        self.halve, self.refine = nn.ModuleList(), nn.ModuleList()
        for wide in (shape.width // 6, shape.width // 3, shape.width * 2 // 3):
            self.halve.append(_convolution(before, wide, 2))
            self.refine.append(_convolution(wide, wide, 1))
            before = wide
        self.patches = nn.Conv2d(before, shape.width, 1)
        self.places = nn.Parameter(0.02 * torch.randn(shape.tokens, shape.width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens."""
        for halve, refine in zip(self.halve, self.refine, strict=True):
            images = halve(images)
            images = images + refine(images)
        return self.patches(images).flatten(2).transpose(1, 2) + self.places


class Upper(nn.Module):
    """Tokens [n, tokens, width] -> unit vectors [n, width], float32.

    The matrix products are in bfloat16 where the processor has them, else in float32.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.blocks))
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


def _convolution(before: int, wide: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, wide, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(wide),
        nn.GELU(),
    )
