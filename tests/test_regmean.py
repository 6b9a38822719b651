"""RegMean and RegMean++: against least squares, and layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pymerge
from pymerge.checkpoint.statistics import StatisticsRecord
from pymerge.statistics.files import ModelStatistics
from tests import data_oracles

Tensor = torch.Tensor
T = torch.tensor


def layers(
    count: int = 3, out: int = 4, size: int = 6, rows: int = 40, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return inputs, weights [out, in] and Gram matrices."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(rows + k, size, generator=generator) for k in range(count)]
    weights = [torch.randn(out, size, generator=generator) for _ in range(count)]
    return inputs, weights, [x.T @ x / len(x) for x in inputs]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 0.5, 0.0]])
def test_regmean_minimises_the_squared_difference_of_outputs(weights: list[float]) -> None:
    inputs, tuned, grams = layers()
    merged = pymerge.regmean_merge(tuned, grams, weights=weights)
    expected = data_oracles.least_squares(inputs, tuned, weights)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)

    def loss(w: Tensor) -> float:
        parts = zip(weights, inputs, tuned, strict=True)
        return sum(c * float((x @ (w - own).T).square().sum()) / len(x) for c, x, own in parts)

    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        assert loss(merged) < loss(merged + 0.01 * torch.randn(4, 6, generator=generator))


@pytest.mark.parametrize("off", [0.0, 0.1, 0.9, 1.0])
def test_regmean_off_the_diagonal(off: float) -> None:
    _, tuned, grams = layers()
    merged = pymerge.regmean_merge(tuned, grams, off_diagonal=off)
    expected = data_oracles.regmean(tuned, grams, [1.0] * 3, off)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)


def test_regmean_of_many_outputs_and_what_has_no_gram() -> None:
    """More outputs than are solved for at once."""
    _, tuned, grams = layers(2, out=2500, size=30, rows=50)
    biases = [torch.arange(2500.0), torch.ones(2500)]
    states = [{"w": w, "b": b} for w, b in zip(tuned, biases, strict=True)]
    merged = pymerge.regmean_merge(states, [{"w": g} for g in grams], weights=[1, 3])
    expected = data_oracles.regmean(tuned, grams, [1.0, 3.0], 1.0)
    torch.testing.assert_close(merged["w"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged["b"], (biases[0] + 3 * biases[1]) / 4)
    before = torch.get_num_threads()
    for threads in (1, 5):
        torch.set_num_threads(threads)
        again = pymerge.regmean_merge(states, [{"w": g} for g in grams], weights=[1, 3])
        assert torch.equal(again["w"], merged["w"])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_regmean_of_conv1d_is_that_of_its_transpose() -> None:
    _, tuned, grams = layers(out=6)  # square: the shape is ambiguous
    record = StatisticsRecord("gram", transposed=frozenset({"w"}))
    across = [ModelStatistics({"w": gram}, record) for gram in grams]
    merged = pymerge.regmean_merge([{"w": w.T.contiguous()} for w in tuned], across)
    assert torch.equal(merged["w"], pymerge.regmean_merge(tuned, grams).T)
    assert not torch.allclose(
        merged["w"], pymerge.regmean_merge([w.T.contiguous() for w in tuned], grams)
    )


def test_ridge_and_what_is_singular() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    dependent = [x.T @ x / 3] * 2
    _, tuned, _ = layers(2)
    with pytest.raises(pymerge.RequestError, match="linearly dependent") as caught:
        pymerge.regmean_merge(tuned, dependent)
    assert "set ridge above 0" in str(caught.value)
    dead = [torch.diag(T([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]))] * 2
    with pytest.raises(pymerge.RequestError, match=r"2 of its 6 inputs were 0 .*input 1\)"):
        pymerge.regmean_merge([{"w": w} for w in tuned], [{"w": g} for g in dead])
    # Equal Gram matrices: every ridge gives the average, whichever the direction.
    for grams in (dependent, dead):
        merged = pymerge.regmean_merge(tuned, grams, ridge=1e-6)
        torch.testing.assert_close(merged, (tuned[0] + tuned[1]) / 2)
    _, tuned, grams = layers(2)
    lift = 0.3 * sum(float(g.trace()) for g in grams) / 12
    ridged = [g + lift * torch.eye(6) for g in grams]
    expected = data_oracles.regmean(tuned, ridged, [1.0, 1.0], 1.0)
    merged = pymerge.regmean_merge(tuned, grams, ridge=0.3)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
    # Weights count in their mean diagonal too.
    lift = 0.3 * (3 * float(grams[0].trace()) + float(grams[1].trace())) / 4 / 6
    ridged = [g + lift * torch.eye(6) for g in grams]
    expected = data_oracles.regmean(tuned, ridged, [3.0, 1.0], 1.0)
    merged = pymerge.regmean_merge(tuned, grams, ridge=0.3, weights=[3.0, 1.0])
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
    # No example of one model: the other's. No example anywhere: the average.
    assert torch.equal(pymerge.regmean_merge(tuned, [grams[0], torch.zeros(6, 6)]), tuned[0])
    other = pymerge.regmean_merge(tuned, [torch.zeros(6, 6), grams[1]])
    torch.testing.assert_close(other, tuned[1])
    nothing = pymerge.regmean_merge(tuned, [torch.zeros(6, 6)] * 2, weights=[1, 3])
    torch.testing.assert_close(nothing, (tuned[0] + 3 * tuned[1]) / 4)


# RegMean++


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.one = nn.Linear(5, 6)
        self.two = nn.Linear(6, 3)
        self.steps = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.steps += 1
        return self.two(torch.tanh(self.one(self.embed(ids))))


def tasks(count: int = 2) -> tuple[list[Mlp], list[list[Tensor]]]:
    torch.manual_seed(4)
    return [Mlp() for _ in range(count)], [
        [torch.randint(11, (30,)) for _ in range(2)] for _ in range(count)
    ]


def test_regmean_plus_plus_sees_what_merged_layers_make() -> None:
    mlps, data = tasks()
    before = [{n: t.clone() for n, t in mlp.state_dict().items()} for mlp in mlps]
    merged = pymerge.regmean_plus_plus(mlps, data, off_diagonal=0.9)
    embed = (mlps[0].embed.weight.double() + mlps[1].embed.weight.double()) / 2
    ones = (1.0, 1.0)
    x = [embed[torch.cat(own)] for own in data]
    one = data_oracles.regmean(
        [mlp.one.weight for mlp in mlps], [a.T @ a / len(a) for a in x], ones, 0.9
    )
    bias = (mlps[0].one.bias.double() + mlps[1].one.bias.double()) / 2
    hidden = [torch.tanh(a @ one.T + bias) for a in x]
    two = data_oracles.regmean(
        [mlp.two.weight for mlp in mlps], [a.T @ a / len(a) for a in hidden], ones, 0.9
    )
    torch.testing.assert_close(merged["embed.weight"].double(), embed)
    torch.testing.assert_close(merged["one.weight"].double(), one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["two.weight"].double(), two, rtol=1e-4, atol=1e-5)
    # RegMean's second layer sees what each model's own first layer makes: another result.
    grams = [pymerge.collect_gram(m, d) for m, d in zip(mlps, data, strict=True)]
    plain = pymerge.regmean_merge(before, grams, off_diagonal=0.9)
    assert not torch.allclose(plain["two.weight"], merged["two.weight"], rtol=1e-3, atol=1e-3)
    assert sorted(merged) == sorted(before[0])
    for mlp, state in zip(mlps, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in mlp.state_dict().items())


class Blocks(nn.Module):
    """Blocks in a list, one of them called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        x = x + self.blocks[1](x)
        return self.head(x + self.blocks[1](x))


