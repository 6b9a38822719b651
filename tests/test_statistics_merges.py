"""Merges that weigh by statistics: against their definitions, from files, and with bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pymerge
from pymerge.checkpoint.statistics import StatisticsRecord
from pymerge.methods.statistics import passes
from pymerge.statistics.files import ModelStatistics
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
    tuned = []
    for _ in range(count):
        step = state(0.1)
        tuned.append({name: tensor + step[name] for name, tensor in base.items()})
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
@pytest.mark.parametrize("numbers", [(1.0, 1.0, 0.0), (0.5, 3.0, 1e-3), (2.0, 0.0, 1e-12)], ids=str)
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
        (
            "matching",
            {"base_fisher": {"v": torch.ones(7)}},
            r"base_fisher: lacks the statistics of 'w'",
        ),
        ("matching", {"scale": -1.0}, "scale: expected a finite number >= 0"),
    ],
)
def test_what_does_not_fit_is_named(function: str, change: dict[str, Any], message: str) -> None:
    base, tuned, fishers = family()
    grams = [{"w": torch.eye(5)}] * 3
    given = {"weights": None} | change
    own = given.pop("collected", grams if function == "regmean" else fishers)
    run: Callable[..., Any] = {
        "fisher": pymerge.fisher_merge,
        "regmean": pymerge.regmean_merge,
        "matching": lambda *rest, **named: pymerge.gradient_matching(base, *rest, **named),
    }[function]
    with pytest.raises(pymerge.RequestError, match=message):
        run(tuned, own, **given)


def test_methods_take_the_statistics_that_they_need() -> None:
    _, tuned, fishers = family()
    with pytest.raises(pymerge.RequestError, match="statistics: linear takes none"):
        pymerge.merge("linear", None, tuned, statistics=fishers)
    with pytest.raises(pymerge.RequestError, match="base_statistics: fisher takes none"):
        pymerge.merge("fisher", None, tuned, statistics=fishers, base_statistics=fishers[0])
    gram = ModelStatistics({"w": torch.eye(5)}, StatisticsRecord("gram"))
    with pytest.raises(pymerge.RequestError, match="holds gram statistics; fisher needs fisher"):
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
    with pytest.raises(pymerge.RequestError, match=r"dtype torch\.int64 and must equal"):
        run([states[0], {**states[1], "i": T([1, 3])}])
    one = pymerge.merge(method, None if origin is None else w, [w, w + 1], statistics=[own, own])
    torch.testing.assert_close(one, w + 0.5)
    listed = pymerge.merge(
        method, None if origin is None else [w], [[w], [w + 1]], statistics=[[own], [own]]
    )
    torch.testing.assert_close(listed[0], w + 0.5)
    shared = [{"a": s["w"], "b": s["w"]} for s in states]
    known = [
        ModelStatistics(
            {"a": own},
            StatisticsRecord("gram" if method == "regmean" else "fisher", aliases={"b": "a"}),
        )
    ] * 2
    start = None if origin is None else {"a": base["w"], "b": base["w"]}
    both = pymerge.merge(method, start, shared, statistics=known)
    assert both["a"].data_ptr() == both["b"].data_ptr()


def test_fisher_information_is_wrong_at_an_index_of_the_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever a tensor is cut into tiles."""
    monkeypatch.setattr(passes, "_AT_ONCE", 8)
    fisher = torch.ones(50)
    fisher[29] = math.nan
    with pytest.raises(pymerge.RequestError, match="holds nan at flat index 29;"):
        pymerge.fisher_merge([torch.ones(50)] * 2, [torch.ones(50), fisher])
