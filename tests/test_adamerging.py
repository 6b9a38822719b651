"""AdaMerging: the wrapped model, presets, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import pymerge
from pymerge import AdaMerging, RequestError
from pymerge.adamerging import pack_trimmed
from pymerge.adamerging.layers import Grouping, group_layers
from pymerge.ops.reference.packed import unpack

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Two layers, a buffer, and a parameter under two names."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(width, 16)
        self.second = nn.Linear(16, classes)
        self.tied = nn.Linear(width, 16, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("shift", torch.full((16,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x) + self.tied(x) + self.shift)
        return self.second(hidden)


def make(count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Net, State, list[State]]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    models = []
    for _ in range(count):
        model = {name: t + 0.1 * torch.randn_like(t) for name, t in base.items()}
        model |= {"tied.weight": model["first.weight"], "shift": base["shift"]}
        models.append(model)
    return net, base, models


# ------------------------------------------------------------------ the module


def test_its_only_parameter_is_the_table() -> None:
    net, base, models = make()
    heads = [nn.Linear(5, 3) for _ in models]
    ada = AdaMerging(net, base, models, heads=heads)
    assert [name for name, _ in ada.named_parameters()] == ["raw_coefficients"]
    assert ada.raw_coefficients.shape == (3, 4)
    assert not any(p.requires_grad for head in heads for p in head.parameters())


def test_calling_it_runs_the_merged_model() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, init=0.4)
    x = torch.randn(6, 8)
    names = list(ada.layers)
    expected = pymerge.task_arithmetic(
        {n: base[n] for n in names}, [{n: m[n] for n in names} for m in models], weights=0.4
    )
    assert torch.equal(ada(x), functional_call(net, expected, (x,)))
    state = ada.merged_state_dict()
    assert set(state) == set(net.state_dict())
    assert torch.equal(state["tied.weight"], state["first.weight"])
    net.load_state_dict(state)
    assert torch.equal(net(x), ada(x))


def test_heads_by_task() -> None:
    net, base, models = make()
    heads = [nn.Linear(5, 3 + k) for k in range(3)]
    ada = AdaMerging(net, base, models, heads=heads)
    x = torch.randn(2, 8)
    assert [ada(x, task=k).shape[-1] for k in range(3)] == [3, 4, 5]
    for task in (None, 3, -1):
        with pytest.raises(RequestError, match=r"task: expected 0 \.\. 2"):
            ada(x, task=task)


def test_a_head_of_the_wrong_size_is_named() -> None:
    net, base, models = make()
    heads = [nn.Linear(5, 3), nn.Linear(7, 3), nn.Linear(5, 3)]
    ada = AdaMerging(net, base, models, heads=heads)
    with pytest.raises(RequestError, match=r"heads\[1\]: expected a head of 5 features.*one of 7"):
        ada(torch.randn(2, 8), task=1)


@pytest.mark.parametrize("trimmed", [False, True])
def test_gradient_is_that_of_the_official_construction(trimmed: bool) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, trimmed=trimmed)
    x = torch.randn(6, 8)
    ada(x).square().sum().backward()
    lam = torch.full((3, 4), 0.3, requires_grad=True)
    if trimmed:
        packed = pack_trimmed({n: base[n] for n in ada.layers}, models)
        vectors = {n: [unpack(p.mask, p.values, base[n]) for p in own] for n, own in packed.items()}
    else:
        vectors = {n: [m[n] - base[n] for m in models] for n in ada.layers}
    merged = {
        n: sum((lam[k, i] * v for k, v in enumerate(vectors[n])), base[n])
        for i, n in enumerate(ada.layers)
    }
    functional_call(net, merged, (x,)).square().sum().backward()
    torch.testing.assert_close(ada.raw_coefficients.grad, lam.grad, rtol=1e-4, atol=1e-6)


def test_clamp_has_the_gradient_of_torch() -> None:
    net, base, models = make(5)
    start = [-0.1, 0.0, 0.5, 1.0, 1.1]
    x = torch.randn(6, 8)
    free = AdaMerging(net, base, models, "task", init=[0.0, 0.0, 0.5, 1.0, 1.0], clamp=None)
    cut = AdaMerging(net, base, models, "task", init=start)
    assert torch.equal(cut(x), free(x))
    cut(x).sum().backward()
    free(x).sum().backward()
    got, full = cut.raw_coefficients.grad, free.raw_coefficients.grad
    assert got is not None
    assert full is not None
    inside = torch.tensor([[0.0], [1.0], [1.0], [1.0], [0.0]])
    torch.testing.assert_close(got, full * inside)
    assert cut.coefficients.values.flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("task", ["all"]),
        ("module", ["first", "second"]),
        ("layer", ["first.weight", "first.bias", "second.weight", "second.bias"]),
        ([r"^(first|second)\.w"], ["first.w", "first.bias", "second.w", "second.bias"]),
    ],
)
def test_granularity(granularity: Any, groups: list[str]) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, granularity)
    assert list(ada.grouping.names) == groups
    ada(torch.randn(2, 8)).sum().backward()
    assert ada.raw_coefficients.grad is not None
    assert ada.raw_coefficients.grad.shape == (3, len(groups))


class Nested(nn.Module):
    """Modules within modules, and a parameter outside of any."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.enc(x) * self.scale


