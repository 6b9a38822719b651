"""AdaMerging: how entropy and loss go together, and the batches they are taken of."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from scipy import stats
from torch import nn

from pymerge import AdaMerging, RequestError
from pymerge.adamerging import entropy_of_each, next_tokens
from pymerge.adamerging.fit import moved
from tests.test_adamerging import make
from tests.test_adamerging_fit import loaders


def test_correlations_are_those_of_scipy() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, names=["a", "b", "c"])
    torch.manual_seed(0)
    data = [[(x, torch.randint(0, 5, (6,))) for x in own] for own in loaders()]
    found = ada.correlations(data)
    assert [one.task for one in found] == ["a", "b", "c"]
    assert found[0].examples == 24
    with torch.no_grad():
        logits = torch.cat([ada(x) for x, _ in data[1]])
        wanted = torch.cat([y for _, y in data[1]])
    each = entropy_of_each(logits)
    loss = nn.functional.cross_entropy(logits, wanted, reduction="none")
    assert found[1].spearman == pytest.approx(stats.spearmanr(each, loss)[0], abs=1e-6)
    assert found[1].pearson == pytest.approx(stats.pearsonr(each, loss)[0], abs=1e-6)
    assert found[1].accuracy == pytest.approx(float((logits.argmax(1) == wanted).float().mean()))
    with pytest.raises(RequestError, match="expected at least two examples, got 0"):
        ada.correlations([[]])
    with pytest.raises(RequestError, match="labels: expected batches"):
        ada.correlations([[torch.randn(2, 8)]])


def test_correlations_leave_out_what_is_not_counted() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    torch.manual_seed(0)
    x, y = torch.randn(5, 7, 8), torch.randint(0, 5, (5, 7))
    mask = (torch.rand(5, 7) > 0.3).long()
    ignored = y.masked_fill(torch.rand(5, 7) > 0.7, -100)

    def inputs(
        batch: dict[str, torch.Tensor],
    ) -> tuple[tuple[torch.Tensor], dict[str, Any], torch.Tensor]:
        return (batch["x"],), {}, batch["mask"]

    batch = {"x": x, "mask": mask, "labels": ignored}
    counts = (mask != 0) & (ignored != -100)
    found = ada.correlations([[batch]], inputs=inputs)[0]
    plain = ada.correlations([[(x[counts], y[counts])]])[0]
    assert 2 <= found.examples == int(counts.sum()) < 35
    assert torch.allclose(found.entropies, plain.entropies, atol=1e-6)
    assert torch.allclose(found.losses, plain.losses, atol=1e-6)
    assert found.accuracy == plain.accuracy
    assert found.spearman == pytest.approx(plain.spearman, abs=1e-6)


def test_next_tokens_are_the_labels_of_a_causal_language_model() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0]], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    wanted = torch.tensor([[6, 7, 8, -100], [2, -100, -100, -100]])
    assert torch.equal(next_tokens({"input_ids": tokens, "attention_mask": mask}), wanted)
    unpadded = torch.tensor([[6, 7, 8, -100], [2, 0, 0, -100]])
    assert torch.equal(next_tokens((tokens, "anything")), unpadded)
    for wrong in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), {"x": tokens}, []):
        with pytest.raises(RequestError, match="labels: expected token numbers of shape"):
            next_tokens(wrong)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"labels: expected integers of shape \(2,\), got list"),
        (torch.zeros(2), r"labels: expected integers of shape \(2,\), got torch.float32"),
        (torch.tensor([0]), r"labels: expected class numbers of shape \(2,\), got \(1,\)"),
        (torch.tensor([0, 5]), r"labels: expected class numbers 0 .. 4 .*, got 5"),
        (torch.tensor([-1, 0]), r"labels: expected class numbers 0 .. 4 .*, got -1"),
    ],
)
def test_correlations_name_labels_that_are_none(labels: object, message: str) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    with pytest.raises(RequestError, match=message):
        ada.correlations([[(torch.randn(2, 8), labels)]])


def test_correlations_name_bad_batches_and_loaders() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, heads=[nn.Identity()] * 3)
    batch = torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RequestError, match="loaders: expected at most 3, one for each head; got 4"):
        ada.correlations([[batch]] * 4)
    broken = batch[0] * float("nan"), batch[1]
    with pytest.raises(RequestError, match=r"loaders\[1\]: expected finite entropies and losses"):
        ada.correlations([[batch], [broken]])


@pytest.mark.parametrize("task", [-1, 3, "a", True, 1.0])
@pytest.mark.parametrize("heads", [None, [nn.Identity()] * 3])
def test_a_task_that_there_is_not_is_refused(task: object, heads: list[nn.Module] | None) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, heads=heads)
    with pytest.raises(RequestError, match=r"task: expected 0 \.\. 2, one of the (heads|models)"):
        ada(torch.randn(2, 8), task=task)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Own:
    """A batch of a kind of its own, which knows how to move."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Own:
        return Own(self.x.to(device))


def test_batches_keep_their_form_when_they_are_moved() -> None:
    x, y = torch.randn(2, 8), torch.zeros(2)
    device = torch.device("cpu")
    assert isinstance(moved(Pair(x, y), device), Pair)
    assert isinstance(moved((x, [y]), device), tuple)
    assert isinstance(moved(Own(x), device), Own)
    assert moved({"a": (x, 3)}, device)["a"][1] == 3
    assert moved({"a": x}, torch.device("meta"))["a"].is_meta
    assert moved(Own(x), torch.device("meta")).x.is_meta
