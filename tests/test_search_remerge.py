"""Merging the same checkpoints again: the bits of a fresh merge, for a fraction of the work."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge import RequestError
from pymerge.engine.execute import execute
from pymerge.engine.select import sample_parts
from pymerge.search import Remerger, remerge
from tests import models
from tests.models import assert_same, config, no_waiting  # noqa: F401

SMALL = {"hidden": 16, "mlp": 24, "vocabulary": 40}

METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {}, {"weight": 0.25}),
    ("task_arithmetic", {"lambda": 0.3}, {"lambda": 0.9, "weight": 1.5}),
    ("ties", {"density": 0.5}, {"density": 0.5, "weight": 1.5}),
    ("ties", {"density": 0.5}, {"density": 0.25}),
    ("ties", {"semantics": "official"}, {"semantics": "official", "weight": 0.5, "lambda": 2}),
    ("ties", {"semantics": "official"}, {"semantics": "official", "density": 0.6}),
    ("pcb", {}, {"weight": 1.7}),
    ("pcb", {}, {"ratio": 0.3, "lambda": 0.5}),
    ("pcb", {"variant": "vision"}, {"variant": "vision", "weight": 0.9}),
    ("pcb", {"variant": "root", "scope": "tensor"}, {"variant": "nlp", "scope": "tensor"}),
    ("dare_ties", {"density": 0.5}, {"density": 0.5, "weight": 2.0}),
    ("breadcrumbs", {"density": 0.5}, {"density": 0.5, "weight": 2.0}),
    ("della", {"density": 0.5, "epsilon": 0.1}, {"density": 0.4, "epsilon": 0.1}),
    ("multislerp", {}, {"weight": 0.5}),
    ("model_stock", {}, {}),
    ("sce", {"select_topk": 0.5}, {"select_topk": 0.2}),
]


def first_weight(given: dict[str, Any]) -> dict[str, Any]:
    """Models of equal weights hide mistakes."""
    if given["merge_method"] not in ("model_stock", "sce"):
        given["models"][0]["parameters"] = {"weight": 0.8}
    return given


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    base, tuned = models.llama(3, **SMALL)
    models.save_family(root, base, tuned, files=[1, 2, 1, 3])
    return root


@pytest.mark.parametrize(("method", "first", "second"), METHODS)
@pytest.mark.usefixtures("no_waiting")
def test_a_merge_has_the_bits_of_a_fresh_one(
    family: Path, tmp_path: Path, method: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    configs = [first_weight(config(family, method, 3, **given)) for given in (first, second)]
    fresh = []
    for number, given in enumerate(configs):
        pymerge.merge_checkpoints(given, tmp_path / str(number))
        fresh.append(models.load(tmp_path / str(number)))
    with Remerger(configs[0]) as remerger:
        merged = remerger.merge()
        assert_same(merged.tensors, fresh[0])
        for number in (1, 0, 0, 1):
            remerger.merge(configs[number], merged)
            assert_same(merged.tensors, fresh[number])


class _Calls:
    """Counts the calls of ops by their names."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        from pymerge.ops.runner import Runner

        real = Runner.call

        def call(runner: Any, op: str, *more: Any) -> None:
            self.names.append(op)
            real(runner, op, *more)

        patch.setattr(Runner, "call", call)

    def take(self) -> set[str]:
        found, self.names[:] = set(self.names), []
        return found


@pytest.mark.parametrize(
    ("method", "parameters", "selection", "last"),
    [
        ("ties", {"semantics": "official", "nan": "keep"}, "magnitude_histogram_", "ties_"),
        ("ties", {"density": 0.3}, "magnitude_histogram_", "ties_"),
        ("pcb", {}, "pcb_scores_", "pcb_merge_"),
        ("multislerp", {}, "chunk_sums_", "weighted_sum_"),
    ],
)
def test_statistics_are_computed_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    parameters: dict[str, Any],
    selection: str,
    last: str,
) -> None:
    base, tuned = models.llama(3, hidden=300, mlp=300, layers=1, vocabulary=400)
    models.save_family(tmp_path, base, tuned)
    calls = _Calls(monkeypatch)
    with Remerger(config(tmp_path, method, 3, **parameters)) as remerger:
        merged = remerger.merge()
        ran = calls.take()
        assert selection in ran
        given = config(tmp_path, method, 3, **parameters, weight=0.5)
        remerger.merge(given, merged)
        assert selection not in calls.take()
        if method in ("ties", "pcb"):
            name, value = ("density", 0.6) if method == "ties" else ("ratio", 0.2)
            remerger.merge({**given, "parameters": {**parameters, name: value}}, merged)
            assert {selection, last} <= calls.take()


