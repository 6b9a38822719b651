"""Metrics to build on: what they compute, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pymerge import RequestError
from pymerge.search import Split
from pymerge.search.objectives import Perplexity, accuracy, load_tensors, mean_entropy


def test_accuracy_counts_examples_not_batches() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0], [1.0, 2.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    assert accuracy(nn.Identity(), batches) == 4 / 5
    assert accuracy(nn.Identity(), batches, head=lambda features: -features) == 1 / 5
    with pytest.raises(RequestError, match="at least one example"):
        accuracy(nn.Identity(), [])


def test_mean_entropy() -> None:
    even, sure = torch.zeros(3, 4), torch.tensor([[0.0, 800.0, 0.0, 0.0]])
    assert mean_entropy(nn.Identity(), [even, (sure, torch.zeros(1))]) == pytest.approx(
        3 * math.log(4) / 4
    )
    tokens = torch.zeros(2, 5, 8)
    assert mean_entropy(nn.Identity(), [tokens]) == pytest.approx(math.log(8))
    with pytest.raises(RequestError, match="at least one example"):
        mean_entropy(nn.Identity(), [])


def test_loading_tells_what_differs() -> None:
    layer = nn.Linear(2, 2).train()
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    assert load_tensors(layer, state) is layer
    assert not layer.training
    assert torch.equal(layer.weight, torch.ones(2, 2))
    with pytest.raises(RequestError, match="not merged: bias; not in the module: bais"):
        load_tensors(layer, {"weight": torch.ones(2, 2), "bais": torch.zeros(2)})


def test_tied_tensors_may_be_missing() -> None:
    made = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    made["b"].weight = made["a"].weight
    load_tensors(made, {"a.weight": torch.ones(2, 2)})
    assert torch.equal(made["b"].weight, torch.ones(2, 2))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in enumerate(["?", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_perplexity_of_a_language_model(language_model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = language_model
    text = tmp_path / "valid.txt"
    text.write_text("a b c d e f g h a c e g b d")
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 1, 3, 5, 7, 2, 4]])
    nats = []
    for window in tokens.split(6, dim=1):
        with torch.no_grad():
            log_p = model(window).logits.double().log_softmax(-1)[0, :-1]
        nats += [-float(row[label]) for row, label in zip(log_p, window[0, 1:], strict=True)]
    expected = sum(nats) / len(nats)
    metric = Perplexity(folder, length=6)
    got = metric(state, data=Split("validation", str(text)))
    assert got["nats"] == pytest.approx(expected, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    flat = {name: torch.zeros_like(t) for name, t in state.items()}
    assert metric(flat, data=Split("v", str(text)))["perplexity"] == pytest.approx(9.0)
    assert Perplexity(folder, text, limit=3)(state)["nats"] != pytest.approx(expected)


def test_perplexity_of_nothing(language_model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = language_model
    (tmp_path / "one.txt").write_text("a")
    state = model.state_dict()
    with pytest.raises(RequestError, match="less than 2 tokens"):
        Perplexity(folder, tmp_path / "one.txt")(state)
    with pytest.raises(RequestError, match=r"text: .* or as data\.search\.path"):
        Perplexity(folder)(state, data=Split("validation"))
    for arguments, message in (
        ({"length": 1}, "length"),
        ({"limit": 1}, "limit"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
    ):
        with pytest.raises(RequestError, match=message):
            Perplexity(folder, **arguments)
