"""Merges that weigh by statistics: against their definitions, from files, and with bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import pymerge
from pymerge.checkpoint.statistics import StatisticsRecord
from pymerge.cli import main
from pymerge.config import load_config
from pymerge.data_driven.statistics import ModelStatistics
from pymerge.engine.memory import MemorySink
from pymerge.plan import make_plan
from tests import data_oracles, models

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

Tensor = torch.Tensor
State = dict[str, Tensor]
T = torch.tensor
NAMES = {"w": (6, 5), "v": (7,), "buffer": (3,), "s": ()}


def family(count: int = 3, seed: int = 0) -> tuple[State, list[State], list[State]]:
    """Return a base, models, and squared gradients of all but the buffer."""
    generator = torch.Generator().manual_seed(seed)

    def state(scale: float) -> State:
        return {n: scale * torch.randn(s, generator=generator) for n, s in NAMES.items()}

    base = state(1.0)
    tuned = [{n: t + d for (n, t), d in zip(base.items(), state(0.1).values())} for _ in range(count)]
    fishers = [
        {n: t.square() * 10.0 ** (-3 * k) for n, t in state(1.0).items() if n != "buffer"}
        for k in range(count)
    ]
    fishers[0]["w"][0, :3] = 0.0
    return base, tuned, fishers


def close(got: Any, expected: Any) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("weights", [None, [2.0, 0.0, 0.5]])
@pytest.mark.parametrize(
    ("options", "floor", "rule", "normalize"),
    [
        ({}, 1e-6, "max_first", "global"),
        ({"semantics": "mergelm"}, 1e-6, "add", "global"),
        ({"semantics": "fusionbench"}, 1e-6, "add", "global"),
        ({"semantics": "mats"}, 1e-8, "max", "none"),
        ({"normalize": "tensor", "floor": 0.1}, 0.1, "max_first", "tensor"),
        ({"normalize": False, "floor_rule": "max", "floor": 0.3}, 0.3, "max", "none"),
        ({"normalize": True, "semantics": "mats"}, 1e-8, "max", "global"),
    ],
)
def test_fisher_is_that_of_the_definition(
    options: dict[str, Any], floor: float, rule: str, normalize: str, weights: list[float] | None
) -> None:
    _, tuned, fishers = family()
    got = pymerge.fisher_merge(tuned, fishers, weights=weights, **options)
    expected = data_oracles.fisher(
        tuned, fishers, weights or [1.0] * 3, floor=floor, rule=rule, normalize=normalize
    )
    close(got, expected)


def test_where_nothing_is_known_fisher_is_the_mean_by_weight() -> None:
    tuned = [T([0.0, 2.0]), T([4.0, 8.0])]
    known = [T([0.0, 1.0]), T([0.0, 1.0])]
    merged = pymerge.fisher_merge(tuned, known, weights=[1, 3], floor=0.0)
    assert merged.tolist() == [3.0, 6.5]
    nothing = [torch.zeros(2)] * 2
    for semantics in ("mats", "mergelm"):
        merged = pymerge.fisher_merge(tuned, nothing, semantics=semantics)
        torch.testing.assert_close(merged, T([2.0, 5.0]))
    # The official floor is that of the first model, which then is all there is.
    assert torch.equal(pymerge.fisher_merge(tuned, nothing), tuned[0])
    # One that is 0 everywhere is not divided by its norm; the other's tiny numbers count.
    tiny = pymerge.fisher_merge(tuned, [nothing[0], T([1e-30, 1e-40])], floor=0.0)
    assert torch.equal(tiny, tuned[1])


def test_products_that_float32_cannot_hold() -> None:
    tuned = [T([1e-8, 3.0]), T([3e-8, 1.0])]
    known = [T([1e-35, 1e-42]), T([1e-35, 1e-42])]
    merged = pymerge.fisher_merge(tuned, known, floor=0.0, normalize=False)
    torch.testing.assert_close(merged, T([2e-8, 2.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("base_fisher", [True, False])
@pytest.mark.parametrize(
    "numbers", [(1.0, 1.0, 0.0), (0.5, 3.0, 1e-3), (2.0, 0.0, 1e-12)], ids=str
)
def test_gradient_matching_is_that_of_the_authors_code(
    base_fisher: bool, numbers: tuple[float, float, float]
) -> None:
    base, tuned, fishers = family()
    own = family(seed=5)[2][0] if base_fisher else None
    scale, base_weight, delta = numbers
    weights = [3.0, 1.0, 2.0]
    got = pymerge.gradient_matching(
        base,
        tuned,
        fishers,
        base_fisher=own,
        weights=weights,
        scale=scale,
        base_weight=base_weight,
        delta=delta,
    )
    for name in fishers[0]:
        expected = data_oracles.gradient_matching(
            base[name],
            [model[name] for model in tuned],
            [fisher[name] for fisher in fishers],
            0.0 if own is None else own[name].double(),
            weights,
            scale,
            base_weight,
            delta,
        )
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-6, atol=1e-7)
    mean = sum(w * (m["buffer"] - base["buffer"]) for w, m in zip(weights, tuned, strict=True)) / 6
    torch.testing.assert_close(got["buffer"], base["buffer"] + scale * mean)


def test_gradient_matching_without_the_base_is_fisher_merging() -> None:
    base, tuned, fishers = family()
    matched = pymerge.gradient_matching(base, tuned, fishers)
    merged = pymerge.fisher_merge(tuned, fishers, normalize=False, floor=0.0)
    for name in base:
        torch.testing.assert_close(matched[name], merged[name], rtol=1e-6, atol=1e-7)
    nothing = [{"w": torch.zeros(6, 5)}] * 3
    still = pymerge.gradient_matching(base, tuned, nothing, scale=0.5)
    mean = sum(model["w"] for model in tuned) / 3
    torch.testing.assert_close(still["w"], base["w"] + 0.5 * (mean - base["w"]))
    unmoved = pymerge.gradient_matching(base, tuned, fishers, scale=0.0)
    assert all(torch.equal(unmoved[name], base[name]) for name in base)


# RegMean


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


def test_regmean_of_conv1d_is_that_of_its_transpose() -> None:
    _, tuned, grams = layers(out=6)  # square: the shape does not tell
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
    # No example anywhere: the average.
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


# Files


def write(root: Path, method: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a family of checkpoints with statistics, and return the configuration of a merge."""
    base, tuned = models.llama(2, dtype, hidden=32, mlp=48, vocabulary=64)
    models.save_family(root, base, tuned, files=3)
    generator = torch.Generator().manual_seed(7)
    record = StatisticsRecord(
        "gram" if method == "regmean" else "fisher", model_tensors=tuple(base)
    )
    for k, name in enumerate(("m0", "m1", "base")):
        tensors: State = {}
        for key, tensor in base.items():
            if not tensor.is_floating_point() or "norm" in key:
                continue
            if record.kind == "fisher":
                tensors[key] = torch.randn(tensor.shape, generator=generator).square() / (k + 1)
            elif "proj" in key:
                x = torch.randn(60, tensor.shape[1], generator=generator)
                tensors[key] = x.T @ x / 60
        pymerge.save_statistics(root / name, ModelStatistics(tensors, record))
    entries = [
        {"model": str(root / f"m{k}"), "parameters": {"weight": k + 1.0, "statistics": path}}
        for k, path in enumerate(
            (str(root / "m0"), str(root / "m1" / f"{record.kind}.safetensors"))
        )
    ]
    made: dict[str, Any] = {"merge_method": method, "models": entries}
    if method == "gradient_matching":
        made["base_model"] = str(root / "base")
        made["parameters"] = {"base_statistics": str(root / "base"), "lambda": 0.7, "delta": 1e-3}
    return made