def test_tensors_of_a_failed_merge_are_merged_again(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had written into them, or not."""
    first, second = (config(family, "ties", 3, **{"lambda": scale}) for scale in (1.0, 2.0))
    with Remerger(first) as remerger:
        merged = remerger.merge()
        expected = {name: tensor.clone() for name, tensor in merged.tensors.items()}

        def failing(*arguments: Any) -> None:
            execute(*arguments)
            raise OSError("gone")

        with monkeypatch.context() as patch:
            patch.setattr(remerge, "execute", failing)
            with pytest.raises(OSError, match="gone"):
                remerger.merge(second, merged)
        remerger.merge(first, merged)
        assert_same(merged.tensors, expected)


def test_a_sample_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same for all densities."""
    base, tuned = models.llama(2, **SMALL)
    models.save_family(tmp_path, base, tuned)
    samples = []

    def counted(*arguments: Any) -> Any:
        samples.append(sample_parts(*arguments))
        return samples[-1]

    monkeypatch.setattr("pymerge.engine.whole_model.sample_parts", counted)
    given = [
        config(tmp_path, "ties", 2, semantics="official", density=density) for density in (0.3, 0.5)
    ]
    with Remerger(given[0]) as remerger:
        merged = remerger.merge()
        remerger.merge(given[1], merged)
    assert len(samples) == 1


def test_the_sign_of_zero_votes_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sample does not decide it, it is counted in the first merge only."""
    base, tuned = models.llama(2, coarse=True, **SMALL)
    models.save_family(tmp_path, base, tuned)
    calls = _Calls(monkeypatch)
    given = {"semantics": "official", "density": 1.0}
    counts = []
    with Remerger(config(tmp_path, "ties", 2, **given)) as remerger:
        for weight in (1.0, 0.5, 0.25):
            remerger.merge(config(tmp_path, "ties", 2, **given, weight=weight))
            counts.append(calls.names.count("ties_signs_"))
            calls.take()
    assert counts[0] > counts[1] == counts[2]


def test_tensors_whose_parameters_are_the_same_are_left(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(value: float) -> dict[str, Any]:
        clauses = [{"filter": "layers.1.", "value": value}, {"value": 1.0}]
        return config(family, "task_arithmetic", 3, weight=clauses)

    with Remerger(weights(1.0)) as remerger:
        merged = remerger.merge()
        calls = _Calls(monkeypatch)
        remerger.merge(weights(2.0), merged)
        assert len(calls.names) == sum(".layers.1." in name for name in merged.tensors)
        expected = {name: tensor.clone() for name, tensor in merged.tensors.items()}
        calls.take()
        remerger.merge(weights(2.0), merged)
        assert not calls.names
        # memory of its own is filled as a whole
        assert_same(remerger.merge(weights(2.0)).tensors, expected)


def test_a_merge_that_failed_leaves_nothing_to_rely_on(tmp_path: Path) -> None:
    base, tuned = models.llama(2, **SMALL)
    tuned[1]["model.norm.weight"][3] = float("nan")
    models.save_family(tmp_path, base, tuned)
    with Remerger(config(tmp_path, "task_arithmetic", 2)) as remerger:
        merged = remerger.memory_for()
        for _ in range(2):
            with pytest.raises(pymerge.NonFiniteError, match=r"m1|models\[1\]"):
                remerger.merge(into=merged)


def test_writing_to_a_merged_tensor_is_noticed(family: Path) -> None:
    with Remerger(config(family, "linear", 3)) as remerger:
        merged = remerger.merge()
        assert merged.was_written() is None
        merged.tensors["model.norm.weight"].view(-1)[2:].add_(1)
        assert merged.was_written() == "model.norm.weight"
        remerger.merge(into=merged)
        assert merged.was_written() is None


def test_threads_merge_at_the_same_time(family: Path) -> None:
    def weighted(value: float) -> dict[str, Any]:
        return config(family, "ties", 3, density=0.5, weight=value)

    with Remerger(weighted(1.0), copies=3) as remerger:
        expected = {v: remerger.merge(weighted(v)).tensors for v in (0.5, 1.0, 1.5)}
        failed: list[float] = []

        def work(value: float) -> None:
            merged = remerger.memory_for()
            for _ in range(5):
                remerger.merge(weighted(value), merged)
                if not all(torch.equal(merged.tensors[n], t) for n, t in expected[value].items()):
                    failed.append(value)

        threads = [threading.Thread(target=work, args=(value,)) for value in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_what_does_not_fit_into_memory_is_refused(family: Path) -> None:
    with pytest.raises(RequestError, match=r"memory: 100000 merged models of .* receive a folder"):
        Remerger(config(family, "linear", 3), copies=100_000, memory="1GiB")


def test_other_models_are_refused(family: Path) -> None:
    with Remerger(config(family, "linear", 3)) as remerger:
        for other in (config(family, "linear", 2), config(family, "task_arithmetic", 3)):
            with pytest.raises(RequestError, match="those of the first configuration"):
                remerger.merge(other)


@pytest.mark.parametrize("merge", [None, "max"])
@pytest.mark.usefixtures("no_waiting")
def test_the_sign_of_zero_votes_is_guessed_and_verified(tmp_path: Path, merge: str | None) -> None:
    """Weights of the other sign turn the majority around, where votes cancel."""
    base, tuned = models.llama(3, coarse=True, **SMALL)
    models.save_family(tmp_path, base, tuned)
    chosen = {"semantics": "official", "density": 0.5, **({"merge": merge} if merge else {})}
    made = [[1, 1, 1], [-1, -1, -1], [1, -1, 1], [-1, 1, -1], [1, 1, 1]]
    configs = [config(tmp_path, "ties", 3, weights=weights, **chosen) for weights in made]
    with Remerger(configs[0]) as remerger:
        merged = remerger.memory_for()
        for number, given in enumerate(configs):
            remerger.merge(given, merged)
            pymerge.merge_checkpoints(given, tmp_path / str(number))
            assert_same(merged.tensors, models.load(tmp_path / str(number)))
