"""Whole-model TIES whose sample guesses the sign of zero votes wrong: it merges a second time.

A sample takes lines of 32 elements, so that it sees the large tensor alone. Hundreds of tensors
that are shorter than a line outvote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.adapters import load, run_merge_adapters
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Work
from pymerge.merging.tensors import MemorySource
from pymerge.methods import METHODS
from pymerge.ops.array import Flat
from tests import models, oracles
from tests.adapter_files import lora_tensors, save_adapter
from tests.conftest import BACKEND_IDS
from tests.models import State

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

LARGE = (64, 64)
SHORT = [(31,), (5, 6), (3, 2, 4), (29,)]
COUNT = 3
DENSE = 0.999  # keeps everything where more elements than that have the least magnitude

# (parameters of the merge, its result by the published algorithm)
Rule = Callable[[torch.Tensor, float], torch.Tensor]
DIALECTS: dict[str, tuple[dict[str, Any], Rule]] = {
    "mean": ({}, lambda deltas, density: oracles.official_delta(deltas, density, "mean")),
    "sum": (
        {"merge": "sum"},
        lambda deltas, density: oracles.official_delta(deltas, density, "sum"),
    ),
    "max": (
        {"merge": "max"},
        lambda deltas, density: oracles.official_delta(deltas, density, "max"),
    ),
    "mergelm": ({"semantics": "mergelm"}, oracles.mergelm_delta),
}


def family(
    sign: int, *, short: int = 300, least: float = 1 / 16, dtype: torch.dtype = torch.float32
) -> tuple[State, list[State]]:
    """Return a base and models: a large tensor whose deltas have a sign, `short` short ones of the
    other, and votes of zero in both and in one tensor more.

    A vote is zero where two deltas cancel and the third, `least`, is trimmed. Every number is a
    multiple of 1/16 that bfloat16 holds, so that all sums are exact.
    """
    generator = torch.Generator().manual_seed(short)

    def draw(shape: tuple[int, ...], least: int, most: int) -> torch.Tensor:
        return torch.randint(least, most, shape, generator=generator) / 16

    shapes = {"m.large.weight": LARGE}
    shapes |= {f"t{k:04}.short": SHORT[k % len(SHORT)] for k in range(short)}
    shapes |= {"a.votes": (20,)}
    base = {name: draw(shape, -32, 32) for name, shape in shapes.items()}
    deltas = []
    for _ in range(COUNT):
        own = {name: -sign * draw(shape, 16, 33) for name, shape in shapes.items()}
        own["m.large.weight"] *= -1
        deltas.append(own)
    cancelling = [("m.large.weight", 3), ("a.votes", 20)]
    cancelling += [(f"t{k:04}.short", 2) for k in range(0, short, 50)]
    for name, count in cancelling:
        first, second, third = (own[name].view(-1)[:count] for own in deltas)
        first[:] = draw((count,), 30, 33)  # which no trim takes away
        second[:], third[:] = -first, least
    tuned = [{name: base[name] + own[name] for name in shapes} for own in deltas]
    as_given = [{n: t.to(dtype) for n, t in state.items()} for state in (base, *tuned)]
    return as_given[0], as_given[1:]


def deltas_of(base: State, tuned: list[State]) -> torch.Tensor:
    return torch.stack([oracles.flatten(model) - oracles.flatten(base) for model in tuned])


def expected(base: State, tuned: list[State], rule: Rule, density: float) -> State:
    merged = oracles.unflatten(rule(deltas_of(base, tuned), density), base)
    return {name: (base[name].float() + merged[name]).to(base[name].dtype) for name in base}


def zero_votes(base: State, tuned: list[State], density: float) -> int:
    """Return how many elements keep something, and no sign is elected."""
    deltas = deltas_of(base, tuned)
    rank = deltas.shape[1] - int(deltas.shape[1] * density)
    deltas = oracles._trim_at_least(deltas, rank)
    return int(((deltas.sum(dim=0) == 0) & (deltas != 0).any(dim=0)).sum())


class StrictSink:
    """Takes every tensor once, and again only after a restart, which forgets them all."""

    def __init__(self, like: State) -> None:
        self.restarts = 0
        self.found: State = {}
        self._like = like

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        assert name not in self.found, f"{name} is merged twice without a restart"
        self.found[name] = torch.full_like(self._like[name], float("nan"))
        yield 0, self.found[name].view(-1)

    def restart(self) -> None:
        self.restarts += 1
        self.found = {}


class Phases:
    """A Progress that remembers the names of the phases."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def phase(self, name: str, total_bytes: int) -> None:
        self.names.append(name)

    def advance(self, nbytes: int) -> None:
        pass


