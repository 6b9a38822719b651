"""The Python API: what arguments may be, and one clear error for each that may not."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import pymerge

BASE = torch.zeros(8)
MODELS = [torch.arange(8.0) - 3, torch.arange(8.0).flip(0) - 3]


def test_merge_by_name_is_the_function() -> None:
    base = torch.randn(50, generator=torch.Generator().manual_seed(0))
    tuned = [base + torch.randn(50, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    for weights in (None, 0.5, [0.3, -0.7]):
        merged = pymerge.merge("linear", None, tuned, weights=weights)
        assert torch.equal(merged, pymerge.linear(tuned, weights=weights))
        assert torch.equal(merged, pymerge.merge("linear", base, tuned, weights=weights))
        merged = pymerge.merge("task_arithmetic", base, tuned, weights=weights, scale=0.3)
        expected = pymerge.task_arithmetic(base, tuned, weights=weights, scale=0.3)
        assert torch.equal(merged, expected)
        dialects: list[dict[str, Any]] = [{}, {"semantics": "mergekit"}, {"merge": "max"}]
        for details in dialects:
            merged = pymerge.merge("ties", base, tuned, weights=weights, **details)
            expected = pymerge.ties_merge(base, tuned, weights=weights, **details)
            assert torch.equal(merged, expected)


def test_signatures_stay() -> None:
    """Names, order and defaults that programs rely on."""
    merge = inspect.signature(pymerge.merge)
    assert list(merge.parameters)[:5] == ["method", "base", "models", "weights", "backend"]
    ties = inspect.signature(pymerge.ties_merge)
    defaults = {name: p.default for name, p in ties.parameters.items()}
    assert list(defaults)[:11] == [
        *("base", "models", "density", "scale", "weights", "semantics", "scope", "merge"),
        *("exact_k", "nan", "backend"),
    ]
    assert defaults["density"] == 0.2
    assert defaults["scale"] == 1.0
    assert defaults["semantics"] == "official"
    assert defaults["nan"] == "error"
    for signature in (merge, ties):
        kinds = [p.kind for p in signature.parameters.values()]
        assert inspect.Parameter.KEYWORD_ONLY in kinds


@pytest.mark.parametrize(
    "weights",
    [
        [0.25, 0.75],
        (0.25, 0.75),
        torch.tensor([0.25, 0.75]),
        np.array([0.25, 0.75]),
        [torch.tensor(0.25), np.float32(0.75)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_forms_of_weights(weights: Any) -> None:
    expected = 0.25 * MODELS[0] + 0.75 * MODELS[1]
    assert torch.equal(pymerge.linear(MODELS, weights=weights), expected)
    merged = pymerge.task_arithmetic(BASE, MODELS, weights=weights)
    assert torch.equal(merged, expected)


def test_one_weight_for_all() -> None:
    for weight in (0.5, torch.tensor(0.5), np.float64(0.5)):
        merged = pymerge.task_arithmetic(BASE, MODELS, weights=weight)  # type: ignore[arg-type]
        assert torch.equal(merged, 0.5 * MODELS[0] + 0.5 * MODELS[1])
    assert torch.equal(pymerge.linear(MODELS, weights=2), pymerge.linear(MODELS))
    assert torch.equal(
        pymerge.linear(MODELS, weights=2, normalize=False), 2 * MODELS[0] + 2 * MODELS[1]
    )


def test_negation_and_analogy() -> None:
    """A negative weight forgets; weights [1, 1, -1] make the analogy."""
    a, b, c = (torch.randn(64, generator=torch.Generator().manual_seed(k)) for k in range(3))
    origin = torch.ones(64)
    forgotten = pymerge.task_arithmetic(origin, [origin + a], weights=-1.0)
    assert torch.equal(forgotten, origin + -((origin + a) - origin))
    tuned = [origin + v for v in (a, b, c)]
    merged = pymerge.task_arithmetic(origin, tuned, weights=[1, 1, -1], scale=0.5)
    deltas = [t - origin for t in tuned]
    assert torch.equal(merged, origin + 0.5 * (deltas[0] + deltas[1] + -1.0 * deltas[2]))
    with pytest.raises(pymerge.RequestError, match="sum to 0, and normalize=True divides"):
        pymerge.task_arithmetic(origin, tuned[:2], weights=[1, -1], normalize=True)
    normalized = pymerge.task_arithmetic(origin, tuned[:2], weights=[1, 3], normalize=True)
    assert torch.equal(normalized, origin + (deltas[0] + 3.0 * deltas[1]) / 4.0)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("liner", {}, "merge: method: unknown merge method 'liner'; did you mean 'linear'?"),
    ("linear", {"weights": [1.0]}, "weights: expected one number or 2, one for each model; got 1"),
    ("linear", {"weights": [1.0, "x"]}, "weights[1]: expected a finite number, got 'x'"),
    ("linear", {"weights": "half"}, "weights: expected one number or 2 of them, got 'half'"),
    ("linear", {"weights": [1, float("nan")]}, "weights[1]: expected a finite number, got nan"),
    ("linear", {"weights": float("inf")}, "weights: expected a finite number, got inf"),
    ("linear", {"weights": True}, "weights: expected a finite number, got True"),
    ("linear", {"weights": torch.ones(3)}, "got 3"),
    ("linear", {"weights": torch.ones(2, 2)}, "weights[0]: expected a finite number, got [1.0"),
    ("linear", {"weights": [1, -1]}, "sum to 0, and normalize=True divides"),
    ("linear", {"weights": 0}, "sum to 0, and normalize=True divides"),
    ("linear", {"normalize": 1}, "normalize: expected true or false, got 1"),
    ("linear", {"nan": "kep"}, "nan: expected one of 'error', 'keep', got 'kep'; did you mean"),
    ("linear", {"density": 0.5}, "unknown parameter 'density' of method linear"),
    ("linear", {"weight": 0.5}, "unknown parameter 'weight' of method linear; did you mean 'weigh"),
    ("linear", {"backend": "gpu"}, "backend: expected one of auto, reference, cpu, cuda, triton"),
    ("linear", {"dtype": torch.int32}, "dtype: expected float32, float16, bfloat16 or float64"),
    ("task_arithmetic", {"scale": float("inf")}, "scale: expected a finite number, got inf"),
    ("task_arithmetic", {"scale": None, "weights": [1]}, "weights: expected one number or 2"),
    ("task_arithmetic", {"scale": [1.0]}, "scale: expected a finite number, got [1.0]"),
    ("task_arithmetic", {"scael": 1.0}, "unknown parameter 'scael' of method task_arithmetic; did"),
    ("task_arithmetic", {"rescale": True}, "rescale: expected false (nothing else is supported"),
    ("ties", {"density": 1.5}, "density: expected a finite number in [0, 1], got 1.5"),
    ("ties", {"density": [0.1, -0.1]}, "density[1]: expected a finite number in [0, 1], got -0.1"),
    (
        "ties",
        {"density": [0.1] * 3},
        "density: expected one number or 2, one for each model; got 3",
    ),
    ("ties", {"semantics": "offical"}, "did you mean 'official'"),
    ("ties", {"scope": "layer"}, "scope: expected one of 'global', 'tensor', got 'layer'"),
    ("ties", {"merge": 3}, "merge: expected one of 'mean', 'sum', 'max', got 3"),
    ("ties", {"exact_k": "yes"}, "exact_k: expected true or false, got 'yes'"),
    ("ties", {"elect": "majority"}, "elect: expected one of 'mass', 'count', got 'majority'"),
    ("ties", {"merge": "max", "normalize": False}, "give one of the two"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), BAD)
def test_bad_arguments(method: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.merge(method, BASE, MODELS, **arguments)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_all_problems_at_once() -> None:
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.merge("ties", BASE, MODELS, weights=[1], density=2, sclae=1, nan=None)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for word in ("weights", "density", "'sclae' of method ties; did you mean 'scale'", "nan"):
        assert word in problems


def test_functions_name_themselves() -> None:
    with pytest.raises(pymerge.RequestError, match=r"^linear: weights"):
        pymerge.linear(MODELS, weights=[1])
    with pytest.raises(pymerge.RequestError, match=r"^task_arithmetic: scale"):
        pymerge.task_arithmetic(BASE, MODELS, scale=float("nan"))
    with pytest.raises(pymerge.RequestError, match=r"^ties_merge: density"):
        pymerge.ties_merge(BASE, MODELS, density=-1)


STRUCTURES: list[tuple[Any, Any, str]] = [
    (BASE, [], "models: ties needs at least 1 model, got 0"),
    (None, MODELS, "base: ties needs a base model, got None"),
    (BASE, MODELS[0], "models: expected a list of models, got Tensor"),
    (BASE, {"a": MODELS[0]}, "models: expected a list of models, got dict"),
    (BASE, [MODELS], "models[0]: expected a tensor like the first, got a list of tensors"),
    ([BASE], MODELS, "models[0]: expected a list of tensors like the first, got a tensor"),
    ({"w": BASE}, [[BASE]], "models[0]: expected a state dict like the first, got a list"),
    (BASE, ["path"], "models[0]: expected a tensor, a list of tensors or a state dict, got str"),
    (3.0, [BASE], "base: expected a tensor, a list of tensors or a state dict, got float"),
    ([BASE, 1], [[BASE, BASE]], "base[1]: expected a tensor, got int"),
    ({"w": BASE}, [{"w": "x"}], "models[0]['w']: expected a tensor, got str"),
    ({1: BASE}, [{1: BASE}], "base: keys must be strings, got 1"),
    ({"w": BASE}, [{}], "models[0] lacks ['w'] of base"),
    ({"w": BASE}, [{"w": BASE, "v": BASE}], "models[0]['v'] is not in base"),
    ([BASE], [[BASE, BASE]], "models[0][1] is not in base"),
    (BASE, [BASE[:7]], "models[0] has shape (7,), expected (8,) like base"),
    (BASE, [BASE[None]], "models[0] has shape (1, 8), expected (8,) like base"),
    ({"w": BASE}, [{"w": BASE.int()}], "models[0]['w'] has dtype torch.int32, expected torch.floa"),
    (BASE.int(), [BASE.long()], "models[0] has dtype torch.int64, expected torch.int32 like base"),
    (BASE.to(torch.float8_e4m3fn), [BASE], "base: dtype torch.float8_e4m3fn cannot be merged"),
    (BASE, [BASE.to(torch.float8_e5m2)], "models[0]: dtype torch.float8_e5m2 cannot be merged"),
    (BASE.to(torch.complex64), [BASE.to(torch.complex64)], "base: dtype torch.complex64 cannot be"),
    (BASE.to_sparse(), [BASE], "base: layout torch.sparse_coo cannot be merged; make it dense"),
    (BASE, [BASE.to_sparse()], "models[0]: layout torch.sparse_coo cannot be merged; make it"),
    (BASE, [BASE.to(torch.complex64)], "models[0] has dtype torch.complex64"),
]


@pytest.mark.parametrize(("base", "tuned", "message"), STRUCTURES)
def test_structures_that_do_not_fit(base: Any, tuned: Any, message: str) -> None:
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.ties_merge(base, tuned)
    assert all(problem.startswith("ties_merge: ") for problem in caught.value.problems)
    assert any(message in problem for problem in caught.value.problems)


def test_every_difference_is_listed() -> None:
    base = {"a": BASE, "b": BASE, "c": BASE}
    tuned = [{"a": BASE[:1], "b": BASE.int(), "d": BASE}, {"a": BASE, "b": BASE, "c": BASE[:2]}]
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.task_arithmetic(base, tuned)
    assert len(caught.value.problems) == 5


def test_lists_of_odd_shapes() -> None:
    """Keys that look like positions, and tuples as the list of models."""
    state = {"000000000001": BASE, "x": BASE}
    assert list(pymerge.linear((state, state))) == list(state)
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.linear([state, {"x": BASE}])
    assert "['000000000001']" in str(caught.value)