def in_memory(root: Path, method: str) -> State:
    states = {name: models.load_one(root / name) for name in ("base", "m0", "m1")}
    own = [pymerge.load_statistics(root / name) for name in ("m0", "m1")]
    tuned = [states["m0"], states["m1"]]
    if method == "gradient_matching":
        return pymerge.merge(
            method,
            states["base"],
            tuned,
            weights=[1, 2],
            statistics=own,
            base_statistics=pymerge.load_statistics(root / "base"),
            scale=0.7,
            delta=1e-3,
        )
    return pymerge.merge(method, None, tuned, weights=[1, 2], statistics=own)


@pytest.mark.parametrize("method", ["fisher", "regmean", "gradient_matching"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_and_tensors_give_the_same_bytes(
    method: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of threads, memory, size of pieces and output shards."""
    config = write(tmp_path, method, dtype)
    expected = in_memory(tmp_path, method)
    for number, options in enumerate(
        ({}, {"threads": 1, "memory": "300MiB"}, {"threads": 5, "shard_size": "40KB"})
    ):
        out = tmp_path / f"out{number}"
        report = pymerge.merge_checkpoints(config, out, checksums=number == 0, **options)
        models.assert_same(models.load(out), expected)
        assert report.backend == "reference"
        assert "no native kernels" in report.why
        labels = [entry.label.split(" ")[0] for entry in report.inputs]
        assert "models[1].statistics" in labels
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["merge", str(file), str(tmp_path / "cli"), "--quiet"]) == 0
    models.assert_same(models.load(tmp_path / "cli"), expected)
    monkeypatch.setattr(MemorySink, "pieces", in_small_pieces)
    models.assert_same(in_memory(tmp_path, method), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        models.assert_same(in_memory(tmp_path, method), expected)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def in_small_pieces(self: MemorySink, name: str) -> Iterator[tuple[int, Tensor]]:
    flat = self.tensors[name].view(-1)
    for start in range(0, flat.numel(), 1009):
        yield start, flat[start : start + 1009]


def test_the_plan_shows_the_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yml"
    for method, kind in (("regmean", "gram"), ("gradient_matching", "fisher")):
        config = write(tmp_path / method, method)
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        assert main(["plan", str(file)]) == 0
        shown = capsys.readouterr().out
        assert re.search(rf"input +models\[0\]\.statistics \(.*{kind}\.safetensors\): \d+ ten", shown)
        assert ("base_statistics (" in shown) == (method == "gradient_matching")
        assert ("for the largest linear system" in shown) == (method == "regmean")
    with make_plan(load_config(config)) as plan:
        files = sum(size for checkpoint in plan.inputs for _, size in checkpoint.files)
        assert 0.8 * files < plan.bytes_to_read < files


def test_memory_of_linear_systems_is_planned(tmp_path: Path) -> None:
    config = write(tmp_path, "regmean")
    with make_plan(load_config(config)) as plan:
        need = plan.memory.matrix_bytes
        assert need > 0
    for name in ("m0", "m1"):
        save_file({"a_proj": torch.zeros(4, 3000)}, tmp_path / f"{name}.safetensors")
        record = StatisticsRecord("gram", model_tensors=("a_proj",))
        pymerge.save_statistics(
            tmp_path / f"{name}-g.safetensors", ModelStatistics({"a_proj": torch.eye(3000)}, record)
        )
    large = {
        "merge_method": "regmean",
        "models": [
            {
                "model": str(tmp_path / f"{name}.safetensors"),
                "parameters": {"statistics": str(tmp_path / f"{name}-g.safetensors")},
            }
            for name in ("m0", "m1")
        ],
    }
    with pytest.raises(pymerge.RequestError, match=r"memory: .* is too little.*works is \d+MiB"):
        make_plan(load_config(large), memory=400 << 20)
    with make_plan(load_config(large)) as plan:
        assert plan.memory.matrix_bytes > 4 * 8 * 3000 * 3000
        least = plan.memory.matrix_bytes
    report = pymerge.merge_checkpoints(large, tmp_path / "out", memory=least + (300 << 20))
    assert report.seconds > 0


def test_every_problem_of_the_statistics_is_reported_at_once(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    first = load_file(tmp_path / "m0" / "fisher.safetensors")
    record = pymerge.load_statistics(tmp_path / "m0").record
    shrunk = {n: t[:1] if n == "lm_head.weight" else t for n, t in first.items()}
    del shrunk["model.embed_tokens.weight"]
    shrunk["model.embed_tokns.weight"] = torch.ones(2)
    path = tmp_path / "wrong.safetensors"
    pymerge.save_statistics(path, ModelStatistics(shrunk, record))
    config["models"][0]["parameters"]["statistics"] = str(path)
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.merge_checkpoints(config, tmp_path / "out")
    text = str(caught.value)
    assert re.search(r"models\[0\]\.statistics \(.*\): 'lm_head.weight' has shape \(1, 32\)", text)
    assert "statistics of another architecture" in text
    assert "'model.embed_tokns.weight'" in text
    assert "lacks the statistics of 'model.embed_tokens.weight'" in text
    assert not (tmp_path / "out").exists()
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda c: c["models"][1]["parameters"].pop("statistics"), "'statistics' is missing"),
        (lambda c: c["models"][1]["parameters"].update(statistics="none"), "no such file"),
        (lambda c: c["models"][1]["parameters"].update(statistics=3), "expected the path of"),
        (
            lambda c: c["models"][1]["parameters"].update(statistics=[{"filter": "a", "value": "b"}]),
            "expected one value for all tensors",
        ),
        (
            lambda c: c["models"][1]["parameters"].update(statistics=c["models"][1]["model"]),
            "models[1].statistics",
        ),
        (lambda c: c.update(parameters={"base_statistics": "x"}), "no parameter 'base_statistics'"),
        (lambda c: [m["parameters"].update(weight=0) for m in c["models"]], "all weights are 0"),
        (lambda c: c["models"][0]["parameters"].update(weight=-1), "a finite number >= 0"),
        (lambda c: c.update(parameters={"semantics": "mergeml"}), "did you mean 'mergelm'"),
    ]
    for change, message in cases[:4] + cases[5:]:
        own = write(tmp_path / message.replace(" ", "_").replace("'", ""), "fisher")
        change(own)
        with pytest.raises(pymerge.RequestError) as caught:
            with make_plan(load_config(own)):
                pass
        assert message in str(caught.value)
    # A directory has statistics of the right kind, or there is no such file.
    other = write(tmp_path / "kinds", "regmean")
    other["models"][0]["parameters"]["statistics"] = str(tmp_path / "m0")
    with pytest.raises(pymerge.RequestError, match=r"no such file.*gram\.safetensors"):
        make_plan(load_config(other))
    other["models"][0]["parameters"]["statistics"] = str(tmp_path / "m0" / "fisher.safetensors")
    with pytest.raises(pymerge.RequestError, match="holds fisher statistics; regmean needs gram"):
        make_plan(load_config(other))
    other["models"][0]["parameters"]["statistics"] = str(tmp_path / "m0.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "m0.safetensors")
    with pytest.raises(pymerge.RequestError, match="is no file of statistics"):
        make_plan(load_config(other))


def test_values_that_no_statistics_have_are_found_while_merging(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    path = tmp_path / "m1" / "fisher.safetensors"
    tensors = load_file(path)
    record = pymerge.load_statistics(path).record
    for value in (-1.0, math.nan, math.inf):
        tensors["lm_head.weight"].view(-1)[77] = value
        save_file(tensors, path, metadata=record.to_metadata())
        with pytest.raises(pymerge.RequestError, match=r"models\[1\]\.statistics.*index 77"):
            pymerge.merge_checkpoints(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_warnings_about_tensors_of_which_nothing_is_known(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    for name in ("m0", "m1"):
        own = pymerge.load_statistics(tmp_path / name)
        less = {n: own[n] for n in own if "layers.1" not in n}
        known = tuple(n for n in own.record.model_tensors if "layers.1" not in n)
        record = StatisticsRecord("fisher", model_tensors=known)
        pymerge.save_statistics(tmp_path / name, ModelStatistics(less, record))
    with make_plan(load_config(config)) as plan:
        assert any("9 tensors are averaged" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("fisher", {"collected": None}, "expected a list of 3 fisher statistics.*None"),
        ("fisher", {"collected": [{}] * 2}, "expected 3 fisher statistics.*got 2"),
        ("fisher", {"collected": [{}] * 3}, r"fishers\[0\]: holds no tensors"),
        ("fisher", {"collected": [{"w": T([1.0])}] * 3}, r"fishers\[1\]\['w'\]: has shape \(1,\)"),
        ("fisher", {"collected": [{"x": T([1.0])}] * 3}, "statistics of another architecture"),
        ("fisher", {"collected": [{"v": -torch.ones(7)}] * 3}, r"'v' holds -1.0 at flat index 0"),
        ("fisher", {"collected": [{"v": torch.ones(7)}] * 2 + [{"w": torch.ones(6, 5)}]}, "lacks"),
        ("fisher", {"collected": [{"v": torch.ones(7).int()}] * 3}, "dtype torch.int32"),
        ("fisher", {"collected": torch.ones(3)}, "got Tensor"),
        ("fisher", {"weights": 0.0}, "all weights are 0"),
        ("fisher", {"weights": [1.0, -1.0, 1.0]}, r"weights\[1\]: expected a finite number >= 0"),
        ("fisher", {"floor": -1.0}, "floor: expected"),
        ("fisher", {"floor_rule": "min"}, "floor_rule: expected one of"),
        ("regmean", {"collected": [{"v": torch.eye(7)}] * 3}, r"shape \(7,\), which is no matrix"),
        ("regmean", {"collected": [{"w": torch.eye(6)}] * 3}, r"expected \(5, 5\)"),
        ("regmean", {"collected": [{"w": torch.eye(5) * math.nan}] * 3}, "NaN or infinity"),
        ("regmean", {"collected": [{"w": -torch.eye(5)}] * 3}, "negative diagonal element"),
        ("regmean", {"collected": [{"w": torch.ones(5, 5).triu()}] * 3}, "is not symmetric"),
        ("regmean", {"ridge": -1.0}, "ridge: expected"),
        ("matching", {"base_fisher": {"v": torch.ones(7)}}, r"base_fisher: lacks 'w'"),
        ("matching", {"scale": -1.0}, "scale: expected a finite number >= 0"),
    ],
)
def test_what_does_not_fit_is_named(function: str, change: dict[str, Any], message: str) -> None:
    base, tuned, fishers = family()
    given = {"weights": None} | change
    collected = given.pop("collected", None if "collected" in change else fishers)
    with pytest.raises(pymerge.RequestError, match=message):
        if function == "fisher":
            pymerge.fisher_merge(tuned, collected, **given)
        elif function == "regmean":
            collected = [{"w": torch.eye(5)}] * 3 if collected is fishers else collected
            pymerge.regmean_merge(tuned, collected, **given)
        else:
            pymerge.gradient_matching(base, tuned, collected, **given)


def test_methods_take_the_statistics_that_they_need() -> None:
    _, tuned, fishers = family()
    with pytest.raises(pymerge.RequestError, match="statistics: linear takes none"):
        pymerge.merge("linear", None, tuned, statistics=fishers)
    with pytest.raises(pymerge.RequestError, match="base_statistics: fisher takes none"):
        pymerge.merge("fisher", None, tuned, statistics=fishers, base_statistics=fishers[0])
    gram = ModelStatistics({"w": torch.eye(5)}, StatisticsRecord("gram"))
    with pytest.raises(pymerge.RequestError, match="gram statistics; fisher needs fisher"):
        pymerge.fisher_merge(tuned, [gram] * 3)


@pytest.mark.parametrize("method", ["fisher", "regmean", "gradient_matching"])
def test_edges(method: str) -> None:
    """NaN, integers, doubles, tied and empty tensors, lists and single tensors."""
    w = torch.ones(3, 2)
    states = [{"w": w + k, "i": T([1, 2]), "e": torch.zeros(0, 4)} for k in range(2)]
    base = {n: t.clone() for n, t in states[0].items()}
    own = torch.eye(2) if method == "regmean" else w
    extra = torch.zeros(4, 4) if method == "regmean" else torch.zeros(0, 4)
    collected = [{"w": own, "e": extra}] * 2
    origin = base if method == "gradient_matching" else None

    def run(tuned: list[State], **options: Any) -> State:
        return pymerge.merge(method, origin, tuned, statistics=collected, **options)

    merged = run(states)
    torch.testing.assert_close(merged["w"], w + 0.5)
    assert merged["i"].tolist() == [1, 2]
    assert merged["e"].shape == (0, 4)
    wide = run(states, dtype=torch.float64)["w"]
    assert wide.dtype == torch.float64
    bad = [{**states[0], "w": w * math.nan}, states[1]]
    with pytest.raises(pymerge.NonFiniteError, match=r"models\[0\].*\['w'\].*index 0"):
        run(bad)
    assert bool(run(bad, nan="keep")["w"].isnan().all())
    with pytest.raises(pymerge.RequestError, match="dtype torch.int64 and must equal"):
        run([states[0], {**states[1], "i": T([1, 3])}])
    one = pymerge.merge(
        method, None if origin is None else w, [w, w + 1], statistics=[own, own]
    )
    torch.testing.assert_close(one, w + 0.5)
    listed = pymerge.merge(
        method, None if origin is None else [w], [[w], [w + 1]], statistics=[[own], [own]]
    )
    torch.testing.assert_close(listed[0], w + 0.5)
    shared = [{"a": s["w"], "b": s["w"]} for s in states]
    known = [ModelStatistics({"a": own}, StatisticsRecord(
        "gram" if method == "regmean" else "fisher", aliases={"b": "a"}
    ))] * 2
    start = None if origin is None else {"a": base["w"], "b": base["w"]}
    both = pymerge.merge(method, start, shared, statistics=known)
    assert both["a"].data_ptr() == both["b"].data_ptr()