def test_a_module_is_the_innermost_one() -> None:
    names = ["enc.0.weight", "enc.0.bias", "enc.1.weight", "scale"]
    grouping = group_layers(names, "module")
    assert grouping == Grouping(("enc.0", "enc.1", "scale"), (0, 0, 1, 2))
    deep = ["a.b.0.q.weight", "a.b.1.q.weight", "a.b.0.q.bias", "a.b.0.weight", "a.weight"]
    expected = Grouping(("a.b.0.q", "a.b.1.q", "a.b.0", "a"), (0, 1, 0, 2, 3))
    assert group_layers(deep, "module") == expected
    torch.manual_seed(0)
    net = Nested()
    base = {name: t.clone() for name, t in net.state_dict().items()}
    models = [{name: t + torch.randn_like(t) for name, t in base.items()} for _ in range(2)]
    ada = AdaMerging(net, base, models, "module", init=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert ada.grouping.names == ("scale", "enc.0", "enc.1")
    merged = ada.merged_state_dict()
    for name, (first, second) in {
        "scale": (0.1, 0.4),
        "enc.0.weight": (0.2, 0.5),
        "enc.0.bias": (0.2, 0.5),
        "enc.1.weight": (0.3, 0.6),
    }.items():
        tau = [model[name] - base[name] for model in models]
        expected_tensor = base[name] + first * tau[0] + second * tau[1]
        torch.testing.assert_close(merged[name], expected_tensor)


def test_works_in_functional_call_autocast_and_gradient_checkpointing() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    x = torch.randn(6, 8)
    plain = torch.autograd.grad(ada(x).sum(), ada.raw_coefficients)[0]
    table = torch.full((3, 4), 0.3, requires_grad=True)
    output = functional_call(ada, {"raw_coefficients": table}, (x,))
    assert torch.equal(torch.autograd.grad(output.sum(), table)[0], plain)
    kept = checkpoint(ada, x, use_reentrant=False)
    assert isinstance(kept, torch.Tensor)
    assert torch.equal(torch.autograd.grad(kept.sum(), ada.raw_coefficients)[0], plain)
    with torch.autocast("cpu", torch.bfloat16):
        low = ada(x)
    assert low.dtype == torch.bfloat16
    rounded = torch.autograd.grad(low.float().sum(), ada.raw_coefficients)[0]
    torch.testing.assert_close(rounded, plain, rtol=0.1, atol=0.1)


# torch's own tracer makes an instance of the function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("trimmed", [False, True])
def test_compiles_without_a_graph_break(trimmed: bool) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, trimmed=trimmed)
    x = torch.randn(6, 8)
    compiled = torch.compile(lambda value: ada(value), backend="aot_eager", fullgraph=True)
    output = compiled(x)
    torch.testing.assert_close(output, ada(x))
    got = torch.autograd.grad(output.sum(), ada.raw_coefficients)[0]
    torch.testing.assert_close(got, torch.autograd.grad(ada(x).sum(), ada.raw_coefficients)[0])


