"""Statistics collected from data: against loops in float64, and at their edges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pymerge
from pymerge.statistics.sampling import draw_classes

Tensor = torch.Tensor


class Net(nn.Module):
    """A classifier with an unused and a frozen parameter, a buffer, dropout and normalisation."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(7, 4, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
        self.register_buffer("mean", torch.full((5,), 0.1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.tanh(self.norm(self.first(x - self.mean)))) * self.frozen.sum()
        return self.last(hidden)


class Branching(Net):
    """The same, with control flow that depends on data: vmap cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def seeded(kind: type[nn.Module], seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**options)


def examples(count: int = 11, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator)
    return x, torch.randint(4, (count,), generator=generator)


def loader(size: int = 4, **options: Any) -> list[tuple[Tensor, Tensor]]:
    x, y = examples(**options)
    return list(zip(x.split(size), y.split(size), strict=True))


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward(retain_graph=True)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def brute_force(model: nn.Module, labels: str) -> dict[str, Tensor]:
    """mean_x sum_y p(y|x) (d log p(y|x))^2, one backward pass for each example and label."""
    twin = copy.deepcopy(model).double().eval()
    x, true = examples()
    total: dict[str, Tensor] = {}
    for own, label in zip(x.double(), true, strict=True):
        log_odds = torch.log_softmax(twin(own.unsqueeze(0))[0], dim=0)
        for y in range(4) if labels == "expected" else [int(label)]:
            weight = float(log_odds[y].detach().exp()) if labels == "expected" else 1.0
            for name, gradient in gradients(twin, log_odds[y]).items():
                total[name] = total.get(name, 0) + weight * gradient**2
    return {name: value / len(x) for name, value in total.items()}


def close(got: Any, expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), tensor, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("labels", ["expected", "true"])
@pytest.mark.parametrize("vectorize", [True, False, None])
@pytest.mark.parametrize("kind", [Net, Branching])
def test_exact_fisher_is_that_of_the_definition(
    labels: str, vectorize: bool | None, kind: type[nn.Module]
) -> None:
    model = seeded(kind).train()
    before = copy.deepcopy(model.state_dict())
    if kind is Branching and vectorize:
        with pytest.raises(RuntimeError, match="vmap"):
            pymerge.collect_fisher(model, loader(), labels=labels, vectorize=True)
        return
    found = pymerge.collect_fisher(model, loader(), labels=labels, vectorize=vectorize)
    close(found, brute_force(model, labels))
    assert (found.kind, found.record.examples) == ("fisher", 11)
    assert "frozen" not in found
    assert float(found["unused"].abs().max()) == 0
    # The model is as it was.
    assert model.training
    assert model.drop.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_labels_go_with_their_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many examples are computed at once."""
    model = seeded(Net)
    whole = pymerge.collect_fisher(model, loader(), labels="true", vectorize=True)
    monkeypatch.setattr("pymerge.statistics.fisher._VECTOR_BYTES", 1)
    apart = pymerge.collect_fisher(model, loader(), labels="true", vectorize=True)
    for name in whole:
        torch.testing.assert_close(apart[name], whole[name])


def test_a_part_in_evaluation_mode_stays_in_it() -> None:
    model = seeded(Net).train()
    model.norm.eval()
    pymerge.collect_fisher(model, loader())
    modes = {name: module.training for name, module in model.named_children()}
    assert modes == {"first": True, "norm": False, "drop": True, "last": True}


def test_the_exact_estimator_does_not_depend_on_batches_and_the_batch_estimator_does() -> None:
    model = seeded(Net)
    exact = [pymerge.collect_fisher(model, loader(size)) for size in (1, 11)]
    batch = [pymerge.collect_fisher(model, loader(size), estimator="batch") for size in (1, 11)]
    for name in exact[0]:
        torch.testing.assert_close(exact[0][name], exact[1][name], rtol=1e-5, atol=1e-9)
    assert not torch.allclose(batch[0]["last.weight"], batch[1]["last.weight"], rtol=0.1)
    # Not even for batches of one example: labels mix too.
    assert not torch.allclose(batch[0]["last.weight"], exact[0]["last.weight"], rtol=0.1)


def test_batch_fisher_is_that_of_mergelm() -> None:
    """Sum over batches of (d sum_x sum_y sqrt(p) log p)^2, by the number of examples."""
    model = seeded(Net)
    twin = copy.deepcopy(model).double().eval()
    total: dict[str, Tensor] = {}
    for x, _ in loader():
        log_odds = torch.log_softmax(twin(x.double()), dim=-1)
        value = (log_odds.exp().sqrt().detach() * log_odds).sum()
        for name, gradient in gradients(twin, value).items():
            total[name] = total.get(name, 0) + gradient**2
    close(
        pymerge.collect_fisher(model, loader(), estimator="batch"),
        {name: value / 11 for name, value in total.items()},
    )


def test_batch_fisher_of_true_labels_is_that_of_gradient_matching() -> None:
    """Mean over batches of (d mean_x log p)^2."""
    model = seeded(Net)
    twin = copy.deepcopy(model).double().eval()
    total: dict[str, Tensor] = {}
    for x, y in loader():
        value = nn.functional.cross_entropy(twin(x.double()), y)
        for name, gradient in gradients(twin, value).items():
            total[name] = total.get(name, 0) + gradient**2 / 3
    close(pymerge.collect_fisher(model, loader(), estimator="batch", labels="true"), total)


def test_batch_fisher_of_a_regression_takes_the_squared_error() -> None:
    model, x = nn.Linear(5, 1), examples()[0]
    wanted = x.sum(dim=1)
    found = pymerge.collect_fisher(model, [(x, wanted)], estimator="batch")
    residual = (model(x).squeeze(1) - wanted).detach()
    expected = (2 * residual.unsqueeze(1) * x).mean(dim=0).square() / 11  # by examples
    torch.testing.assert_close(found["weight"], expected.unsqueeze(0))


def test_sampled_labels_average_to_the_expected_ones_and_repeat() -> None:
    model, x = seeded(Net), examples(1)[0]
    many = [x.repeat(2000, 1)]
    sampled = pymerge.collect_fisher(model, many, labels="sampled", samples=2000)
    again = pymerge.collect_fisher(model, many, labels="sampled", samples=2000)
    other = pymerge.collect_fisher(model, many, labels="sampled", samples=2000, seed=1)
    expected = pymerge.collect_fisher(model, [x])
    for name in ("first.weight", "last.bias"):
        assert torch.equal(sampled[name], again[name])
        assert not torch.equal(sampled[name], other[name])
        torch.testing.assert_close(sampled[name], expected[name], rtol=0.15, atol=1e-4)


class Tagger(nn.Module):
    """Logits for each position; a mapping of keyword arguments, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"logits": self.head(torch.tanh(self.embed(input_ids)))}


def test_drawn_classes_follow_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    none = float("-inf")
    logits = torch.tensor([none, 0.0, none, 1.0, 2.0, none]).repeat(40_000, 1)
    drawn = draw_classes(logits, torch.Generator().manual_seed(3))
    shares = drawn.bincount(minlength=6).double() / len(drawn)
    torch.testing.assert_close(shares, logits[0].double().softmax(0), rtol=0, atol=0.01)
    assert not shares[[0, 2, 5]].any()
    monkeypatch.setattr("pymerge.statistics.sampling._AT_ONCE", 100)  # the last part is shorter
    assert torch.equal(draw_classes(logits, torch.Generator().manual_seed(3)), drawn)
    monkeypatch.setattr("torch.rand", lambda *shape, **how: torch.ones(*shape, dtype=how["dtype"]))
    assert draw_classes(logits[:3], torch.Generator()).tolist() == [4, 4, 4]
    assert draw_classes(torch.zeros(0, 3), torch.Generator()).shape == (0,)
    beyond = torch.tensor([[0.0, 1e300, 0.0]], dtype=torch.float64)  # of float32
    assert draw_classes(beyond, torch.Generator()).tolist() == [1]


def test_sequences_with_ignored_labels_and_shared_parameters() -> None:
    model = seeded(Tagger)
    ids = torch.randint(9, (5, 3), generator=torch.Generator().manual_seed(2))
    labels = ids.roll(1, dims=1)
    labels[:, 0] = -100
    batch = {"input_ids": ids, "labels": labels}
    found = {
        how: pymerge.collect_fisher(model, [batch], labels="true", vectorize=how)
        for how in (True, False)
    }
    total = torch.zeros_like(model.embed.weight)
    for own, label in zip(ids, labels, strict=True):
        log_odds = model(own.unsqueeze(0))["logits"][0].log_softmax(-1)
        value = sum(log_odds[i, label[i]] for i in (1, 2))
        total += gradients(model, value)["embed.weight"] ** 2
    for statistics in found.values():
        torch.testing.assert_close(statistics["embed.weight"], total / 5, rtol=1e-4, atol=1e-8)
        assert list(statistics) == ["embed.weight"]
        assert statistics["head.weight"] is statistics["embed.weight"]
    with pytest.raises(pymerge.RequestError, match=r"3 positions.*sampled"):
        pymerge.collect_fisher(model, [batch])


def test_selected_parameters_and_limited_samples() -> None:
    model = seeded(Net)
    full = pymerge.collect_fisher(model, [tuple(t[:6] for t in examples())])
    some = pymerge.collect_fisher(model, loader(), samples=6, parameters="last")
    assert sorted(some) == ["last.bias", "last.weight"]
    assert some.record.examples == 6
    torch.testing.assert_close(some["last.weight"], full["last.weight"])
    named = pymerge.collect_fisher(model, loader(), samples=6, parameters=["first.bias"])
    assert list(named) == ["first.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": []}, "loader: is empty"),
        ({"loader": [(torch.zeros(0, 5), torch.zeros(0))]}, "loader: is empty"),
        ({"loader": examples()[0]}, "expected batches"),
        ({"loader": [{"x": 3}]}, "batch 0: expected a tensor"),
        ({"loader": [torch.full((2, 5), torch.nan)]}, "batch 0: the logits hold NaN"),
        ({"logits": lambda m, b: m(b[0])[:, :1]}, r"shape \(4, 1\); expected \(4, classes\)"),
        ({"logits": lambda m, b: m(b[0]).sum()}, r"shape \(\)"),
        ({"logits": lambda m, b: None}, "NoneType without logits"),
        ({"labels": "true", "loader": [examples()[0]]}, "labels are needed"),
        ({"labels": "true", "loader": [(examples()[0], examples()[1] + 2)]}, "the 4 classes"),
        ({"labels": "true", "loader": [(examples()[0], examples()[0])]}, r"integers of shape"),
        ({"labels": "tru"}, "did you mean 'true'"),
        ({"estimator": "kfac"}, "expected one of exact, batch"),
        ({"samples": 0}, "samples: expected an integer >= 1"),
        ({"parameters": ["last.wieght"]}, "did you mean 'last.weight'"),
        ({"parameters": ["mean"]}, "'mean' is a buffer"),
        ({"parameters": ["frozen"]}, "'frozen' is frozen"),
        ({"parameters": "attention"}, "is in the name of no parameter"),
        ({"parameters": "("}, "not a regular expression"),
        ({"parameters": []}, "at least one name"),
    ],
)
def test_what_no_fisher_information_can_be_collected_from(
    options: dict[str, Any], message: str
) -> None:
    given = {"loader": loader()} | options
    with pytest.raises(pymerge.RequestError, match=message):
        pymerge.collect_fisher(seeded(Net), **given)
    with pytest.raises(pymerge.RequestError, match=r"expected a torch\.nn\.Module"):
        pymerge.collect_fisher("model", loader())  # type: ignore[arg-type]
    with pytest.raises(pymerge.RequestError, match="requires gradients"):
        pymerge.collect_fisher(seeded(Net).requires_grad_(False), loader())


# Gram matrices


def test_gram_is_the_mean_of_what_layers_see() -> None:
    model = seeded(Net).train()
    found = pymerge.collect_gram(model, loader())
    x = examples()[0].double()
    twin = copy.deepcopy(model).double().eval()
    inner = torch.tanh(twin.norm(twin.first(x - twin.mean))) * 2
    close(
        found,
        {
            "first.weight": (x - twin.mean).T @ (x - twin.mean) / 11,
            "last.weight": (inner.T @ inner / 11).detach(),
        },
    )
    assert torch.equal(found["last.weight"], found["last.weight"].T)
    assert (found.record.kind, found.record.examples, found.record.tokens) == ("gram", 11, 11)
    whole = pymerge.collect_gram(model, loader(11), accumulate=torch.float32)
    torch.testing.assert_close(whole["first.weight"], found["first.weight"])
    assert model.training


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(9, 4)
        self.inner = Conv1D(6, 4)
        self.twice = nn.Linear(6, 6)
        self.pool = nn.Linear(6, 2)
        self.again = self.twice  # one module under two names
        self.tied = nn.Linear(4, 9, bias=False)
        self.tied.weight = self.embed.weight
        self.idle = nn.Linear(3, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.again(self.twice(self.inner(self.embed(input_ids))))
        self.tied(self.embed(input_ids))
        return self.pool(hidden[:, 0])


def test_padding_conv1d_and_modules_called_twice() -> None:
    model = seeded(Attending)
    ids = torch.randint(9, (3, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = pymerge.collect_gram(model, [batch])
    with torch.no_grad():
        rows = model.embed(ids)
        one = model.inner(rows)
        two = model.twice(one)
        first = model.twice(two)[:, 0]
        kept = mask.bool()
        both = torch.cat([one[kept], two[kept]])
    assert sorted(found) == ["idle.weight", "inner.weight", "pool.weight", "twice.weight"]
    assert torch.equal(found["idle.weight"], torch.zeros(3, 3))
    torch.testing.assert_close(found["inner.weight"], rows[kept].T @ rows[kept] / 7)
    torch.testing.assert_close(found["twice.weight"], both.T @ both / 14)
    torch.testing.assert_close(found["pool.weight"], first.T @ first / 3)  # no padding here
    assert found["again.weight"] is found["twice.weight"]
    assert found.record.transposed == {"inner.weight"}
    every = pymerge.collect_gram(model, [batch], mask=lambda _: None)
    all_rows = rows.reshape(-1, 4)
    torch.testing.assert_close(every["inner.weight"], all_rows.T @ all_rows / 12)


def test_what_no_gram_can_be_collected_from() -> None:
    x = examples()[0]
    for model, batch, options, message in (
        (nn.Tanh(), x, {}, "no linear layers"),
        (seeded(Net), x * torch.nan, {}, "'first.weight' hold NaN"),
        (seeded(Net), x, {"accumulate": torch.float16}, "accumulate"),
        (seeded(Net), x, {"forward": lambda m, b: b}, "no example reached"),
        (seeded(Net), x, {"mask": lambda b: torch.ones(2, 2)}, r"expected shape \(11, positions"),
        (seeded(Net), x, {"samples": True}, "samples"),
    ):
        with pytest.raises(pymerge.RequestError, match=message):
            pymerge.collect_gram(model, [batch], **options)
    with pytest.raises(pymerge.RequestError, match="loader: is empty"):
        pymerge.collect_gram(seeded(Net), [])


# Files


def test_statistics_are_saved_whole_and_read_again(tmp_path: Path) -> None:
    model = seeded(Attending)
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2)}
    gram = pymerge.collect_gram(model, [batch])
    fisher = pymerge.collect_fisher(seeded(Net), loader())
    file = pymerge.save_statistics(tmp_path, gram)
    assert file == tmp_path / "gram.safetensors"
    pymerge.save_statistics(tmp_path / "f.safetensors", fisher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.safetensors", file.name]
    for given, path in ((gram, tmp_path), (fisher, tmp_path / "f.safetensors")):
        read = pymerge.load_statistics(path)
        assert read.record == given.record
        assert list(read) == sorted(given)
        assert all(torch.equal(read[name], given[name]) for name in given)
    alias = pymerge.load_statistics(tmp_path, kind="gram")["again.weight"]
    assert torch.equal(alias, gram["twice.weight"])
    assert "mean" in fisher.record.model_tensors
    pymerge.save_statistics(tmp_path, fisher)
    with pytest.raises(pymerge.RequestError, match="both exist"):
        pymerge.load_statistics(tmp_path)
    assert pymerge.load_statistics(tmp_path, kind="fisher").kind == "fisher"


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.ones(2)}, plain)
    good = pymerge.collect_fisher(nn.Linear(2, 2), [torch.ones(1, 2)])
    saved = pymerge.save_statistics(tmp_path / "good.safetensors", good)
    metadata = good.record.to_metadata()
    cases = {
        "negative": (good.record.to_metadata(), {"w": -torch.ones(2)}, "negative Fisher"),
        "nan": (metadata, {"w": torch.full((2,), torch.nan)}, "NaN or infinity"),
        "whole": (metadata, {"w": torch.ones(2, dtype=torch.int64)}, "dtype torch.int64"),
        "damaged": (metadata | {"pymerge_statistics": "{"}, {"w": torch.ones(2)}, "damaged"),
        "later": (
            {
                "pymerge_statistics": metadata["pymerge_statistics"].replace(
                    '"version": 1', '"version": 9'
                )
            },
            {"w": torch.ones(2)},
            "format 9",
        ),
        "kind": (
            {"pymerge_statistics": metadata["pymerge_statistics"].replace('"fisher"', '"hessian"')},
            {"w": torch.ones(2)},
            "kind 'hessian'",
        ),
    }
    for name, (own, tensors, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=own)
        with pytest.raises(pymerge.RequestError, match=message):
            pymerge.load_statistics(path)
    with pytest.raises(pymerge.RequestError, match="is no file of statistics"):
        pymerge.load_statistics(plain)
    with pytest.raises(pymerge.RequestError, match="no such file"):
        pymerge.load_statistics(tmp_path / "none.safetensors")
    with pytest.raises(pymerge.RequestError, match="holds fisher statistics, not gram"):
        pymerge.load_statistics(saved, kind="gram")
    with pytest.raises(pymerge.RequestError, match="expected ModelStatistics"):
        pymerge.save_statistics(tmp_path, {"w": torch.ones(2)})  # type: ignore[arg-type]
    with pytest.raises(pymerge.RequestError, match=r"ending in \.safetensors"):
        pymerge.save_statistics(tmp_path / "x.bin", good)
    with pytest.raises(pymerge.MergeError, match="cannot be written"):
        pymerge.save_statistics(tmp_path / "no" / "x.safetensors", good)
