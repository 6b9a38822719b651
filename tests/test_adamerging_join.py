"""AdaMerging: one pass through the model for the batches of all tasks."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from pymerge import AdaMerging, RequestError
from pymerge.adamerging.join import concatenate, split_rows
from tests.test_adamerging import make

Pair = namedtuple("Pair", "features shared")


def loaders(sizes: tuple[int, ...] = (6, 2, 5)) -> list[list[torch.Tensor]]:
    torch.manual_seed(7)
    return [[torch.randn(size, 8) + size for _ in range(4)] for size in sizes]


def heads() -> list[nn.Module]:
    torch.manual_seed(8)
    return [nn.Linear(5, classes) for classes in (3, 5, 2)]


def fitted(data: Any, **how: Any) -> tuple[AdaMerging, Any, int]:
    net, base, models = make()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    net.register_forward_hook(count)
    ada = AdaMerging(net, base, models, heads=heads())
    result = ada.fit(data, steps=12, progress=False, **how)
    return ada, result, calls


@pytest.mark.parametrize("accumulate", ["gradients", "coefficients"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_joined_run_learns_the_same(batches: int, accumulate: str) -> None:
    how: dict[str, Any] = {
        "batches_per_task": batches,
        "accumulate": accumulate,
        "weights": [1.0, 0.5, 2.0],
    }
    one, apart, calls = fitted(loaders(), **how)
    assert calls == 12 * batches * 3
    other, together, calls = fitted(loaders(), join="concatenate", **how)
    assert calls == 12 * batches
    torch.testing.assert_close(one.raw_coefficients, other.raw_coefficients, rtol=0, atol=1e-4)
    for row, same in zip(apart.history, together.history, strict=True):
        assert row["tasks"] == pytest.approx(same["tasks"], rel=1e-4)


def test_batches_are_padded_by_a_function() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return {"logits": self.embed(ids) * attention_mask[..., None]}

    def pad(batches: list[Any]) -> Any:
        length = max(batch["ids"].shape[1] for batch in batches)
        return {
            key: torch.cat(
                [nn.functional.pad(b[key], (0, length - b[key].shape[1])) for b in batches]
            )
            for key in ("ids", "attention_mask")
        }

    torch.manual_seed(0)
    net = Pooled()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    models = [{n: t + 0.3 * torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    data = []
    for size, length in ((3, 4), (2, 7)):
        mask = (torch.arange(length) < torch.arange(2, 2 + size)[:, None]).long()
        data.append([{"ids": torch.randint(0, 11, (size, length)), "attention_mask": mask}])
    learned = []
    for join in (None, pad):
        ada = AdaMerging(net, base, models)
        result = ada.fit(data, steps=6, lr=1e-2, join=join, progress=False)
        learned.append(ada.raw_coefficients.detach())
        assert result.steps == 6
    torch.testing.assert_close(*learned, rtol=0, atol=1e-4)
    with pytest.raises(RequestError, match=r"join: expected batches of equal shapes .*\(2, 7\)"):
        ada.fit(data, steps=1, join="concatenate", progress=False)


class Tagger(nn.Module):
    """Predicts something at every token, padding too: only the mask says which ones count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.embed(ids)))


