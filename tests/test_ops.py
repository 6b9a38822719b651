"""Every op on every backend: equal to the reference, bit by bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pymerge.ops import contract as _ops
from pymerge.ops.native import cpu
from tests.case import DTYPES, Case, Inputs, make_inputs
from tests.cases import CASES
from tests.conftest import NATIVE

SIZES = [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 1023, 4097]
COUNTS = [1, 2, 3, 8, 17]
SLOW_SIZES = [0, 1, 33, 1023, 4097]
LARGE = 540_003  # stored past the caches by one thread; not a multiple of anything
THREE_PARTS = 200_003  # work for three threads


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Equal bits, except that a NaN equals any NaN."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        raw = tensor.view(kinds[tensor.element_size()])
        return torch.where(tensor.isnan(), torch.full_like(raw, -1), raw)

    return first.keys() == second.keys() and all(
        torch.equal(bits(first[name]), bits(second[name])) for name in first
    )


_BY_NAME = {case.name: case for case in CASES}


@functools.cache
def reference(
    name: str,
    numel: int,
    count: int,
    dtypes: tuple[torch.dtype, ...],
    result: torch.dtype,
    misaligned: bool = False,
) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """Return inputs and what the reference makes of them."""
    inputs = make_inputs(numel, count, dtypes, misaligned=misaligned)
    wide = torch.float64 in dtypes
    return inputs, _BY_NAME[name].run(inputs, result, "reference", wide)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_reference(case: Case, dtypes: str, use_backend: Callable[[str], str]) -> None:
    wide = dtypes == "f64"
    for numel in SIZES if not case.slow else SLOW_SIZES:
        for count in COUNTS if not case.slow else COUNTS[::2]:
            if case.slow and count == 17 and numel > 33:
                continue  # the reference takes long; `test_every_number_of_models` has 16
            for result in {DTYPES[dtypes][0], torch.float32}:
                inputs, expected = reference(
                    case.name, numel, count, DTYPES[dtypes], result, numel % 2 == 1
                )
                for identifier in NATIVE:
                    got = case.run(inputs, result, use_backend(identifier), wide)
                    assert same(expected, got), (identifier, numel, count, result)


@pytest.mark.parametrize("count", range(1, 18))
def test_every_number_of_models(count: int, use_backend: Callable[[str], str]) -> None:
    """The kernels are unrolled for up to 16 models and loop beyond."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in CASES:
            if case.slow and count not in (2, 4, 5, 16):
                continue
            inputs, expected = reference(case.name, 777, count, (dtype,), dtype)
            for identifier in NATIVE:
                got = case.run(inputs, dtype, use_backend(identifier))
                assert same(expected, got), (identifier, case.name, dtype)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.oracle], ids=lambda case: case.name
)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_equal_to_an_oracle(case: Case, count: int) -> None:
    base, models = make_inputs(3000, count, [torch.float64])
    found = case.run((base, models), torch.float64, "reference", wide=True)["out"]
    assert case.oracle is not None
    expected = case.oracle(base.numpy(), torch.stack(models).numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_large_outputs_and_threads(case: Case, use_backend: Callable[[str], str]) -> None:
    """Large outputs are stored past the caches; ranges of threads begin anywhere."""
    numel = THREE_PARTS if case.slow else LARGE
    misaligned = (
        [False, True] if case.name in ("linear", "task_arithmetic", "ties_mean") else [False]
    )
    try:
        for shifted in misaligned:
            inputs, expected = reference(
                case.name, numel, 3, (torch.bfloat16,), torch.bfloat16, shifted
            )
            for threads in (1, 3):
                for identifier in NATIVE:
                    backend = use_backend(identifier)
                    cpu.set_threads(threads)
                    got = case.run(inputs, torch.bfloat16, backend)
                    assert same(expected, got), (identifier, threads)
    finally:
        cpu.set_threads(None)


SPECIAL = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, -0.0, 0.0, 65504.0, 1.0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_non_finite_values(case: Case, use_backend: Callable[[str], str]) -> None:
    grid = torch.tensor(SPECIAL)
    base = grid.repeat_interleave(len(SPECIAL) ** 2)
    first = grid.repeat(len(SPECIAL)).repeat_interleave(len(SPECIAL))
    second = grid.repeat(len(SPECIAL) ** 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = base.to(dtype), [first.to(dtype), second.to(dtype)]
        expected = case.run(inputs, dtype, "reference")
        for identifier in NATIVE:
            got = case.run(inputs, dtype, use_backend(identifier))
            assert same(expected, got), (identifier, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_few_non_finite_values(case: Case, use_backend: Callable[[str], str]) -> None:
    """Among many finite ones: kernels that take a shorter way for those must notice."""
    for dtype in (torch.float32, torch.bfloat16):
        base, models = make_inputs(9_001, 3, (dtype,), "few")
        for k, (index, value) in enumerate(
            [(5, "nan"), (4_100, "inf"), (4_101, "-inf"), (8_999, "nan"), (9_000, "inf")]
        ):
            [base, *models][k % 4][index] = float(value)
        inputs = base, models
        expected = case.run(inputs, dtype, "reference")
        for identifier in NATIVE:
            got = case.run(inputs, dtype, use_backend(identifier))
            assert same(expected, got), (identifier, dtype)


ODD_NUMBERS = {
    "nothing": {"scale": 0.0},
    "no number": {"scale": float("nan")},
    "infinite weight": {"weights": [1.0, float("inf"), -0.5]},
    "no weight": {"weights": [0.0, float("nan"), 1.0]},
    "infinite factor": {"factors": [float("-inf"), 1.0, 0.0]},
    "weights without a finite sum": {"weights": [3e38, 3e38, 3e38]},
    "large factors": {"factors": [3e38, -3e38, 3e38]},
    "infinite divisor": {"divisor": float("inf")},
}


@pytest.mark.parametrize("odd", ODD_NUMBERS)
@pytest.mark.parametrize(
    "name",
    ["dare_linear", "dare_ties", "breadcrumbs_ties", "della", "della_linear", "breadcrumbs_rows"],
)
def test_sparse_merges_with_odd_numbers(
    name: str, odd: str, use_backend: Callable[[str], str]
) -> None:
    """What the shorter way for finite numbers cannot do must go the longer one."""
    base, models = make_inputs(4_099, 3, (torch.bfloat16,), "odd")
    models[1][7::50] = 3e38
    case = _BY_NAME[name]
    arguments = {**case.arguments(base, models), **ODD_NUMBERS[odd]}
    expected = case.outputs(base, models, base.dtype)
    case.call(expected, arguments, "reference")
    for identifier in NATIVE:
        got = case.outputs(base, models, base.dtype)
        case.call(got, arguments, use_backend(identifier))
        assert same(expected, got), identifier


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_all_kinds_of_rows(dtype: torch.dtype, use_backend: Callable[[str], str]) -> None:
    """Rows that are hard to sort by a part of the key, and rows long enough to be sorted by all."""
    generator = torch.Generator().manual_seed(0)
    for columns in (65, 1000, 32_768, 40_001):
        near = 1 + torch.randint(0, 2048, (columns,), generator=generator) * 2.0**-23
        few = torch.randint(0, 3, (columns,), generator=generator).float()
        wild = torch.randn(columns, generator=generator) ** 9
        odd = torch.where(torch.rand(columns, generator=generator) < 0.3, float("nan"), few)
        down = torch.arange(columns, 0, -1).float() * 2.0**-20 + 1
        rows = torch.stack([near, few, torch.zeros(columns), wild, odd, down, near.flip(0)])
        base, model = torch.zeros(rows.numel(), dtype=dtype), rows.reshape(-1).to(dtype)
        room = -(-rows.numel() // 64) * 64
        found = {}
        for identifier in ("reference", *NATIVE):
            ranks = torch.zeros(1, room, dtype=torch.int32)
            backend = use_backend(identifier)
            torch.ops.pymerge.row_ranks_(ranks, base, [model], columns, backend=backend)
            found[identifier] = ranks[:, : rows.numel()]
        for identifier in NATIVE:
            assert torch.equal(found["reference"], found[identifier]), (columns, identifier)


@pytest.mark.parametrize("identifier", NATIVE)
def test_rounding_of_every_half(identifier: str, use_backend: Callable[[str], str]) -> None:
    """Every bf16 and f16 value loads exactly, and every store rounds to nearest even."""
    backend = use_backend(identifier)
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        # Between neighbours: just beside, and on, the ties of both dtypes.
        fine = torch.cat([every.float() * (1 + step * 2**-13) for step in (*range(-4, 5), 16)])
        for values, kind in ((every, torch.float32), (every, dtype), (fine, dtype)):
            out = torch.zeros(values.shape, dtype=kind)
            stats = torch.zeros(3, dtype=torch.int64)
            torch.ops.pymerge.weighted_sum_(out, stats, [values], [1.0], 1.0, backend=backend)
            # 0 + -0 is 0
            assert same({"out": out}, {"out": (values.float() + 0.0).to(kind)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    base, models = make_inputs(100, 2, [torch.float32])
    op = getattr(torch.ops.pymerge, case.op).default
    arguments = {**case.outputs(base, models, torch.float32), **case.arguments(base, models)}
    positional = tuple(
        arguments.pop(argument.name, argument.default_value)
        for argument in op._schema.arguments
        if not argument.kwarg_only
    )
    torch.library.opcheck(op, positional, {**arguments, "backend": "cpu"})


def test_case_table_covers_every_op() -> None:
    assert {case.op for case in CASES} == set(_ops.NAMES)


def test_kernels_refuse_what_they_cannot_take() -> None:
    """An op called directly with unfit tensors raises; it does not read past their ends."""
    out, stats = torch.zeros(8), torch.zeros(3, dtype=torch.int64)
    op = torch.ops.pymerge.weighted_sum_
    with pytest.raises(ValueError, match="contiguous CPU tensors of 8"):
        op(out, stats, [torch.zeros(7)], [1.0], 1.0, backend="cpu")
    with pytest.raises(ValueError, match="contiguous"):
        op(out, stats, [torch.zeros(16)[::2]], [1.0], 1.0, backend="cpu")
    with pytest.raises(ValueError, match="int32 is not supported"):
        op(out, stats, [torch.zeros(8, dtype=torch.int32)], [1.0], 1.0, backend="cpu")