def test_architecture_may_be_on_the_meta_device() -> None:
    net, base, models = make()
    with torch.device("meta"):
        empty = Net()
    x = torch.randn(2, 8)
    assert torch.equal(AdaMerging(empty, base, models)(x), AdaMerging(net, base, models)(x))


def test_bf16_checkpoints_stay_in_bf16(tmp_path: Path) -> None:
    net, base, models = make()
    small = [{n: t.bfloat16() for n, t in one.items()} for one in (base, *models)]
    ada = AdaMerging(net, small[0], small[1:])
    assert ada.nbytes() == sum(4 * t.nbytes for n, t in small[0].items() if n in ada.layers) + 32
    assert ada(torch.randn(2, 8)).dtype == torch.float32


def test_frozen_parameters_and_buffers() -> None:
    net, base, models = make()
    net.second.requires_grad_(False)
    with pytest.raises(RequestError, match=r"models\[0\]\['second.weight'\]: a frozen parameter"):
        AdaMerging(net, base, models, preset="fusion_bench")
    ada = AdaMerging(net, base, models, preset="fusion_bench", fixed="base")
    assert list(ada.layers) == ["first.weight", "first.bias"]
    assert torch.equal(ada.merged_state_dict()["second.weight"], base["second.weight"])
    assert len(AdaMerging(net, base, models).layers) == 4  # official: all parameters
    other = [dict(model) for model in models]
    other[1]["shift"] = base["shift"] + 1
    with pytest.raises(RequestError, match=r"models\[1\]\['shift'\]: a buffer is not merged"):
        AdaMerging(net, base, other)


def test_models_that_do_not_fit_are_all_named() -> None:
    net, base, models = make()
    bad = [dict(model) for model in models]
    del bad[0]["first.bias"]
    bad[1]["second.weight"] = torch.zeros(5, 15)
    bad[2]["second.bias"] = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(RequestError) as caught:
        AdaMerging(net, base, bad)
    text = str(caught.value)
    assert "models[0]: does not fit the architecture: lacks 'first.bias'" in text
    assert "models[1]['second.weight']: expected shape (5, 16)" in text
    assert "models[2]['second.bias']: expected a floating-point tensor, got torch.int64" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "oficial"}, "preset: expected one of official, fusion_bench.*official"),
        ({"granularity": "layers"}, "granularity: expected 'layer'"),
        ({"granularity": ["("]}, r"granularity\[0\]: expected a regular expression"),
        ({"granularity": ["nowhere"]}, "granularity: .*'nowhere' is found in none"),
        ({"init": [0.1, 0.2]}, r"init: expected a number, 3 numbers"),
        ({"init": torch.zeros(3, 3)}, r"init: .*table of shape \(3, 4\).*got shape \(3, 3\)"),
        ({"init": float("nan")}, "init: expected finite numbers"),
        ({"heads": [nn.Linear(5, 2)]}, "heads: expected 3, one per model; got 1"),
        ({"clamp": (1.0, 0.0)}, r"clamp: expected \(lowest, highest\)"),
        ({"density": 1.5}, r"density: expected a number in \[0, 1\]"),
        ({"names": ["a"]}, "names: expected 3"),
        ({"fixed": "no"}, "fixed: expected 'equal' or 'base'"),
        ({"models": []}, "models: expected a list of at least one model"),
        ({"model": "net"}, "model: expected a module, got str"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    net, base, models = make()
    arguments = {"model": net, "base": base, "models": models} | change
    with pytest.raises(RequestError, match=message):
        AdaMerging(**arguments)