def run(
    base: State, tuned: list[State], density: float, backend: str = "auto", **parameters: Any
) -> tuple[dict[str, int], StrictSink, list[str]]:
    """Merge in memory by the engine; return its statistics, its sink, and its phases."""
    defaults = {p.name: p.default for p in METHODS["ties"].parameters}
    own = {**defaults, "weight": [1.0] * COUNT, "density": [density] * COUNT, **parameters}
    works = [Work(n, t.numel(), False, False, own, tuple(t.shape)) for n, t in base.items()]
    labels = ["base", *(f"m{k}" for k in range(COUNT))]
    sink, phases = StrictSink(base), Phases()
    context = Context(backend=backend, progress=phases)
    statistics = execute(
        METHODS["ties"],
        works,
        MemorySource(labels, base, tuned, {n: n for n in base}),
        sink,
        context,
    )
    return statistics, sink, phases.names


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_in_memory(
    dialect: str, sign: int, identifier: str, use_backend: Callable[[str], str]
) -> None:
    """Everything is computed anew with the sign that the first merge counted."""
    parameters, rule = DIALECTS[dialect]
    base, tuned = family(sign)
    backend = use_backend(identifier)
    statistics, sink, phases = run(base, tuned, 0.9, backend, **parameters)
    wanted = expected(base, tuned, rule, 0.9)
    models.assert_same(sink.found, wanted)
    assert (statistics["merge_passes"], sink.restarts) == (2, 1)
    assert phases == ["sample", "thresholds", "ties", "ties"]
    assert statistics["zero_votes"] == zero_votes(base, tuned, 0.9) == 20 + 3 + 2 * 6
    merged = pymerge.ties_merge(base, tuned, density=0.9, backend=backend, **parameters)
    models.assert_same(merged, wanted)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_as_many_of_either_sign(dialect: str) -> None:
    """The official codes then take the negative sign, MergeLM keeps nothing."""
    parameters, rule = DIALECTS[dialect]
    base, tuned = family(1, short=150, least=0)
    surplus = -int(deltas_of(base, tuned).sum(dim=0).sign().sum())
    assert surplus > 0
    for name in (name for name in base if name.endswith("short")):
        count = min(surplus, base[name].numel() - 2)
        for model in tuned:  # elements without a vote
            model[name].view(-1)[2 : 2 + count] = base[name].view(-1)[2 : 2 + count]
        surplus -= count
    assert int(deltas_of(base, tuned).sum(dim=0).sign().sum()) == 0
    statistics, sink, _ = run(base, tuned, DENSE, **parameters)
    assert statistics["merge_passes"] == 2
    models.assert_same(sink.found, expected(base, tuned, rule, DENSE))


def test_one_merge_is_enough_where_the_sample_is_right_or_no_vote_is_zero() -> None:
    base, tuned = family(1, short=100)
    statistics, _, phases = run(base, tuned, 0.9)
    assert (statistics["merge_passes"], statistics["zero_votes"]) == (1, 20 + 3 + 2 * 2)
    assert phases == ["sample", "thresholds", "ties"]
    base, tuned = family(1)
    for model in tuned[1:]:
        for name in base:
            model[name] = tuned[0][name].clone()
    statistics, sink, _ = run(base, tuned, 0.9)
    assert (statistics["merge_passes"], statistics["zero_votes"]) == (1, 0)
    models.assert_same(sink.found, expected(base, tuned, DIALECTS["mean"][1], 0.9))


