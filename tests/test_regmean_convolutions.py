"""RegMean of convolutions: their Gram matrices are those of the patches below the kernels."""

from __future__ import annotations

import copy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import pymerge
from pymerge.checkpoint.statistics import StatisticsRecord
from pymerge.commands.main import main
from pymerge.config import load_config
from pymerge.plan import make_plan
from pymerge.statistics import convolutions
from pymerge.statistics.files import ModelStatistics
from tests import data_oracles, models

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

Tensor = torch.Tensor
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def patches_of(layer: Convolution, x: Tensor) -> Tensor:
    """Return the rows that a convolution sees, [patches, in * prod(kernel)], in float64.

    A twin whose kernels are 1 at one element each puts out what lies below that element.
    """
    twin = copy.deepcopy(layer).double()
    size = layer.weight[0].numel()
    twin.weight = nn.Parameter(torch.eye(size).double().reshape(size, *layer.weight.shape[1:]))
    twin.bias = None
    with torch.no_grad():
        found = twin(x.double())
    return found.movedim(1, -1).reshape(-1, size)


def gram_of(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double() / len(rows)


def of_shape(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: type[Convolution], size: Any, seed: int = 0, **options: Any) -> Convolution:
    torch.manual_seed(seed)
    return kind(3, 4, size, **options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


# torch's, where one side gets more padding than the other.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"padding": 1},
        {"padding": 2, "dilation": 2, "stride": 3},
        {"padding": "same", "dilation": 3},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "size"), [(nn.Conv1d, 3), (nn.Conv2d, (3, 2)), (nn.Conv3d, (2, 3, 2))]
)
def test_the_gram_of_a_convolution_is_that_of_its_patches(
    kind: type[Convolution], size: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of padding, steps and holes; in one part or in many."""
    own = layer(kind, size, **options)
    x = of_shape(5, 3, *([9, 8, 7][: len(own.kernel_size)]))
    expected = gram_of(patches_of(own, x))
    for most in (1 << 22, 500, 1):
        monkeypatch.setattr(convolutions, "_AT_ONCE", most)
        found = pymerge.collect_gram(own, [x[:2], x[2:]], convolutions=True)
        close(found["weight"], expected)
    with torch.no_grad():
        places = prod(own(x).shape) // 4
    assert (found.record.examples, found.record.tokens) == (5, places)
    assert "convolutions too" in found.record.estimator


def test_the_patches_of_two_dimensions_are_those_of_unfold() -> None:
    how: dict[str, Any] = {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}
    own = layer(nn.Conv2d, (2, 3), **how)
    x = of_shape(4, 3, 8, 9)
    rows = functional.unfold(x.double(), (2, 3), **how).transpose(1, 2).reshape(-1, 18)
    found = pymerge.collect_gram(own, [x], convolutions=True)
    close(found["weight"], gram_of(rows))
    # Merged as the linear layers on the same rows.
    tuned = [layer(nn.Conv2d, (2, 3), seed, **how).state_dict() for seed in (2, 3)]
    flat = [{"weight": t["weight"].flatten(1), "bias": t["bias"]} for t in tuned]
    rows = torch.cat([rows, 1e-3 * torch.eye(18).double()])
    grams = [{"weight": gram_of(rows * scale).float()} for scale in (1.0, 2.0)]
    merged = pymerge.regmean_merge(tuned, grams)
    expected = pymerge.regmean_merge(flat, grams)
    assert torch.equal(merged["weight"], expected["weight"].reshape(4, 3, 2, 3))
    assert torch.equal(merged["bias"], expected["bias"])


class Net(nn.Module):
    """Convolutions of several kinds, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 5, 1)
        self.up = nn.ConvTranspose2d(5, 5, 2)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.tanh(self.up(self.point(self.depth(x))))
        return self.head(x.mean((2, 3)))


def nets(count: int = 2) -> tuple[list[Net], list[list[Tensor]]]:
    torch.manual_seed(3)
    made = [Net().eval() for _ in range(count)]
    return made, [[of_shape(6, 3, 8, 8, seed=10 + k) + 0.3 * k] for k in range(count)]


