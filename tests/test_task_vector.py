"""Task vectors: their algebra, how little they read, and what they are applied to."""

from __future__ import annotations

import operator
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge import TaskVector
from pymerge.checkpoint import Checkpoint
from tests import models
from tests.models import State

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")


def states(count: int, seed: int = 0) -> list[State]:
    """Return state dicts of two tensors with dyadic values, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-64, 64, shape, generator=generator) / 16

    return [{"w": draw(6, 5), "b": draw(7)} for _ in range(count)]


def delta(base: State, model: State) -> State:
    return {name: model[name].float() - tensor.float() for name, tensor in base.items()}


def assert_vector(vector: TaskVector, expected: State) -> None:
    assert list(vector) == list(expected)
    assert len(vector) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(vector[name], tensor), name


# algebra


def test_algebra() -> None:
    base, first, second = states(3)
    one, two = TaskVector.from_models(base, first), TaskVector.from_models(base, second)
    a, b = delta(base, first), delta(base, second)
    expressions: list[tuple[TaskVector, Any]] = [
        (one, lambda x, y: x),
        (-one, lambda x, y: -x),
        (one + two, lambda x, y: x + y),
        (one - two, lambda x, y: x - y),
        (one * 3, lambda x, y: 3 * x),
        (0.5 * one, lambda x, y: 0.5 * x),
        (one / 4, lambda x, y: x / 4),
        (one * 0, lambda x, y: 0 * x),
        (2 * (one - 0.25 * two) + one, lambda x, y: 3 * x - 0.5 * y),
        (-(one + one) / 2, lambda x, y: -x),
        (sum([two], start=one), lambda x, y: x + y),
    ]
    for vector, rule in expressions:
        assert_vector(vector, {name: rule(a[name], b[name]) for name in base})
    assert dict(one + two).keys() == base.keys()
    assert "w" in one
    assert "v" not in one
    assert repr(one - 0.5 * two) == (
        "<TaskVector of 2 tensors: +1 (model_0 - base_0) -0.5 (model_1 - base_1)>"
    )


def test_operands_that_do_not_fit() -> None:
    base, model = states(2)
    vector: Any = TaskVector.from_models(base, model)
    for operation in (
        lambda: vector + 1,
        lambda: vector - base,
        lambda: 1 + vector,
        lambda: vector * "2",
        lambda: vector * True,
        lambda: vector * vector,
        lambda: vector / "2",
        lambda: 1 / vector,
    ):
        with pytest.raises(TypeError):
            operation()
    with pytest.raises(ZeroDivisionError):
        operator.truediv(vector, 0)
    with pytest.raises(KeyError, match="has no tensor 'ww'; did you mean 'w'"):
        vector["ww"]


def test_inputs_are_neither_copied_nor_changed() -> None:
    """A vector is computed when it is used: what changes before shows, and nothing is written."""
    base, model = states(2)
    vector = 2 * TaskVector.from_models(base, model)
    model["w"] += 1.0
    assert_vector(vector, {name: 2 * tensor for name, tensor in delta(base, model).items()})
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (base, model)]
    vector["w"].fill_(9)
    vector.apply_to(base)["w"].fill_(9)
    for state, copy in zip((base, model), before, strict=True):
        models.assert_same(state, copy)


def test_structures_and_dtypes() -> None:
    base, model = states(2)
    expected = {name: tensor + 0.5 * (model[name] - tensor) for name, tensor in base.items()}
    makers: list[Any] = [
        lambda s: s["w"],
        lambda s: [s["w"], s["b"]],
        lambda s: (s["w"], s["b"]),
        lambda s: OrderedDict(s),
    ]
    for make in makers:
        given = make(base)
        applied = TaskVector.from_models(given, make(model)).apply_to(given, 0.5)
        assert type(applied) is type(given)
        wanted = make(expected)
        for got, tensor in zip(
            [applied] if isinstance(applied, torch.Tensor) else list_of(applied),
            [wanted] if isinstance(wanted, torch.Tensor) else list_of(wanted),
            strict=True,
        ):
            assert torch.equal(got, tensor)
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    vector = TaskVector.from_models(half, model)
    assert vector["w"].dtype == torch.float32
    assert vector.apply_to(half)["w"].dtype == torch.bfloat16
    assert vector.apply_to(half, dtype=torch.float64)["w"].dtype == torch.float64
    wide = {name: tensor.double() for name, tensor in base.items()}
    assert TaskVector.from_models(wide, model)["w"].dtype == torch.float64


def list_of(structure: Any) -> list[torch.Tensor]:
    return list(structure.values()) if isinstance(structure, dict) else list(structure)


# applying


def test_apply_equals_task_arithmetic() -> None:
    base, *tuned = states(4)
    vectors = [TaskVector.from_models(base, model) for model in tuned]
    combined = vectors[0] - 0.5 * vectors[1] + 2 * vectors[2]
    for scale in (1.0, 0.3, -1.0, 0):
        expected = pymerge.task_arithmetic(base, tuned, weights=[1, -0.5, 2], scale=scale)
        for backend in (None, "cpu", "reference"):
            models.assert_same(combined.apply_to(base, scale, backend=backend), expected)


def test_another_base_than_its_own() -> None:
    """Also one that merely equals it; all give the same where the numbers are exact."""
    base, model, other = states(3)
    vector = TaskVector.from_models(base, model)
    expected = {name: t + 0.5 * (model[name] - base[name]) for name, t in other.items()}
    models.assert_same(vector.apply_to(other, 0.5), expected)
    equal = {name: tensor.clone() for name, tensor in base.items()}
    models.assert_same(vector.apply_to(equal, 0.5), vector.apply_to(base, 0.5))


def test_analogy() -> None:
    """D = C + (B - A): what took A to B takes C to D, over three bases."""
    a, b, c, d = states(4, seed=3)
    for name in d:
        d[name] = c[name] + (b[name] - a[name])
    models.assert_same(TaskVector.from_models(a, b).apply_to(c), d)
    mixed = TaskVector.from_models(a, b) + TaskVector.from_models(c, d)
    expected = {name: t + 2 * (b[name] - a[name]) for name, t in a.items()}
    models.assert_same(mixed.apply_to(a), expected)


def test_integers_are_copied_and_must_be_equal() -> None:
    base, model, other = states(3)
    for state in (base, model, other):
        state["n"] = torch.arange(4)
    vector = TaskVector.from_models(base, model)
    assert torch.equal(vector["n"], torch.zeros(4, dtype=torch.int64))
    for target in (base, other):
        applied = vector.apply_to(target)
        assert torch.equal(applied["n"], torch.arange(4))
        applied["n"].fill_(0)
        assert torch.equal(target["n"], torch.arange(4))
    vector = TaskVector.from_models(base, model | {"n": torch.arange(4) + 1})
    for target in (base, other):
        with pytest.raises(pymerge.RequestError, match=r"\['n'\] is of dtype torch.int64 and must"):
            vector.apply_to(target)


def test_models_that_do_not_fit() -> None:
    base, model = states(2)
    wrong = {"w": model["w"][:5], "c": model["b"]}
    with pytest.raises(pymerge.RequestError) as caught:
        TaskVector.from_models(base, wrong)
    assert caught.value.problems == [
        "TaskVector: model lacks tensor 'b' of base",
        "TaskVector: tensor 'c' of model is not in base",
        "TaskVector: tensor 'w' of model has shape (5, 5), expected (6, 5) like base",
    ]
    vector = TaskVector.from_models(base, model)
    with pytest.raises(pymerge.RequestError, match="lacks tensor 'b' of the left task vector"):
        operator.add(vector, TaskVector.from_models({"w": base["w"]}, {"w": model["w"]}))
    with pytest.raises(pymerge.RequestError, match="base lacks tensor 'b' of the task vector"):
        vector.apply_to({"w": base["w"]})
    with pytest.raises(
        pymerge.RequestError, match=r"has dtype torch\.int32, expected torch.float32"
    ):
        TaskVector.from_models(base, base | {"w": base["w"].int()})
    with pytest.raises(pymerge.RequestError, match="base: expected a tensor, a list of tensors or"):
        TaskVector.from_models(3, 4)  # type: ignore[arg-type]
    with pytest.raises(pymerge.RequestError, match=r"model \(/no/where\)"):
        TaskVector.from_models(base, "/no/where")
    with pytest.raises(pymerge.RequestError, match="apply_to: threads: only with out="):
        vector.apply_to(base, threads=2)
    with pytest.raises(pymerge.NonFiniteError):
        TaskVector.from_models(base, model | {"b": torch.full((7,), torch.nan)}).apply_to(base)


# over checkpoints


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base, tuned = models.llama(3, coarse=True, layers=1, hidden=32, mlp=48)
    models.save_family(tmp_path, base, tuned, files=2)
    return tmp_path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors read from checkpoints so far."""
    seen: list[str] = []
    original = Checkpoint.flat

    def counting(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        seen.append(f"{checkpoint.path.name}/{name}")
        return original(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "flat", counting)
    return seen


def weights_of(path: Path) -> State:
    return models.load(path)


def test_nothing_is_read_before_it_is_used(root: Path, reads: list[str]) -> None:
    one = TaskVector.from_models(root / "base", str(root / "m0"))
    two = TaskVector.from_models(root / "base", root / "m1")
    combined = 0.5 * (one - two)
    assert len(combined) == len(weights_of(root / "base"))
    assert "lm_head.weight" in list(combined)
    repr(combined)
    assert reads == []
    got = combined["lm_head.weight"]
    assert sorted(set(reads)) == [f"{name}/lm_head.weight" for name in ("base", "m0", "m1")]
    base, first, second = (
        weights_of(root / name)["lm_head.weight"] for name in ("base", "m0", "m1")
    )
    expected = 0.5 * (first.float() - base.float()) - 0.5 * (second.float() - base.float())
    assert torch.equal(got, expected)


def test_checkpoints_are_applied_in_memory(root: Path) -> None:
    base, *tuned = (weights_of(root / name) for name in ("base", "m0", "m1", "m2"))
    vector = TaskVector.from_models(root / "base", root / "m0")
    vector -= TaskVector.from_models(root / "base", root / "m1")
    expected = pymerge.task_arithmetic(base, tuned[:2], weights=[1, -1], scale=0.5)
    applied = vector.apply_to(root / "base", 0.5)
    assert type(applied) is dict
    models.assert_same(applied, expected)
    # a base in memory, though the vector is on disk
    models.assert_same(vector.apply_to(base, 0.5), expected)
    elsewhere = {
        name: (tensor.float() + 0.5 * (tuned[0][name].float() - tuned[1][name].float())).bfloat16()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tuned[2].items()
    }
    models.assert_same(vector.apply_to(tuned[2], 0.5), elsewhere)
    models.assert_same(vector.apply_to(root / "m2", 0.5), elsewhere)


def test_out_is_streamed_and_equals_memory(root: Path) -> None:
    vector = TaskVector.from_models(root / "base", root / "m0")
    vector += 2 * TaskVector.from_models(root / "base", root / "m1")
    report = vector.apply_to(
        root / "base", 0.5, out=root / "out", threads=1, shard_size="20KB", backend="cpu"
    )
    assert isinstance(report, pymerge.MergeReport)
    assert (report.method, report.threads, report.backend) == ("task_arithmetic", 1, "cpu")
    assert len(report.output.shards) > 2
    models.assert_same(weights_of(root / "out"), vector.apply_to(root / "base", 0.5))

    # another base: a weighted sum of all the models, in the dtype of that base
    vector.apply_to(root / "m2", 0.5, out=root / "other")
    models.assert_same(weights_of(root / "other"), vector.apply_to(root / "m2", 0.5))
    vector.apply_to(root / "m2", 0.5, out=root / "wide", dtype=torch.float32)
    models.assert_same(
        weights_of(root / "wide"), vector.apply_to(root / "m2", 0.5, dtype=torch.float32)
    )
    with pytest.raises(pymerge.RequestError, match="exists already"):
        vector.apply_to(root / "base", out=root / "out")
    vector.apply_to(root / "base", 0.25, out=root / "out", force=True)
    models.assert_same(weights_of(root / "out"), vector.apply_to(root / "base", 0.25))


def test_out_wants_checkpoints(root: Path) -> None:
    base, model = weights_of(root / "base"), weights_of(root / "m0")
    on_disk = TaskVector.from_models(root / "base", root / "m0")
    in_memory = TaskVector.from_models(base, model)
    for vector, target in ((on_disk, base), (in_memory, root / "base"), (in_memory, base)):
        with pytest.raises(
            pymerge.RequestError, match="apply_to: out: expected checkpoints on disk"
        ):
            vector.apply_to(target, out=root / "out")
    assert not (root / "out").exists()
