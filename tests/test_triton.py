"""The Triton kernels: equal to the reference, bit by bit.

Without a GPU they run in Triton's interpreter, which has to be chosen before triton is first
imported, and anything may import triton (torch does). So they run in a process of their own, which
lives as long as the tests; with a GPU, in another one, compiled.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import pymerge
from pymerge.backends import resolve, triton
from tests.cases import CASES, DTYPES, Case, Inputs, make_inputs
from tests.conftest import REQUIRED
from tests.test_ops import SPECIAL, same

MISSING = next(
    (
        name
        for name in ("triton", "pymerge.triton_kernels")
        if importlib.util.find_spec(name) is None
    ),
    None,
)
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not installed")

# Those that have a Triton kernel.
OPS = {
    "weighted_sum_",
    "task_arithmetic_",
    "ties_",
    "ties_signs_",
    "magnitude_histogram_",
    "magnitude_equal_counts_",
}
CASES = [case for case in CASES if case.op in OPS]
BY_NAME = {case.name: case for case in CASES}

# Elements and models. The interpreter takes a millisecond for what hardware does in no time.
SHAPES = [(0, 2), (1, 1), (7, 8), (33, 17), (1023, 2), (4097, 3)]
MANY_SHAPES = [(numel, count) for numel in (0, 1, 7, 33, 1023, 4097) for count in (1, 2, 3, 8, 17)]


# In the other process ---------------------------------------------------------------------------


def begin() -> None:
    """Be quiet: numpy warns where hardware does not, of infinity minus infinity for example."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a tensor to a device, one element past an aligned address where it is so here."""
    if device == "cpu" or tensor.data_ptr() % 16 == 0:
        return tensor.to(device)
    padded = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
    padded[1:] = tensor
    return padded[1:]


def run(
    case: Case, inputs: Inputs, dtype: torch.dtype, device: str, wide: bool
) -> dict[str, torch.Tensor]:
    """Run a case on a device and return what it wrote."""
    base, models = inputs
    outputs = {
        name: tensor.to(device) for name, tensor in case.outputs(base, models, dtype).items()
    }
    arguments = {
        name: moved(value, device)
        if isinstance(value, torch.Tensor)
        else [moved(one, device) for one in value]
        if name == "models"
        else value
        for name, value in case.arguments(base, models).items()
    }
    op = getattr(torch.ops.pymerge, case.op)
    op(**outputs, **arguments, wide=wide, backend="triton")
    if "counts" in outputs and outputs["counts"].dim() == 3:
        outputs["counts"] = outputs["counts"].sum(dim=0)
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def differing_shapes(device: str, name: str, dtypes: str, shapes: list[Any]) -> list[Any]:
    """Return the shapes and dtypes for which a case differs from the reference."""
    case, kinds, wide = BY_NAME[name], DTYPES[dtypes], dtypes == "f64"
    different = []
    for numel, count in shapes:
        inputs = make_inputs(numel, count, kinds, misaligned=numel % 2 == 1)
        for result in {kinds[0], torch.float32} if count == 3 else {kinds[0]}:
            expected = case.run(inputs, result, "reference", wide)
            if not same(expected, run(case, inputs, result, device, wide)):
                different.append((numel, count, result))
    return different


def differing_specials(device: str, name: str) -> list[torch.dtype]:
    """Return the dtypes for which a case differs on NaN, infinity, subnormals and zeros."""
    case = BY_NAME[name]
    grid = torch.tensor(SPECIAL, dtype=torch.float64)
    base = grid.repeat_interleave(len(SPECIAL) ** 2)
    first = grid.repeat(len(SPECIAL)).repeat_interleave(len(SPECIAL))
    second = grid.repeat(len(SPECIAL) ** 2)
    different = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        inputs = base.to(dtype), [first.to(dtype), second.to(dtype)]
        wide = dtype == torch.float64
        expected = case.run(inputs, dtype, "reference", wide)
        if not same(expected, run(case, inputs, dtype, device, wide)):
            different.append(dtype)
    return different