def test_convolutions_are_for_the_asking() -> None:
    (net, _), (data, _) = nets()
    plain = pymerge.collect_gram(net, data)
    assert sorted(plain) == ["head.weight"]
    assert "convolutions" not in plain.record.estimator
    pointwise = pymerge.collect_gram(net, data, convolutions="pointwise")
    assert sorted(pointwise) == ["head.weight", "point.weight"]
    assert "pointwise convolutions" in pointwise.record.estimator
    every = pymerge.collect_gram(net, data, convolutions=True)
    assert sorted(every) == ["head.weight", "point.weight", "stem.weight"]
    assert every["stem.weight"].shape == (27, 27)
    assert torch.equal(every["head.weight"], plain["head.weight"])
    # A kernel of one element is a linear layer on the channels.
    seen: list[Tensor] = []
    net.point.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net(data[0])
    linear = nn.Linear(6, 5)
    across = pymerge.collect_gram(linear, [seen[0].permute(0, 2, 3, 1)])
    close(every["point.weight"], across["weight"])
    close(every["point.weight"], pointwise["point.weight"])


def test_what_is_merged_minimises_the_difference_of_outputs() -> None:
    how: dict[str, Any] = {"padding": 1, "padding_mode": "reflect", "bias": False}
    own = [layer(nn.Conv2d, 3, seed, **how) for seed in (0, 1)]
    data = [of_shape(5, 3, 7, 7, seed=seed) for seed in (2, 3)]
    grams = [
        pymerge.collect_gram(m, [x], convolutions=True) for m, x in zip(own, data, strict=True)
    ]
    states = [dict(module.state_dict()) for module in own]
    merged = pymerge.regmean_merge(states, grams, weights=[2.0, 0.5])["weight"]

    def loss(weight: Tensor) -> float:
        total = 0.0
        for part, module, x in zip((2.0, 0.5), own, data, strict=True):
            twin, same = copy.deepcopy(module).double(), copy.deepcopy(module).double()
            twin.weight = nn.Parameter(weight.double())
            with torch.no_grad():
                total += part * float((twin(x.double()) - same(x.double())).square().sum())
        return total

    best = loss(merged)
    generator = torch.Generator().manual_seed(4)
    for _ in range(10):
        assert best < loss(merged + 1e-2 * torch.randn(merged.shape, generator=generator))
    average = (states[0]["weight"] * 2 + states[1]["weight"] * 0.5) / 2.5
    assert best < loss(average)
    rows = [patches_of(m, x) for m, x in zip(own, data, strict=True)]
    flat = [state["weight"].flatten(1) for state in states]
    close(merged.flatten(1), data_oracles.least_squares(rows, flat, [2.0, 0.5]))


@pytest.mark.parametrize("options", [{"off_diagonal": 0.0}, {"off_diagonal": 0.9}, {"ridge": 0.2}])
def test_the_diagonal_counts_as_in_linear_layers(options: dict[str, Any]) -> None:
    _, data = nets()
    convs = [layer(nn.Conv2d, 3, seed) for seed in (5, 6)]
    grams = [
        pymerge.collect_gram(m, x, convolutions=True) for m, x in zip(convs, data, strict=True)
    ]
    merged = pymerge.regmean_merge([dict(m.state_dict()) for m in convs], grams, **options)
    given = [gram["weight"].double() for gram in grams]
    if "ridge" in options:
        lift = options["ridge"] * sum(float(g.trace()) for g in given) / (2 * 27)
        given = [g + lift * torch.eye(27) for g in given]
    flat = [m.weight.detach().flatten(1) for m in convs]
    expected = data_oracles.regmean(flat, given, [1.0, 1.0], options.get("off_diagonal", 1.0))
    close(merged["weight"].flatten(1), expected)


