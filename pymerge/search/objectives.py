"""Metrics to build on: accuracy, mean entropy, perplexity; they need no network access."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pymerge.errors import RequestError

if TYPE_CHECKING:
    from pymerge.search.data import Split

__all__ = ["Perplexity", "accuracy", "load_tensors", "mean_entropy"]

Batches = Iterable[tuple[Any, torch.Tensor]]


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Copy merged tensors into a module, in eval mode; return it.

    Tensors that the module ties to others may be missing.

    Raises:
        RequestError: tensors that the module does not have, or parameters that were not merged.

    >>> load_tensors(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)}).training
    False
    """
    missing, unexpected = module.load_state_dict(dict(tensors), strict=False)
    own = dict(module.named_parameters(remove_duplicate=False))
    given = {own[name].data_ptr() for name in tensors if name in own}
    lacking = [name for name in missing if name in own and own[name].data_ptr() not in given]
    if lacking or unexpected:
        raise RequestError(
            f"load_tensors: the module and the merged tensors differ: not merged: "
            f"{', '.join(lacking[:3]) or 'none'}; not in the module: "
            f"{', '.join(unexpected[:3]) or 'none'}"
        )
    return module.eval()


@torch.inference_mode()
def accuracy(
    model: Callable[[Any], torch.Tensor], batches: Batches, head: Callable[..., Any] | None = None
) -> float:
    """Return the share of examples whose largest logit is that of the label, in [0, 1].

    Args:
        model: batch of inputs -> logits [examples, classes], or features for `head`.
        batches: (inputs, labels), labels of shape [examples].
        head: features -> logits.

    Raises:
        RequestError: there are no examples.

    >>> accuracy(nn.Identity(), [(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))])
    0.5
    """
    right = count = 0
    for inputs, labels in batches:
        logits = model(inputs) if head is None else head(model(inputs))
        right += int((logits.argmax(dim=-1) == labels).sum())
        count += labels.numel()
    if count == 0:
        raise RequestError("accuracy: batches: expected at least one example, got none")
    return right / count


@torch.inference_mode()
def mean_entropy(
    model: Callable[[Any], torch.Tensor],
    batches: Iterable[Any],
    head: Callable[..., Any] | None = None,
) -> float:
    """Return the mean entropy of the predictions in nats (AdaMerging's objective; to minimise).

    Args:
        model, head: as for `accuracy`.
        batches: inputs, or (inputs, labels); the labels are not used.

    Raises:
        RequestError: there are no examples.

    >>> round(mean_entropy(nn.Identity(), [torch.zeros(1, 4)]), 4)  # log 4
    1.3863
    """
    total, count = 0.0, 0
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        logits = model(inputs) if head is None else head(model(inputs))
        log_p = torch.log_softmax(logits.double(), dim=-1)
        total += float(-(log_p.exp() * log_p).sum())
        count += logits[..., 0].numel()
    if count == 0:
        raise RequestError("mean_entropy: batches: expected at least one example, got none")
    return total / count


class Perplexity:
    """Perplexity of a causal language model of the transformers library on a text (minimise it).

    As a metric: `metric: pymerge.search.objectives:Perplexity`, `arguments: {model: ./base}`,
    `direction: minimize`, and `data: {search: {name: validation, path: valid.txt}}`.

    Args:
        model: directory with config.json and the tokenizer, usually the base model's.
        text: path of a text file; default the path of the data for the search.
        length: tokens of a window; windows follow each other without overlap.
        limit: use at most this many tokens of the text.
        dtype: the dtype in which the model computes: "float32" or "bfloat16".

    Raises:
        RequestError: the text has fewer than two tokens, or none is given.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        text: str | os.PathLike[str] | None = None,
        length: int = 256,
        limit: int | None = None,
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        if length < 2:
            raise RequestError(f"Perplexity: length: expected at least 2, got {length}")
        if limit is not None and limit < 2:
            raise RequestError(f"Perplexity: limit: expected at least 2, got {limit}")
        if dtype not in ("float32", "bfloat16"):
            raise RequestError(f"Perplexity: dtype: expected float32 or bfloat16, got {dtype!r}")
        self._text = None if text is None else Path(text)
        self._length, self._limit = length, limit
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        made: Any = AutoModelForCausalLM.from_config(config)
        self._model = made.to(getattr(torch, dtype))
        self._tokens: dict[Path, torch.Tensor] = {}

    def __call__(
        self, tensors: Mapping[str, torch.Tensor], data: Split | None = None
    ) -> dict[str, float]:
        """Return {"perplexity", "nats"} (mean cross-entropy of a token)."""
        path = self._text
        if path is None and data is not None and data.path is not None:
            path = Path(data.path)
        if path is None:
            raise RequestError(
                "Perplexity: text: expected the path of a text, here or as data.search.path"
            )
        nats = self._nats(load_tensors(self._model, tensors), self._read(path))
        return {"perplexity": math.exp(nats), "nats": nats}

    def _read(self, path: Path) -> torch.Tensor:
        if path not in self._tokens:
            found = self._tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)
            tokens = torch.tensor(found["input_ids"][: self._limit])
            if len(tokens) < 2:
                raise RequestError(f"Perplexity: text: {path} has less than 2 tokens")
            self._tokens[path] = tokens
        return self._tokens[path]

    @torch.inference_mode()
    def _nats(self, model: Any, tokens: torch.Tensor) -> float:
        total, count = 0.0, 0
        for window in tokens.split(self._length):
            if len(window) < 2:
                continue
            logits = model(window[None]).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
        return total / count
