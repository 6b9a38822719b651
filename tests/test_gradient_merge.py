"""Merging by gradients: against closed forms on quadratic losses, and plain loops."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import pymerge

Tensor = torch.Tensor
State = dict[str, Tensor]


def squares(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def regression(
    count: int = 3, seed: int = 0
) -> tuple[nn.Module, list[State], list[list[tuple[Tensor, Tensor]]]]:
    """Return an architecture, models that solve a task each, and the tasks' data in two batches."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(4, 2, bias=False)
    states, loaders = [], []
    for _ in range(count):
        weight = torch.randn(2, 4, generator=generator)
        x = torch.randn(20, 4, generator=generator)
        states.append({"weight": weight})
        loaders.append([(x[i : i + 10], x[i : i + 10] @ weight.T) for i in (0, 10)])
    return model, states, loaders


@pytest.mark.parametrize("start", ["first", "average"])
def test_average_steps_down_the_mean_gradient(start: str) -> None:
    model, states, loaders = regression()
    seen: list[float] = []
    got = pymerge.gradient_merge(
        model,
        states,
        loaders,
        squares,
        steps=3,
        lr=0.1,
        start=start,
        callback=lambda step, value: seen.append(value),
    )
    stack = torch.stack([state["weight"].double() for state in states])
    weight = (stack[0] if start == "first" else stack.mean(0)).clone()
    losses = []
    for step in range(3):
        gradient, value = torch.zeros(2, 4, dtype=torch.float64), 0.0
        for loader in loaders:
            x, y = (t.double() for t in loader[step % 2])
            residual = x @ weight.T - y
            gradient += 2 * residual.T @ x / residual.numel() / 3
            value += float(residual.square().mean()) / 3
        losses.append(value)
        weight -= 0.1 * gradient
    torch.testing.assert_close(got["weight"].double(), weight, rtol=1e-5, atol=1e-6)
    assert seen == pytest.approx(losses, rel=1e-5)


def test_matching_steps_down_the_stated_objective() -> None:
    """sum_i |grad L_i(theta) - grad L_i(theta_i)|^2: of a quadratic loss a polynomial."""
    model, states, loaders = regression(2)
    other = [{"weight": s["weight"] + 0.5} for s in states]  # gradients there are not 0
    seen: list[float] = []
    got = pymerge.gradient_merge(
        model,
        other,
        loaders,
        squares,
        objective="matching",
        steps=2,
        lr=0.05,
        callback=lambda step, value: seen.append(value),
    )
    weight = other[0]["weight"].double().clone()
    for step in range(2):
        total, gradient = 0.0, torch.zeros(2, 4, dtype=torch.float64)
        for loader, state in zip(loaders, other, strict=True):
            x = loader[step][0].double()
            matrix = 2 * x.T @ x / (2 * len(x))  # the gradient is (W - W*) M
            apart = (weight - state["weight"].double()) @ matrix
            total += float(apart.square().sum())
            gradient += 2 * apart @ matrix
        assert seen[step] == pytest.approx(total, rel=1e-4)
        weight -= 0.05 * gradient
    torch.testing.assert_close(got["weight"].double(), weight, rtol=1e-5, atol=1e-6)


def test_the_code_and_the_formula_are_different_methods() -> None:
    """Where a task's own model is no minimum of its loss, matching does not lead to one."""
    model = nn.Linear(1, 1, bias=False)
    x = torch.ones(1, 1)
    states = [{"weight": torch.tensor([[w]])} for w in (3.0, 5.0)]
    loaders = [[(x, torch.zeros(1, 1))]] * 2  # both losses are least at 0
    options: dict[str, Any] = {"steps": 200, "lr": 0.05}
    average = pymerge.gradient_merge(model, states, loaders, squares, **options)
    matching = pymerge.gradient_merge(
        model, states, loaders, squares, objective="matching", **options
    )
    assert float(average["weight"]) == pytest.approx(0.0, abs=1e-4)
    assert float(matching["weight"]) == pytest.approx(4.0, abs=1e-4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.embed(ids))) * self.frozen
        attended = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        return self.head(attended)


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("objective", ["average", "matching"])
def test_modules_with_shared_frozen_and_buffered_tensors(objective: str) -> None:
    torch.manual_seed(1)
    nets = [Net().train() for _ in range(2)]
    for k, net in enumerate(nets):
        net.norm.running_mean.fill_(0.1 * k)
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    data = [[(torch.randint(7, (5,)), torch.randint(7, (5,)))] for _ in nets]
    values: list[float] = []
    got = pymerge.gradient_merge(
        nets[0],
        nets,
        data,
        [entropy, entropy],
        objective=objective,
        steps=20,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        callback=lambda step, value: values.append(value),
    )
    assert values[-1] < values[0]
    for net, state in zip(nets, before, strict=True):
        assert net.training
        assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    assert list(got) == list(before[0])
    assert got["head.weight"] is got["embed.weight"]
    assert not torch.equal(got["embed.weight"], before[0]["embed.weight"])
    for name in ("frozen", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(got[name], before[0][name])
    Net().load_state_dict(got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": 1}, "models: expected at least 2, got 1"),
        ({"models": nn.Linear(4, 2)}, "expected a list of modules or state dicts"),
        ({"models": [3, 4]}, r"models\[0\]: expected a module or a state dict, got int"),
        ({"models": [{}, {}]}, r"models\[0\]: lacks 'weight' of model"),
        ({"models": [{"weight": torch.ones(2, 3)}] * 2}, r"has shape \(2, 3\), expected \(2, 4\)"),
        ({"models": [{"weight": torch.ones(2, 4), "b": torch.ones(1)}] * 2}, "'b' is not in model"),
        ({"loaders": [[]]}, "loaders: expected 3"),
        ({"loaders": [[], [], []]}, r"loaders\[0\]: loader: is empty"),
        ({"losses": [squares]}, "losses: expected a function, or 3"),
        ({"losses": lambda m, b: m(b[0])}, r"losses\[0\], step 0: expected a scalar, got"),
        ({"losses": lambda m, b: 3.0}, "expected a scalar, got float"),
        ({"losses": lambda m, b: m(b[0]).sum() * math.nan}, "the loss is nan"),
        ({"objective": "match"}, "did you mean 'matching'"),
        ({"start": "last"}, "start: expected one of first, average"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"lr": 1e30, "steps": 9}, "is (inf|nan)"),
        ({"model": nn.Linear(4, 2, bias=False).requires_grad_(False)}, "requires gradients"),
    ],
)
def test_what_gradient_merge_refuses(change: dict[str, Any], message: str) -> None:
    model, states, loaders = regression()
    if isinstance(change.get("models"), int):
        change = {"models": states[: change["models"]]}
    given: dict[str, Any] = {
        "model": model,
        "models": states,
        "loaders": loaders,
        "losses": squares,
    } | change
    with pytest.raises(pymerge.RequestError, match=message):
        pymerge.gradient_merge(**given)