@pytest.mark.parametrize("which", [True, "pointwise"])
def test_files_and_tensors_give_the_same_bytes(which: Any, tmp_path: Path) -> None:
    twins, data = nets()
    entries, grams = [], []
    for k, (net, own) in enumerate(zip(twins, data, strict=True)):
        root = tmp_path / f"m{k}"
        root.mkdir()
        save_file(dict(net.state_dict()), root / "model.safetensors")
        grams.append(pymerge.collect_gram(net, own, convolutions=which))
        pymerge.save_statistics(root, grams[-1])
        entries.append({"model": str(root), "parameters": {"statistics": str(root)}})
    made = {
        "merge_method": "regmean",
        "models": entries,
        "parameters": {"ridge": 1e-6, "off_diagonal": 0.95},
    }
    states = [dict(net.state_dict()) for net in twins]
    expected = pymerge.regmean_merge(states, grams, ridge=1e-6, off_diagonal=0.95)
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    for number, more in enumerate(([], ["--threads", "1", "--shard-size", "1KB"])):
        out = tmp_path / f"out{number}"
        assert main(["merge", str(file), str(out), "--quiet", *more]) == 0
        models.assert_same(models.load(out), expected)
    average = pymerge.linear(states)
    for name in ("stem.weight", "point.weight", "head.weight"):
        taken = which is True or name != "stem.weight"
        assert torch.equal(expected[name], average[name]) != taken
    for name in ("depth.weight", "up.weight", "norm.weight"):
        assert torch.equal(expected[name], average[name])
    with make_plan(load_config(file)) as plan:
        inputs = 27 if which is True else 6
        assert plan.memory.matrix_bytes >= 3 * 8 * inputs**2


class Padding(nn.Conv2d):
    """Pads by itself, as ports of TensorFlow's models do: its attributes do not say so."""

    def forward(self, input: Tensor) -> Tensor:
        padded = functional.pad(input, (0, 1, 0, 1))
        return functional.conv2d(padded, self.weight, self.bias, stride=self.stride)


