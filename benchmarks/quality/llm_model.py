"""SmolLM2-135M for the LLM suite: tokens to hidden states of its lower layers, and the upper ones.

Only the upper layers are trained and merged; the output of the lower ones is computed once for each
block of text, as in the text suite. The embedding, which is also the output layer, stays fixed,
too: it is the head that all models share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.demo import language_model
from benchmarks.demo.console import Advance
from benchmarks.demo.language_model import compute_dtype

__all__ = ["FIXED_LAYERS", "Blocks", "UpperLayers", "head", "load", "losses", "lower_states"]

FIXED_LAYERS = 22
_BATCH = 4
# Logits are computed for this many positions at a time, 50 MB.
_POSITIONS = 256


class UpperLayers(nn.Module):
    """Hidden states [blocks, length, 576] -> normalised hidden states of the last layer, the same.

    The matrix products are in bfloat16 if the processor supports it, else in float32; the result is
    float32.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = model.model
        self.layers, self.norm = inner.layers[FIXED_LAYERS:], inner.norm
        self._rotary = [inner.rotary_emb]  # fixed, and not part of the models
        self._compute = compute_dtype()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the input of the output layer."""
        hidden = states.float()
        with torch.autocast("cpu", self._compute, enabled=self._compute != torch.float32):
            hidden = _through(self.layers, hidden, self._rotary[0])
        return self.norm(hidden).float()


class Blocks:
    """Hidden states of blocks of text, [n, length, 576]; `blocks[positions]` is a batch."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        return self.states[positions]

    def batches(self, size: int) -> list[torch.Tensor]:
        """Return the positions of all blocks in batches."""
        return list(torch.arange(len(self)).split(size))


def load(checkpoint: Path) -> UpperLayers:
    """Return the upper layers of a checkpoint, in evaluation mode, also for fine-tuning: float32.

    Nothing in them has dropout.
    """
    return UpperLayers(_whole(checkpoint, torch.float32)).eval()


@torch.inference_mode()
def lower_states(checkpoint: Path, tokens: torch.Tensor, advance: Advance) -> torch.Tensor:
    """Return the content of `Blocks`, in bfloat16.

    Args:
        checkpoint: the pretrained model.
        tokens: ids [blocks, length].
        advance: called after every batch.
    """
    inner = _whole(checkpoint, compute_dtype()).model
    found = []
    for batch in tokens.split(_BATCH):
        hidden = _through(inner.layers[:FIXED_LAYERS], inner.embed_tokens(batch), inner.rotary_emb)
        found.append(hidden.to(torch.bfloat16))
        advance()
    return torch.cat(found)


def batches_of(tokens: torch.Tensor) -> int:
    """Return how many batches `lower_states` takes."""
    return -(-len(tokens) // _BATCH)


def head(checkpoint: Path) -> torch.Tensor:
    """Return the output layer's weight, [vocabulary, 576], in `compute_dtype()`."""
    return _whole(checkpoint, compute_dtype()).lm_head.weight.detach().clone()


def logits(weight: torch.Tensor, stride: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a head: hidden states [n, length, 576] -> logits of the next tokens, float32.

    The last position predicts an unknown token, and is left out.

    Args:
        weight: see `head`.
        stride: use only every so many positions.
    """

    def apply(hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden[:, :-1:stride].to(weight.dtype), weight).float()

    return apply


@torch.inference_mode()
def losses(weight: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Return the mean loss of each block.

    Args:
        weight: see `head`.
        hidden: of all positions [n, length, 576].
        labels: the tokens that follow, [n, length - 1].
    """
    found = []
    for states, following in zip(hidden, labels, strict=True):
        total = 0.0
        for part, wanted in zip(
            states[:-1].split(_POSITIONS), following.split(_POSITIONS), strict=True
        ):
            scores = F.linear(part.to(weight.dtype), weight).float()
            total += F.cross_entropy(scores, wanted, reduction="sum").item()
        found.append(total / len(following))
    return found


def _through(layers: Any, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
    length, dtype = hidden.shape[1], compute_dtype()
    positions = torch.arange(length)[None]
    angles = rotary(hidden, positions)
    mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    for layer in layers:
        hidden = layer(
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def _whole(checkpoint: Path, dtype: torch.dtype) -> Any:
    model = language_model.load(checkpoint, dtype)
    # on a CPU, torch's fused attention takes longer than its separate parts
    model.set_attn_implementation("eager")
    return model
