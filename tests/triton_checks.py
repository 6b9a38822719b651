"""The checks of the Triton kernels, which run in a process of their own; see `tests.test_triton`.

Each function takes the device of the tensors that the kernels accept there, and returns the
failures.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

import pymerge
from pymerge.adamerging import ops
from pymerge.methods import METHODS
from pymerge.ops.backends import resolve
from pymerge.ops.native.host import native
from tests import cases
from tests.case import DTYPES, Case, Inputs, make_inputs
from tests.kind_checks import kinds_of_ops, wrongly_named
from tests.models import llama
from tests.packed_checks import CHECKS, differing
from tests.packing import pack
from tests.test_methods import number_of_models, parameters_of
from tests.test_ops import SPECIAL, same

BY_NAME = {case.name: case for case in cases.GPU_CASES}


def begin() -> None:
    """Silence numpy, which warns where hardware does not, e.g. of infinity minus infinity."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a tensor to a device, one element past an aligned address if it is at such an
    address."""
    if device == "cpu" or tensor.data_ptr() % 16 == 0:
        return tensor.to(device)
    padded = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
    padded[1:] = tensor
    return padded[1:]


def run(
    case: Case, inputs: Inputs, dtype: torch.dtype, device: str, wide: bool
) -> dict[str, torch.Tensor]:
    """Run a case on a device and return its outputs."""
    return case.run(inputs, dtype, "triton", wide, functools.partial(moved, device=device))


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
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    if case.slow:
        dtypes = dtypes[::3]
    # A sum of everything would always be NaN: use the first elements, where the base is finite, and
    # each element alone in its row.
    if case.op == "chunk_sums_" and device == "cpu":
        base, first, second = base[700:880], first[:180], second[:180]
    different = []
    for dtype in dtypes:
        inputs = base.to(dtype), [first.to(dtype), second.to(dtype)]
        wide = dtype == torch.float64
        expected = case.run(inputs, dtype, "reference", wide)
        if not same(expected, run(case, inputs, dtype, device, wide)):
            different.append(dtype)
    return different


def differing_dialects(device: str) -> list[Any]:
    """Return the dialects of TIES, among all possible ones, that differ on such values."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor(SPECIAL)
    base, *models = (grid[torch.randint(len(grid), (400,), generator=generator)] for _ in range(4))
    thresholds = [0, 5, 0x7F800000]
    different = []
    for weighting, merge, elect, zero_sign in itertools.product(
        ("none", "before", "after"),
        ("mean_of_count", "mean_of_weights", "sum", "max"),
        ("mass", "count"),
        (-1, 0, 1),
    ):
        if weighting == "none" and merge == "mean_of_weights":
            continue
        told = []
        for backend, place in (("reference", "cpu"), ("triton", device)):
            out = torch.full((400,), 9.0, device=place)
            stats = torch.tensor([7, 8, 9], device=place)
            torch.ops.pymerge.ties_(
                out,
                stats,
                base.to(place),
                [model.to(place) for model in models],
                thresholds,
                [] if weighting == "none" else [0.3, -0.5, 0.0],
                weighting,
                merge,
                elect,
                zero_sign,
                -0.7,
                True,
                backend=backend,
            )
            told.append({"out": out.cpu(), "stats": stats.cpu()})
        if not same(*told):
            different.append((weighting, merge, elect, zero_sign))
    return different