class Standardized(nn.Conv2d):
    """Computes its kernel from the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(input, self.weight - self.weight.mean(), self.bias)


def test_what_reaches_torch_is_what_counts() -> None:
    torch.manual_seed(0)
    x = of_shape(4, 3, 6, 6)
    own = Padding(3, 4, 2, stride=2)
    found = pymerge.collect_gram(own, [x], convolutions=True)
    plain = nn.Conv2d(3, 4, 2, stride=2)
    close(found["weight"], gram_of(patches_of(plain, functional.pad(x, (0, 1, 0, 1)))))
    # The objective is about another weight than that which is merged: it is averaged.
    both = nn.Sequential(nn.Conv2d(3, 3, 1), Standardized(3, 4, 2))
    found = pymerge.collect_gram(both, [x], convolutions=True)
    assert torch.equal(found["1.weight"], torch.zeros(12, 12))
    state = dict(both.state_dict())
    other = {name: tensor + 1 for name, tensor in state.items()}
    merged = pymerge.regmean_merge([state, other], [found, found], ridge=1e-6)
    close(merged["1.weight"], state["1.weight"] + 0.5)
    # An example without the dimension of examples, and a layer that is called twice.
    single = nn.Conv2d(3, 3, 3, padding=1)

    def twice(model: nn.Module, batch: Tensor) -> Tensor:
        return model(model(batch[0]))

    found = pymerge.collect_gram(single, [x[:1]], convolutions=True, forward=twice)
    with torch.no_grad():
        rows = torch.cat([patches_of(single, x[:1]), patches_of(single, single(x[:1]))])
    close(found["weight"], gram_of(rows))


def test_padding_of_sequences_does_not_count() -> None:
    """Of convolutions over positions: those that put out as many as the mask has."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Conv1d(3, 4, 3, padding=1)
            self.fewer = nn.Conv1d(4, 4, 2, stride=2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fewer(self.same(x))

    torch.manual_seed(0)
    model = Reader()
    x = of_shape(3, 3, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    batch = {"x": x, "attention_mask": mask}
    found = pymerge.collect_gram(model, [batch], convolutions=True)
    rows = patches_of(model.same, x)
    close(found["same.weight"], gram_of(rows[mask.bool().flatten()]))
    with torch.no_grad():
        close(found["fewer.weight"], gram_of(patches_of(model.fewer, model.same(x))))
    every = pymerge.collect_gram(model, [batch], convolutions=True, mask=lambda _: None)
    close(every["same.weight"], gram_of(rows))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    (net, other), (data, _) = nets()
    for which in ("all", 1, None):
        with pytest.raises(pymerge.RequestError, match="convolutions: expected False, True or"):
            pymerge.collect_gram(net, data, convolutions=which)  # type: ignore[arg-type]
        with pytest.raises(pymerge.RequestError, match="regmean_plus_plus: convolutions: expected"):
            pymerge.regmean_plus_plus([net], [data], convolutions=which)  # type: ignore[arg-type]
    wide = nn.Conv2d(3, 3, 3)
    with pytest.raises(pymerge.RequestError, match="convolutions=True takes its convolutions"):
        pymerge.collect_gram(wide, data)
    with pytest.raises(pymerge.RequestError, match="a kernel of size 1"):
        pymerge.collect_gram(wide, data, convolutions="pointwise")
    with pytest.raises(pymerge.RequestError, match="without groups"):
        pymerge.collect_gram(nn.Conv2d(3, 3, 3, groups=3), data, convolutions=True)
    with pytest.raises(pymerge.RequestError, match=r"batch 0: .*'weight' hold NaN"):
        pymerge.collect_gram(wide, [data[0] * torch.nan], convolutions=True)
    with pytest.raises(pymerge.RequestError, match="reached any linear layer or convolution"):
        pymerge.collect_gram(wide, data, convolutions=True, forward=lambda m, b: b)
    states = [dict(net.state_dict()), dict(other.state_dict())]
    plain = {"stem.weight": torch.eye(3)}
    for bad in (plain, ModelStatistics(plain, StatisticsRecord("gram"))):
        with pytest.raises(
            pymerge.RequestError,
            match=r"'stem.weight'.*has shape \(3, 3\), expected \(27, 27\) for the weight \(6, 3,",
        ):
            pymerge.regmean_merge(states, [bad, bad])
    across = ModelStatistics(
        {"stem.weight": torch.eye(6)},
        StatisticsRecord("gram", transposed=frozenset({"stem.weight"})),
    )
    with pytest.raises(pymerge.RequestError, match="which is no matrix"):
        pymerge.regmean_merge(states, [across, across])
    # From files, by the plan: headers only.
    for k in (0, 1):
        save_file(states[k], tmp_path / f"m{k}.safetensors")
    pymerge.save_statistics(
        tmp_path / "g.safetensors",
        ModelStatistics({"stem.weight": torch.eye(3)}, StatisticsRecord("gram")),
    )
    made = {
        "merge_method": "regmean",
        "models": [{"model": str(tmp_path / f"m{k}.safetensors")} for k in (0, 1)],
        "parameters": {"statistics": str(tmp_path / "g.safetensors")},
    }
    with pytest.raises(pymerge.RequestError, match=r"'stem.weight' has shape \(3, 3\), expected"):
        make_plan(load_config(made))
    # Statistics with convolutions beside some without.
    grams = [pymerge.collect_gram(net, data, convolutions=own) for own in (True, False)]
    with pytest.raises(
        pymerge.RequestError, match=r"grams\[1\]: lacks the statistics of '(stem|point).weight'"
    ):
        pymerge.regmean_merge(states, grams)


def test_regmean_plus_plus_sees_what_merged_convolutions_make() -> None:
    twins, data = nets()
    merged = pymerge.regmean_plus_plus(twins, data, convolutions=True, off_diagonal=0.9, ridge=1e-9)
    average = pymerge.linear([dict(net.state_dict()) for net in twins])
    rows = [patches_of(net.stem, x[0]) for net, x in zip(twins, data, strict=True)]
    stem = data_oracles.regmean(
        [net.stem.weight.flatten(1) for net in twins], [gram_of(r) for r in rows], [1.0, 1.0], 0.9
    )
    close(merged["stem.weight"].flatten(1), stem)
    # All that lies between is averaged, the stem is merged: that is what the next layer sees.
    middle = copy.deepcopy(twins[0])
    middle.load_state_dict({**average, "stem.weight": merged["stem.weight"]})
    rows = []
    for x in data:
        with torch.no_grad():
            inner = middle.depth(torch.relu(middle.norm(middle.stem(x[0]))))
        rows.append(patches_of(middle.point, inner))
    point = data_oracles.regmean(
        [net.point.weight.flatten(1) for net in twins], [gram_of(r) for r in rows], [1.0, 1.0], 0.9
    )
    found = merged["point.weight"].flatten(1).double()
    torch.testing.assert_close(found, point, rtol=1e-4, atol=1e-5)
    close(merged["depth.weight"], average["depth.weight"])
    plain = pymerge.regmean_plus_plus(twins, data)
    close(plain["stem.weight"], average["stem.weight"])