def padded(texts: list[list[int]], side: str, more: int, token: int) -> dict[str, torch.Tensor]:
    """Return a batch of texts of any lengths, padded on a side beyond the longest."""
    length = max(len(text) for text in texts) + more
    ids, mask = [], []
    for text in texts:
        free = length - len(text)
        own, counts = [token] * free, [0] * free
        ids.append(own + text if side == "left" else text + own)
        mask.append(counts + [1] * len(text) if side == "left" else [1] * len(text) + counts)
    return {"ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad the batches of all tasks on the right to one length."""
    length = max(batch["ids"].shape[1] for batch in batches)
    return {
        key: torch.cat([nn.functional.pad(b[key], (0, length - b[key].shape[1])) for b in batches])
        for key in batches[0]
    }


@pytest.mark.parametrize(
    "how",
    [
        {"batches_per_task": 1},
        {"batches_per_task": 2, "accumulate": "coefficients", "weights": [2.0, 0.5, 1.0]},
        {"batches_per_task": 1, "tokens": 3},
    ],
)
def test_each_task_may_pad_in_its_own_way(how: dict[str, Any]) -> None:
    """Other lengths, sides and amounts: of each task, its own tokens count, and no others."""
    torch.manual_seed(3)
    net = Tagger()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    models = [{n: t + 0.5 * torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    styles = [("left", 0, 9), ("right", 3, 8), ("right", 0, 10)]
    data = []
    for task, (side, more, token) in enumerate(styles):
        batches = []
        for number in range(2):
            lengths = [[2, 5, 3], [4, 1, 5], [6, 2, 2]][(task + number) % 3]
            texts = [torch.randint(0, 8, (length,)).tolist() for length in lengths]
            batches.append(padded(texts, side, more, token))
        data.append(batches)
    histories, learned = [], []
    for join in (None, joined):
        ada = AdaMerging(net, base, models)
        result = ada.fit(data, steps=5, lr=0.02, join=join, progress=False, **how)
        histories.append([row["tasks"] for row in result.history])
        learned.append(ada.raw_coefficients.detach())
    torch.testing.assert_close(torch.tensor(histories[0]), torch.tensor(histories[1]))
    torch.testing.assert_close(*learned, rtol=0, atol=1e-5)
    if "tokens" in how:
        return
    # And what it says is the mean over the tokens of the text, by themselves.
    start = AdaMerging(net, base, models)
    for task, batches in enumerate(data):
        means = []
        for batch in batches[: how["batches_per_task"]]:
            logits = start(batch["ids"][batch["attention_mask"] != 0], None)
            means.append(torch.distributions.Categorical(logits=logits).entropy().mean())
        assert histories[0][0][task] == pytest.approx(
            float(torch.stack(means).detach().mean()), rel=1e-5
        )


def test_structured_batches_and_outputs() -> None:
    @dataclass
    class Output:
        features: torch.Tensor
        table: torch.Tensor
        past: Any = None

    batches = [
        {"x": torch.full((n, 2), float(n)), "more": (torch.arange(n), "text")} for n in (2, 3)
    ]
    joined = concatenate(batches)
    assert joined["x"].shape == (5, 2)
    assert joined["more"][0].tolist() == [0, 1, 0, 1, 2]
    assert joined["more"][1] == "text"
    shared = torch.zeros(4)
    for output in (
        Output(joined["x"], shared),
        Pair(joined["x"], shared),
        {"features": joined["x"], "shared": shared},
        [joined["x"], shared],
        joined["x"],
    ):
        for part, batch in zip(split_rows(output, batches), batches, strict=True):
            assert type(part) is type(output)
            if isinstance(part, (Output, Pair)):
                part = part.features
            elif not isinstance(part, torch.Tensor):
                part = part["features"] if isinstance(part, dict) else part[0]
            assert torch.equal(part, batch["x"])


def test_bad_joins() -> None:
    with pytest.raises(RequestError, match="join: expected concatenate or a function, got 'cat'"):
        fitted(loaders(), join="cat")
    with pytest.raises(RequestError, match=r"outputs of 13 examples, .* got 6"):
        fitted(loaders(), join=lambda batches: batches[0])
    mixed = loaders()
    mixed[1] = [(batch,) for batch in mixed[1]]  # type: ignore[misc]
    with pytest.raises(RequestError, match=r"join: expected batches of equal shapes"):
        fitted(mixed, join="concatenate")
    with pytest.raises(RequestError, match="join: expected batches of one form"):
        concatenate([{"x": torch.zeros(2)}, {"y": torch.zeros(2)}])
    bad = loaders()
    bad[2][0][1, 1] = float("nan")
    with pytest.raises(RequestError, match=r"loaders\[2\]: expected finite numbers, got NaN"):
        fitted(bad, join="concatenate")