def wrong_roundings(device: str, dtype: torch.dtype) -> list[str]:
    """Load every value of a 16-bit dtype; store the midpoints between two, and their neighbours."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    next_one = (every.view(torch.int16) + 1).view(dtype)
    half = (every.double() + next_one.double()).div(2).float()
    up, down = (torch.nextafter(half, torch.tensor(end)) for end in (float("inf"), -float("inf")))
    fine = torch.cat([half, up, down, torch.tensor([65519.99, 65520.0, 3.39617e38, 3.39618e38])])
    # Doubles are first rounded to float32, and are then midpoints.
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
    """Run many programs: statistics of several blocks are added up, and flags are raised once."""
    numel, dtype = 65536 + 5077, torch.bfloat16
    base, models = make_inputs(numel, 2, [dtype])
    for at in (5, 3000, 66_000, numel - 1):
        models[1][at] = float("nan")
    different = []
    for name in ("linear", "task_arithmetic", "ties_drop", "ties_signs", "magnitude_histogram"):
        expected = BY_NAME[name].run((base, models), dtype, "reference")
        if not same(expected, run(BY_NAME[name], (base, models), dtype, device, False)):
            different.append(name)
    for name in ("sparse_all", "pcb_paper_scores", "sums_gram"):
        inputs = make_inputs(20_000, 2, [dtype])
        expected = BY_NAME[name].run(inputs, dtype, "reference")
        if not same(expected, run(BY_NAME[name], inputs, dtype, device, False)):
            different.append(name)
    # Rows longer than a block.
    inputs = make_inputs(60_000, 2, [dtype])
    weights = torch.arange(6, dtype=torch.float64).view(2, 3)
    rows = []
    for backend, place in (("reference", "cpu"), ("triton", device)):
        out = torch.full((60_000,), 9.0, device=place)
        stats = torch.zeros(3, dtype=torch.int64, device=place)
        at = inputs[0].to(place), [model.to(place) for model in inputs[1]]
        op = torch.ops.pymerge.row_weighted_sum_
        op(out, stats, *at, weights.to(place), 20_000, backend=backend)
        rows.append({"out": out.cpu(), "stats": stats.cpu()})
    if not same(*rows):
        different.append("rows")
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
    # All keys on one side, where a counter would overflow.
    for lo, hot in ((1, -1), (0, 0), (0, -1)):
        counts = torch.zeros(1, 1, 4, dtype=torch.int32, device=device)
        none = torch.zeros(1, 0, dtype=torch.int32, device=device)
        at = torch.zeros(5000, device=device), [torch.full((5000,), 0.5 * (1 - lo), device=device)]
        key = 0x3F000000 if hot == 0 else -1
        torch.ops.pymerge.magnitude_histogram_(
            counts, none, *at, [lo], [0], [key], backend="triton"
        )
        column = 0 if lo else 3 if hot == 0 else 2
        if counts.flatten().tolist() != [5000 * (k == column) for k in range(4)]:
            different.append(f"all in column {column}")
    return different


def refusals(device: str) -> list[str]:
    """Return the messages for tensors that do not fit."""
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
    at = torch.zeros(8, device=device), [torch.zeros(8, device=device)]
    partials = torch.zeros(1, 1, dtype=torch.float64, device=device)
    for op, arguments in (
        ("pointwise_", (out, stats, *at, "magmax", [])),
        ("pointwise_", (out, stats, *at, "tall_masks", [1.0, 0.4, 1.0])),
        ("chunk_sums_", (partials, *at, "statistics")),
    ):
        with pytest.raises(ValueError, match="backend 'triton'") as caught:
            getattr(torch.ops.pymerge, op)(*arguments, backend="triton")
        said.append(str(caught.value))
    said += wrongly_named("triton", kinds_of_ops(native()), device)
    kept = pack([torch.ones(2000)], [0.5])
    kept = {name: [tensor.to(device) for tensor in own] for name, own in kept.items()}
    at = torch.zeros(2000, device=device)
    for change, more in (
        ({"masks": [kept["masks"][0][:-1]]}, {}),
        ({"masks": [kept["masks"][0].long()]}, {}),
        ({}, {"weights": []}),
    ):
        how = {"weights": [1.0], **kept, **change, **more, "backend": "triton"}
        with pytest.raises(ValueError, match="backend 'triton'") as caught:
            torch.ops.pymerge.packed_sum_(at.clone(), at, **how)
        said.append(str(caught.value))
    return said


def differing_packed(device: str, seeds: range, most: int) -> list[Any]:
    return differing("triton", seeds, most, functools.partial(moved, device=device))


def packed_layer(device: str, check: str) -> bool:
    """Check merged layers of trimmed task vectors, computed by Triton."""
    with mock.patch.object(ops, "choose", return_value="triton"):
        return bool(CHECKS[check](device))


def merged(device: str, backend: str, semantics: str) -> torch.Tensor:
    """Merge small tensors through the public API."""
    base, models = make_inputs(3000, 3, [torch.float32])
    at = base.to(device), [model.to(device) for model in models]
    result = pymerge.merge("ties", *at, density=0.3, semantics=semantics, backend=backend)
    return result.cpu()


def differing_method(device: str, method: str) -> list[str]:
    """Return the tensors for which a method, all passes together, differs from the reference."""
    base, tuned = llama(number_of_models(method))
    names = ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
    base, *tuned = ({name: one[name][:40].to(device) for name in names} for one in (base, *tuned))
    origin = base if METHODS[method].needs_base else None
    first, again = (
        pymerge.merge(method, origin, tuned, backend=backend, **parameters_of(method))
        for backend in ("reference", "triton")
    )
    return [name for name in names if not torch.equal(first[name], again[name])]


def choice(device: str, name: str | None) -> str:
    return resolve(name, device).NAME


def tuned(device: str) -> dict[str, Any]:
    """Search for a configuration, with made-up times."""
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
