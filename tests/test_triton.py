"""The Triton kernels: equal to the reference, bit by bit.

Without a GPU they run in Triton's interpreter, which has to be chosen before triton is first
imported, and anything may import triton (torch does). So they run in a process of their own, which
lives as long as the tests; with a GPU, in another one, compiled. `tests.triton_checks` is what they
run there.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import pymerge
from pymerge.methods import METHODS
from pymerge.ops.backends import resolve
from pymerge.ops.triton import library as triton
from tests.case import DTYPES
from tests.conftest import REQUIRED
from tests.models import NEED_FILES
from tests.packed_checks import CHECKS
from tests.triton_checks import (
    BY_NAME,
    begin,
    choice,
    differing_dialects,
    differing_method,
    differing_packed,
    differing_shapes,
    differing_specials,
    large_differences,
    merged,
    packed_layer,
    refusals,
    tuned,
    wrong_roundings,
)

MISSING = next(
    (
        name
        for name in ("triton", "pymerge.triton_kernels")
        if importlib.util.find_spec(name) is None
    ),
    None,
)
pytestmark = pytest.mark.compile
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not installed")

# Elements and models. The interpreter takes a millisecond for what hardware does in no time.
SHAPES = [(0, 2), (1, 1), (7, 8), (33, 17), (1023, 2), (4097, 3)]
FEW_SHAPES = {
    "f32": [(0, 2), (1, 1), (1030, 2)],
    "bf16": [(7, 8)],
    "f16": [(33, 3)],
    "mixed": [(7, 9), (33, 17)],
    "f64": [(33, 4)],
}
# Of these kernels the interpreter would look at 153 pairs of 17 models, one after the other.
PAIRWISE = ("chunk_sums_", "pcb_merge_", "pcb_scores_")
MANY_SHAPES = [(numel, count) for numel in (0, 1, 7, 33, 1023, 4097) for count in (1, 2, 3, 8, 17)]


@contextmanager
def process(interpret: bool) -> Iterator[Callable[..., Any]]:
    """Start a process, with or without the interpreter, and yield what calls functions in it."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=begin) as pool:
            pool.submit(os.getpid).result()  # it has started, with this environment
            restore(before)
            yield lambda function, *arguments: pool.submit(function, *arguments).result()
    finally:
        restore(before)


def restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    with process(interpret=True) as call:
        yield lambda function, *arguments: call(function, "cpu", *arguments)


@pytest.fixture(scope="session")
def gpu() -> Iterator[Callable[..., Any]]:
    if not torch.cuda.is_available():
        if "triton" in REQUIRED:
            pytest.fail("PYMERGE_REQUIRE names triton, but there is no GPU")
        pytest.skip("no GPU")
    with process(interpret=False) as call:
        yield lambda function, *arguments: call(function, "cuda", *arguments)