def test_regmean_plus_plus_takes_blocks_as_one() -> None:
    """Inside a block, a layer sees what the task's own layers before it make."""
    torch.manual_seed(5)
    twins = [Blocks() for _ in range(2)]
    data = [[torch.randn(40, 4)] for _ in twins]
    merged = pymerge.regmean_plus_plus(twins, data, off_diagonal=1.0, ridge=1e-9)
    first = [twin.blocks[0] for twin in twins]
    with torch.no_grad():
        inner = [torch.tanh(b[0](x[0])) for b, x in zip(first, data, strict=True)]
    expected = data_oracles.regmean(
        [b[2].weight for b in first], [a.T @ a / 40 for a in inner], [1.0, 1.0], 1.0
    )
    got = merged["blocks.0.2.weight"].double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # The block that is called twice: with the first merged, rows of both calls.
    hybrid = [Blocks() for _ in twins]
    rows = []
    for twin, x, own in zip(hybrid, data, twins, strict=True):
        twin.load_state_dict(merged)
        twin.blocks[1].load_state_dict(own.blocks[1].state_dict())
        with torch.no_grad():
            a = x[0] + twin.blocks[0](x[0])
            rows.append(torch.cat([a, a + twin.blocks[1](a)]))
    expected = data_oracles.regmean(
        [t.blocks[1][0].weight for t in twins], [a.T @ a / 80 for a in rows], [1.0, 1.0], 1.0
    )
    got = merged["blocks.1.0.weight"].double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loaders": [[]]}, r"loaders: expected 2"),
        ({"loaders": [[], []]}, r"loaders\[0\]: loader: is empty"),
        ({"loaders": [iter([]), []]}, "got an iterator"),
        ({"layers": ["one", "tow"]}, "did you mean 'two'"),
        ({"layers": ["", "two"]}, "'two' is a part of ''"),
        ({"off_diagonal": 2.0}, r"off_diagonal: expected a finite number in \[0, 1\]"),
        ({"models": []}, "at least one"),
        ({"models": ["a", "b"]}, r"models\[0\]: expected a torch.nn.Module"),
    ],
)
def test_what_regmean_plus_plus_refuses(change: dict[str, Any], message: str) -> None:
    mlps, data = tasks()
    given = {"models": mlps, "loaders": data} | change
    with pytest.raises(pymerge.RequestError, match=message):
        pymerge.regmean_plus_plus(given.pop("models"), given.pop("loaders"), **given)


class Experts(nn.Module):
    """Two experts, of which the data choose one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts[int(x.sum() > 0)](x))


def test_an_expert_that_one_task_never_chooses_is_the_other_tasks() -> None:
    torch.manual_seed(6)
    twins = [Experts() for _ in range(2)]
    data = [[-torch.rand(20, 4)], [torch.rand(20, 4)]]
    states = [twin.state_dict() for twin in twins]
    grams = [pymerge.collect_gram(m, d) for m, d in zip(twins, data, strict=True)]
    for merged in (
        pymerge.regmean_merge(states, grams, off_diagonal=0.95),
        pymerge.regmean_plus_plus(twins, data),
    ):
        for k in range(2):
            name = f"experts.{k}.weight"
            torch.testing.assert_close(merged[name], states[k][name])