def test_the_sign_shows_in_a_maximum_of_nothing() -> None:
    """The official code's maximum of nothing is a zero with the majority's sign."""
    base, tuned = family(1)
    base = {name: tensor for name, tensor in base.items() if name != "a.votes"}
    for model in tuned:
        del model["a.votes"]
        for name in base:
            model[name] = tuned[0][name].clone()
    base["nothing"] = torch.tensor([-0.0, 0.0])
    for model in tuned:
        model["nothing"] = base["nothing"].clone()
    statistics, sink, _ = run(base, tuned, 0.9, merge="max")
    assert (statistics["merge_passes"], statistics["zero_votes"]) == (2, 0)
    wanted = expected(base, tuned, DIALECTS["max"][1], 0.9)
    assert wanted["nothing"].signbit().tolist() == [True, False]
    assert sink.found["nothing"].signbit().tolist() == [True, False]


def test_passes_are_those_of_the_tensor_that_takes_most() -> None:
    generator = torch.Generator().manual_seed(2)
    base = {"a": torch.randn(5000, generator=generator), "b": torch.zeros(0)}
    tuned = [
        {
            name: tensor + torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        for _ in range(COUNT)
    ]
    counted = []
    for names in ("a", "b", "ab"):
        states = [{name: state[name] for name in names} for state in (base, *tuned)]
        counted.append(run(states[0], states[1:], 0.3, scope="tensor")[0]["selection_passes"])
    assert counted[0] == counted[2] > counted[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_files(dialect: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All shards are written again, from the first; integers are copied each time."""
    parameters, rule = DIALECTS[dialect]
    base, tuned = family(1, dtype=dtype)
    wanted = expected(base, tuned, rule, 0.9)
    for state in (base, *tuned, wanted):
        state["ids"] = torch.arange(7)
    models.save_family(tmp_path, base, tuned, files=2)
    parameters = {"semantics": "official", "density": 0.9, **parameters}
    config = models.config(tmp_path, "ties", COUNT, **parameters)
    report = pymerge.merge_checkpoints(config, tmp_path / "out", shard_size="8KB", threads=1)
    models.assert_same(models.load(tmp_path / "out"), wanted)
    one_merge = sum(tensor.nbytes for state in (base, *tuned) for tensor in state.values())
    assert report.phases["ties"].bytes == 2 * one_merge
    assert "signs" not in report.phases
    assert len(report.output.shards) > 2


@pytest.mark.parametrize("onto", [False, True])
def test_adapters(onto: bool, tmp_path: Path) -> None:
    """Deltas of adapters, into an adapter and onto a base: the same in their sinks."""
    shapes = {"large": LARGE, "votes": (4, 5)} | {f"s{k:03}": (5, 6) for k in range(160)}
    generator = torch.Generator().manual_seed(1)
    for number in range(2):
        pairs = {}
        for name, (rows, columns) in shapes.items():
            sign = 1.0 if name == "large" or (name, number) == ("votes", 0) else -1.0
            b = torch.full((rows, 1), sign)
            pairs[name] = b, torch.arange(1.0, columns + 1).reshape(1, -1)
        save_adapter(tmp_path / f"m{number}", lora_tensors(pairs), r=1, lora_alpha=1)
    adapters = [load(tmp_path / f"m{number}") for number in range(2)]
    states = [{n: adapter.delta_weight(n) for n in shapes} for adapter in adapters]
    zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
    merged = expected(zero, states, DIALECTS["mean"][1], DENSE)
    assert torch.equal(merged["votes"], -states[0]["votes"])
    config = models.config(tmp_path, "ties", 2, semantics="official", density=DENSE)
    base = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    base |= {"a.norm": torch.ones(5), "m.ids": torch.arange(3), "z.norm": torch.ones(7)}
    models.save(tmp_path / "base", base, config=None)
    if not onto:
        del config["base_model"]
    report = run_merge_adapters(config, tmp_path / "out")
    if onto:
        wanted = {f"{name}.weight": base[f"{name}.weight"] + merged[name] for name in shapes}
        wanted = base | wanted  # what no adapter changes is copied, both times
        models.assert_same(models.load(tmp_path / "out"), wanted)
        assert isinstance(report, pymerge.MergeReport)
        one_merge = 3 * sum(tensor.nbytes for tensor in zero.values())
        assert report.phases["ties"].bytes == 2 * one_merge
    else:
        got = load(tmp_path / "out")
        for name in shapes:
            torch.testing.assert_close(got.delta_weight(name), merged[name], msg=name)