def wrong_roundings(device: str, dtype: torch.dtype) -> list[str]:
    """Load every value of a 16-bit dtype; store what lies half-way between two, and around it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    next_one = (every.view(torch.int16) + 1).view(dtype)
    half = (every.double() + next_one.double()).div(2).float()
    up, down = (torch.nextafter(half, torch.tensor(end)) for end in (float("inf"), -float("inf")))
    fine = torch.cat([half, up, down, torch.tensor([65519.99, 65520.0, 3.39617e38, 3.39618e38])])
    # Doubles are rounded to float32 first, and then lie half-way.
    doubles = half.double() * (1 + 2**-40)
    wrong = []
    for what, values, kind in (
        ("load", every, torch.float32),
        ("keep", every, dtype),
        ("store", fine, dtype),
        ("store doubles", doubles, dtype),
    ):
        wide = values.dtype == torch.float64
        out = torch.zeros(values.shape, dtype=kind, device=device)
        stats = torch.zeros(3, dtype=torch.int64, device=device)
        op = torch.ops.pymerge.weighted_sum_
        op(out, stats, [values.to(device)], [1.0], 1.0, wide=wide, backend="triton")
        if not same({"out": out.cpu()}, {"out": (values + 0.0).to(kind)}):  # 0 + -0 is 0
            wrong.append(what)
    return wrong


def large_differences(device: str) -> list[str]:
    """Run many programs: statistics of several blocks add up, and flags are raised once."""
    numel, dtype = 65536 + 5077, torch.bfloat16
    base, models = make_inputs(numel, 2, [dtype])
    for at in (5, 3000, 66_000, numel - 1):
        models[1][at] = float("nan")
    different = []
    for name in ("linear", "task_arithmetic", "ties_drop", "ties_signs", "magnitude_histogram"):
        expected = BY_NAME[name].run((base, models), dtype, "reference")
        if not same(expected, run(BY_NAME[name], (base, models), dtype, device, False)):
            different.append(name)
    # Counts of chunks are set, not added to; counts of keys are added to.
    key = int(torch.tensor(0.0078125).view(torch.int32))
    told = []
    for backend, place in (("reference", "cpu"), ("triton", device)):
        at = base.to(place), [model.to(place) for model in models]
        counts = torch.full((1, 2, 19), 3, dtype=torch.int32, device=place)
        hot = torch.full((2, 3), 4, dtype=torch.int32, device=place)
        chunks = torch.full((2,), 5, dtype=torch.int64, device=place)
        brackets = [key - (1 << 23)] * 2, [20, 31], [key, -1]
        torch.ops.pymerge.magnitude_histogram_(counts, hot, *at, *brackets, backend=backend)
        torch.ops.pymerge.magnitude_equal_counts_(
            chunks, at[0], at[1][0], key, 65536, backend=backend
        )
        told.append({"counts": counts.cpu(), "hot": hot.cpu(), "chunks": chunks.cpu()})
    if not same(*told) or int(told[0]["hot"][0, 0]) < 100:
        different.append("chunks")
    return different


def refusals(device: str) -> list[str]:
    """Return what is said about tensors that do not fit."""
    out, stats = torch.zeros(8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    said = []
    for model, counters in (
        (torch.zeros(7, device=device), stats),
        (torch.zeros(16, device=device)[::2], stats),
        (torch.zeros(8, dtype=torch.int32, device=device), stats),
        (torch.zeros(8, device=device), stats.int()),
        (torch.zeros(8, device=device), stats[:0]),
    ):
        with pytest.raises(ValueError, match="backend 'triton'") as caught:
            torch.ops.pymerge.weighted_sum_(out, counters, [model], [1.0], 1.0, backend="triton")
        said.append(str(caught.value))
    return said


def merged(device: str, backend: str, semantics: str) -> torch.Tensor:
    """Merge small tensors through the public API."""
    base, models = make_inputs(3000, 3, [torch.float32])
    at = base.to(device), [model.to(device) for model in models]
    result = pymerge.merge("ties", *at, density=0.3, semantics=semantics, backend=backend)
    return result.cpu()


def choice(device: str, name: str | None) -> str:
    return resolve(name, device).NAME


def tuned(device: str) -> dict[str, Any]:
    """Search for a configuration, with times that are made up."""
    launch = importlib.import_module("pymerge.triton_kernels.launch")
    asked: list[Any] = []

    def elapsed(_launch: Any, config: Any) -> float:
        asked.append(config)
        return abs(config.block - 2048) + config.warps

    def call(models: int, numel: int) -> Any:
        dtypes = (torch.bfloat16,) * (models + 1)
        return launch.Launch("ties", {"SIGNS": True}, numel, models, torch.device("cpu"), dtypes)

    found: dict[str, Any] = {}
    fixed = launch.default_config(call(3, 1 << 24))
    for setting in ("0", "1"):
        os.environ["PYMERGE_TRITON_AUTOTUNE"] = setting
        found[setting] = launch._config(call(3, 1 << 24), elapsed) == fixed, len(asked)
    del os.environ["PYMERGE_TRITON_AUTOTUNE"]
    os.environ["PYMERGE_TRITON_AUTOTUNE"] = "1"
    chosen = launch._config(call(3, 1 << 24), elapsed)
    found["chosen"] = chosen.block, chosen.warps
    before = len(asked)
    launch._config(call(4, 1 << 24), elapsed)  # the same bucket
    found["again"] = len(asked) - before
    launch._config(call(5, 1 << 24), elapsed)
    found["bucket"] = len(asked) > before
    before = len(asked)
    found["small"] = launch._config(call(9, 1000), elapsed) == launch.default_config(call(9, 1000))
    found["small asked"] = len(asked) - before
    del os.environ["PYMERGE_TRITON_AUTOTUNE"]
    return found


# In this process --------------------------------------------------------------------------------


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
    shapes = SHAPES if "interpreter" in request.node.callspec.id else MANY_SHAPES
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
@pytest.mark.parametrize("case", BY_NAME)
def test_non_finite_values(case: str, kernels: Callable[..., Any]) -> None:
    assert kernels(differing_specials, case) == []


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
        "import sys, pymerge, pymerge.backends.triton as backend, pymerge._ops; backend.reason();"
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