@pytest.fixture(params=["interpreter", "gpu"])
def kernels(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a function in the process of the interpreter, or of the GPU, with its device."""
    return request.getfixturevalue(request.param)


@needs_triton
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", BY_NAME)
def test_equal_to_reference(
    case: str, dtypes: str, kernels: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    shapes = MANY_SHAPES
    if request.node.callspec.params["kernels"] == "interpreter":
        shapes = FEW_SHAPES[dtypes] if BY_NAME[case].slow else SHAPES
        if BY_NAME[case].op in PAIRWISE:
            shapes = [(numel, min(count, 9)) for numel, count in shapes if numel != 33 or count < 9]
    assert kernels(differing_shapes, case, dtypes, shapes) == []


@needs_triton
@pytest.mark.parametrize(
    "case", ["linear", "task_arithmetic", "ties_mean_signs", "ties_mergekit", "magnitude_histogram"]
)
def test_every_number_of_models(case: str, kernels: Callable[..., Any]) -> None:
    """Kernels are compiled for up to 16 models and loop beyond; they loop over any dtypes."""
    assert kernels(differing_shapes, case, "bf16", [(77, count) for count in range(1, 18)]) == []
    assert kernels(differing_shapes, case, "mixed", [(77, 20)]) == []
    assert kernels(differing_shapes, case, "f64", [(77, 20)]) == []


@needs_triton
@pytest.mark.parametrize("case", ["sparse_all", "consensus_ta", "row_task_arithmetic"])
def test_more_numbers_of_models(case: str, kernels: Callable[..., Any]) -> None:
    assert kernels(differing_shapes, case, "bf16", [(20, count) for count in (3, 4, 16, 17)]) == []


@needs_triton
@pytest.mark.parametrize("case", ["pcb_paper", "pcb_vision_es", "sums_gram", "sums_pcb_exp"])
def test_numbers_of_models_of_pairs(case: str, kernels: Callable[..., Any]) -> None:
    """2, 4 and 8 are in the table above, and 9, where kernels of pairs begin to loop."""
    assert kernels(differing_shapes, case, "bf16", [(20, 3), (20, 5)]) == []


@needs_triton
@pytest.mark.parametrize("case", ["sums_gram.rows", "sums_statistics.rows", "row_task_arithmetic"])
def test_many_rows(case: str, kernels: Callable[..., Any]) -> None:
    """More rows than a program has, and where it loops over models."""
    assert kernels(differing_shapes, case, "f32", [(60, 2), (60, 9), (340, 2)]) == []


@needs_triton
@pytest.mark.parametrize("first", range(0, 24, 4))
def test_packed_at_random(first: int, kernels: Callable[..., Any]) -> None:
    assert kernels(differing_packed, range(first, first + 4), 2100) == []


@needs_triton
@pytest.mark.parametrize("check", CHECKS)
def test_layers_of_packed_task_vectors(check: str, kernels: Callable[..., Any]) -> None:
    assert kernels(packed_layer, check)


@needs_triton
@pytest.mark.parametrize("case", BY_NAME)
def test_non_finite_values(case: str, kernels: Callable[..., Any]) -> None:
    assert kernels(differing_specials, case) == []


@needs_triton
def test_every_dialect(kernels: Callable[..., Any]) -> None:
    assert kernels(differing_dialects) == []


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_half(dtype: torch.dtype, kernels: Callable[..., Any]) -> None:
    assert kernels(wrong_roundings, dtype) == []


@needs_triton
def test_many_programs(kernels: Callable[..., Any]) -> None:
    assert kernels(large_differences) == []


@needs_triton
def test_kernels_refuse_what_they_cannot_take(kernels: Callable[..., Any]) -> None:
    said = kernels(refusals)
    expected = (
        "tensors of 8 elements, got 7 on",
        "with strides (2,)",
        "dtype torch.int32 is not supported",
        "counters must be contiguous torch.int64",
        "expected 1 counters, got 0",
        "magmax: expected 1 numbers for 1 models, got 0",
        "tall_masks: expected a model from 0 to 0, got 1.0",
        "partials of shape (4, 1), got (1, 1)",
        "a mask of 62 words and 3 offsets do not fit 2000",
        "counters must be contiguous torch.int32",
        "expected 1 weights, one for each model, got 0",
    )
    for message, part in zip(said, expected, strict=True):
        assert part in message


@needs_triton
@pytest.mark.parametrize("semantics", ["official", "mergekit", "peft"])
def test_merges(semantics: str, interpreter: Callable[..., Any]) -> None:
    """Selection and merge together, through the API."""
    expected = interpreter(merged, "reference", semantics)
    assert torch.equal(interpreter(merged, "triton", semantics), expected)


@needs_triton
@pytest.mark.parametrize(
    "method",
    [n for n, spec in METHODS.items() if "triton" in spec.backends and n not in NEED_FILES],
)
def test_every_method(method: str, interpreter: Callable[..., Any]) -> None:
    assert interpreter(differing_method, method) == []


@needs_triton
def test_the_interpreter_runs_only_where_it_is_named(interpreter: Callable[..., Any]) -> None:
    assert interpreter(choice, "triton") == "triton"
    assert interpreter(choice, "auto") != "triton"
    with pytest.raises(pymerge.RequestError, match="'triton' computes on cpu tensors"):
        interpreter(functools.partial(_choice_on, "cuda"))


def _choice_on(device: str, _own: str) -> str:
    return resolve("triton", device).NAME


@needs_triton
def test_search_for_a_configuration(interpreter: Callable[..., Any]) -> None:
    found = interpreter(tuned)
    assert found["0"] == (True, 0), "off unless asked for"
    assert found["1"][1] > 3
    assert found["chosen"] == (2048, 4)
    assert found["again"] == 0, "once for each bucket of models"
    assert found["bucket"]
    assert found["small"]
    assert found["small asked"] == 0, "small calls are not worth it"


# Without a process of the kernels' own


def test_import_needs_no_triton() -> None:
    code = (
        "import sys, pymerge, pymerge.ops.triton.backend as backend, pymerge.ops.contract;"
        "backend.reason();"
        "assert 'triton' not in sys.modules, sorted(sys.modules)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "no GPU" in str(triton.reason())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(triton.reason()).startswith("triton is not installed; pip install")


@needs_triton
def test_reasons_that_the_import_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("triton")
    interpreted = type(module.language.sum).__name__ == "InterpretedFunction"
    monkeypatch.setattr(triton, "interprets", lambda: not interpreted)
    load = triton._load.__wrapped__
    assert load() == (None, "TRITON_INTERPRET changed after triton was imported")
    monkeypatch.setattr(module, "__version__", "3.5.1+git")
    assert load() == (None, "triton 3.5.1+git is too old; 3.6 or newer is needed")
