"""The CUDA kernels, run on the processor: tests/cuda_shim takes the place of CUDA.

The same sources, the same threads and blocks; what is left for a GPU to show is what the compiler
and the hardware make of them (tests/test_cuda.py).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from pymerge.adamerging import Packed, merged_layer, merged_packed_layer
from pymerge.ops import backends
from pymerge.ops.native import cuda
from pymerge.ops.native import device as cuda_native
from pymerge.ops.native import host as cpu_native
from tests import cuda_build
from tests.case import DTYPES, Case, Inputs, make_inputs, seen
from tests.cases import GPU_CASES
from tests.kind_checks import kinds_of_ops, wrong_statuses, wrongly_named
from tests.packed_checks import CHECKS, differing
from tests.packing import pack
from tests.test_ops import SPECIAL, reference, same

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or cuda_build.compiler() is None, reason="needs g++ on Linux"
)

HERE = GPU_CASES
BY_NAME = {case.name: case for case in HERE}
SIZES = [0, 1, 9, 33, 1023, 2057]
SLOW_SIZES = [0, 33, 2057]
COUNTS = [1, 2, 3, 8, 17]
TILE = 1 << 14  # elements of a block


def native() -> ModuleType:
    module, error = cpu_native.load()
    if module is None:
        pytest.skip(f"the native library is not there: {error}")
    return module


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    native()
    return ctypes.CDLL(str(cuda_build.build_for_host()))


@pytest.fixture
def launches(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Let backend 'cuda' compute on the processor; return how to count launches."""
    real = "" if cuda.reason() else str(cuda_native.LIBRARY)
    monkeypatch.setattr(cuda_native, "load", lambda: (native(), None))
    monkeypatch.setattr(cuda_native, "_KIND", "cpu")
    monkeypatch.setattr(cuda_native, "_place", lambda device: (0, 0))
    monkeypatch.setitem(backends._DEVICES, "cuda", "cpu")
    native().load_cuda(library._name)
    yield library.pymerge_shim_launches
    native().load_cuda(real)


def run(
    case: Case, inputs: Inputs, result: torch.dtype, wide: bool = False
) -> dict[str, torch.Tensor]:
    return case.run(inputs, result, "cuda", wide)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_equal_to_reference(case: Case, dtypes: str) -> None:
    wide = dtypes == "f64"
    for numel in SIZES if not case.slow else SLOW_SIZES:
        for count in COUNTS if not case.slow else COUNTS[::2]:
            for result in {DTYPES[dtypes][0], torch.float32 if count < 3 else DTYPES[dtypes][0]}:
                inputs, expected = reference(
                    case.name, numel, count, DTYPES[dtypes], result, numel % 2 == 1
                )
                assert same(expected, run(case, inputs, result, wide)), (numel, count, result)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_every_number_of_models(case: Case) -> None:
    for count in (4, 5, 6, 7, 9):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            inputs, expected = reference(case.name, 777, count, (dtype,), dtype)
            assert same(expected, run(case, inputs, dtype)), (count, dtype)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_several_blocks(case: Case, misaligned: bool) -> None:
    for numel in (TILE, 3 * TILE + 13):
        inputs, expected = reference(
            case.name, numel, 3, (torch.bfloat16,), torch.bfloat16, misaligned
        )
        assert same(expected, run(case, inputs, torch.bfloat16)), numel


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_non_finite_values(case: Case) -> None:
    grid = torch.tensor(SPECIAL)
    base = grid.repeat_interleave(len(SPECIAL) ** 2)
    first = grid.repeat(len(SPECIAL)).repeat_interleave(len(SPECIAL))
    second = grid.repeat(len(SPECIAL) ** 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for models in ([first, second], [first, second, first + second, second]):
            inputs = base.to(dtype), [model.to(dtype) for model in models]
            expected = case.run(inputs, dtype, "reference")
            assert same(expected, run(case, inputs, dtype)), dtype


@pytest.mark.usefixtures("launches")
def test_rounding_of_every_half() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        fine = torch.cat([every.float() * (1 + step * 2**-13) for step in range(-4, 5)])
        for values, kind in ((every, torch.float32), (every, dtype), (fine, dtype)):
            out = torch.zeros(values.shape, dtype=kind)
            stats = torch.zeros(3, dtype=torch.int64)
            torch.ops.pymerge.weighted_sum_(out, stats, [values], [1.0], 1.0, backend="cuda")
            # 0 + -0 is 0
            assert same({"out": out}, {"out": (values.float() + 0.0).to(kind)})


def with_special_values(count: int, dtype: torch.dtype) -> Inputs:
    """Return inputs where a few elements are not finite, too few to matter for a threshold."""
    base, models = make_inputs(3000, count, [dtype])
    for index, value in enumerate([*SPECIAL[:5], *SPECIAL[:3]]):
        models[index % count][index * 331] = value
    base[2 * 331 + 1] = float("inf")
    base[4 * 331 + 1] = float("nan")
    return base, models


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_few_non_finite_values(case: Case) -> None:
    """Kernels for finite numbers notice that they are not right, and leave these to others."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (1, 2, 4, 7):
            inputs = with_special_values(count, dtype)
            expected = case.run(inputs, dtype, "reference")
            assert same(expected, run(case, inputs, dtype)), (dtype, count)


def ties_mean(base: torch.Tensor, models: list[torch.Tensor], backend: str) -> torch.Tensor:
    out, stats = torch.full_like(base, float("nan")), torch.zeros(3, dtype=torch.int64)
    keep_all = [1] * len(models)
    rules = [], "none", "mean_of_count", "mass", 1, 1.0, False
    torch.ops.pymerge.ties_(out, stats, base, models, keep_all, *rules, backend=backend)
    return out


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("count", range(1, 9))
def test_means_are_rounded_as_divisions(count: int) -> None:
    """Subnormal sums too, whose quotients may lie in the middle between two numbers."""
    generator = torch.Generator().manual_seed(count)
    base = torch.zeros(20_000)
    for lowest, largest in ((1, 1 << 6), (1, 1 << 23), (-(1 << 25), 1 << 25)):
        models = [
            torch.randint(lowest, largest, base.shape, generator=generator) * 2.0**-149
            for _ in range(count)
        ]
        expected = ties_mean(base, models, "reference")
        assert torch.equal(ties_mean(base, models, "cuda"), expected), largest


def test_one_launch_for_many_tensors(launches: Callable[[], int]) -> None:
    """Calls that one kernel can do become one launch, as far as a table has room."""
    case = BY_NAME["ties_mean_signs"]
    sizes = [5, 0, TILE + 3, 64, 1, 2 * TILE, 100]
    cases = []
    for index, numel in enumerate(sizes):
        inputs = make_inputs(numel, 3, [torch.bfloat16], seed=str(index), misaligned=index % 3 == 0)
        cases.append((inputs, case.run(inputs, torch.bfloat16, "reference")))
    before = launches()
    with cuda.phase(torch.device("cpu")):
        results = [run(case, inputs, torch.bfloat16) for inputs, _ in cases]
        assert launches() == before
        assert all(bool(got["stats"].eq(0).all()) for got in results)
    assert launches() == before + 1
    for (_, expected), got in zip(cases, results, strict=True):
        assert same(expected, got)

    inputs, expected = reference("linear", 100, 2, (torch.float32,), torch.float32)
    before = launches()
    with cuda.phase(torch.device("cpu")):
        many = [run(BY_NAME["linear"], inputs, torch.float32) for _ in range(100)]
    assert 1 < launches() - before < 10
    assert all(same(expected, got) for got in many)


def test_a_phase_gathers_all_kinds(launches: Callable[[], int]) -> None:
    expected, got = [], []
    before = launches()
    with cuda.phase(torch.device("cpu")):
        for case in HERE:
            for dtype in (torch.float32, torch.bfloat16):
                inputs, wanted = reference(case.name, 3000, 2, (dtype,), dtype)
                # What is seen of it must wait until the phase is over.
                outputs = case.outputs(*inputs, dtype)
                case.call(outputs, case.arguments(*inputs), "cuda")
                expected.append(wanted)
                got.append(outputs)
    assert launches() > before
    for wanted, outputs in zip(expected, got, strict=True):
        assert same(wanted, seen(outputs, 3000))


@pytest.mark.usefixtures("launches")
def test_phases_do_not_nest() -> None:
    with (
        cuda.phase(torch.device("cpu")),
        pytest.raises(ValueError, match="a phase has begun already"),
    ):
        native().begin(0, 0)
    with pytest.raises(ValueError, match="no phase has begun on this device and stream"):
        native().end(0, 0)


@pytest.mark.usefixtures("launches")
def test_large_histograms_are_counted_in_device_memory() -> None:
    """More bins than shared memory holds."""
    base, models = make_inputs(70_000, 2, [torch.float32])
    arguments = BY_NAME["magnitude_histogram"].arguments(base, models)
    found = []
    for backend in ("reference", "cuda"):
        counts = torch.zeros(1, 2, 20_003, dtype=torch.int32)
        hot_chunks = torch.zeros(2, 2, dtype=torch.int32)
        torch.ops.pymerge.magnitude_histogram_(counts, hot_chunks, **arguments, backend=backend)
        found.append({"counts": counts, "hot_chunks": hot_chunks})
    assert same(*found)


@pytest.mark.usefixtures("launches")
def test_addresses_between_elements() -> None:
    """A tensor may begin anywhere: those that do are read byte by byte."""
    base, models = make_inputs(300, 2, [torch.float32])
    moved = []
    for tensor in (base, *models):
        bytes_ = torch.zeros(4 * 300 + 1, dtype=torch.uint8)
        bytes_[1:] = tensor.view(torch.uint8)
        moved.append(bytes_)
    operands = [(tensor.data_ptr() + 1, 0) for tensor in moved]
    out, stats = torch.zeros(4 * 300 + 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    place = (300, 0, 0, 0, 0)
    native().weighted_sum(
        (out.data_ptr() + 1, 0),
        operands[0],
        operands[1:],
        [0.5, 0.25],
        2.0,
        3.0,
        *place,
        stats=stats.data_ptr(),
    )
    expected = torch.zeros(300)
    torch.ops.pymerge.task_arithmetic_(
        expected, stats, base, models, [0.5, 0.25], 2.0, 3.0, backend="reference"
    )
    assert torch.equal(out[1:].view(torch.uint8).clone().view(torch.float32), expected)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_packed_at_random(first: int) -> None:
    assert differing("cuda", range(first, first + 20), 20_000, lambda tensor: tensor) == []


# torch's own tracer makes an instance of the function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS)
def test_layers_of_packed_task_vectors(check: str, launches: Callable[[], int]) -> None:
    before = launches()
    assert CHECKS[check]("cpu")
    assert launches() > before, "they ran somewhere else"


def test_a_layer_of_too_many_models_is_merged_elsewhere(launches: Callable[[], int]) -> None:
    base, models = make_inputs(100, 200, [torch.float32])
    kept = pack(models, [0.5] * 200)
    packed = [Packed(*one) for one in zip(*kept.values(), strict=True)]
    at = torch.full((200,), 0.01, requires_grad=True)
    before = launches()
    merged, dense = merged_packed_layer(at, base, packed), merged_layer(at, base, models)
    (merged.sum() + dense.sum()).backward()
    assert launches() == before
    assert at.grad is not None
    assert bool(torch.isfinite(at.grad).all())
    with pytest.raises(ValueError, match="refused its arguments: more models than a launch"):
        torch.ops.pymerge.packed_sum_(
            base.clone(), base, **kept, weights=[1.0] * 200, backend="cuda"
        )


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_floor_reads_all_and_writes_all(count: int, misaligned: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        base, models = make_inputs(TILE + 77, count, [dtype], misaligned=misaligned)
        out = torch.zeros_like(base)
        cuda.streaming_floor(out, base, models)
        kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
        expected = base.view(kind).clone()
        for model in models:
            expected |= model.view(kind)
        assert torch.equal(out.view(kind), expected)


@pytest.mark.usefixtures("launches")
def test_unfit_tensors_are_refused() -> None:
    out, stats = torch.zeros(8), torch.zeros(3, dtype=torch.int64)
    op = torch.ops.pymerge.weighted_sum_
    with pytest.raises(ValueError, match="contiguous tensors of 8 elements"):
        op(out, stats, [torch.zeros(7)], [1.0], 1.0, backend="cuda")
    with pytest.raises(ValueError, match="int32 is not supported"):
        op(out, stats, [torch.zeros(8, dtype=torch.int32)], [1.0], 1.0, backend="cuda")
    with pytest.raises(ValueError, match="contiguous int64"):
        op(out, torch.zeros(3), [torch.zeros(8)], [1.0], 1.0, backend="cuda")
    with pytest.raises(ValueError, match="one CUDA device"):
        cuda.weighted_sum(out, stats, None, [torch.zeros(8, device="meta")], [1.0], 1.0, 1.0, False)
    with pytest.raises(ValueError, match="refused its arguments: more models than a launch"):
        op(out, stats, [torch.zeros(8)] * 500, [1.0] * 500, 1.0, backend="cuda")
    with pytest.raises(ValueError, match="contiguous tensors of 8 elements"):
        torch.ops.pymerge.pointwise_(
            out, stats, out, [torch.zeros(7)], "magmax", [1.0], backend="cuda"
        )


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("name", "models"),
    [("linear", 200), ("dare_ties", 80), ("pcb_paper", 30), ("row_weighted_sum", 200)],
)
def test_too_many_models_are_refused(name: str, models: int) -> None:
    """All that a call needs must fit into a record."""
    inputs = make_inputs(8, models, [torch.float32])
    with pytest.raises(ValueError, match="refused its arguments: more models than a launch"):
        run(BY_NAME[name], inputs, torch.float32)


@pytest.mark.usefixtures("launches")
def test_unfit_tables_are_refused() -> None:
    base, models = make_inputs(2048, 2, [torch.float32])
    ops = torch.ops.pymerge
    with pytest.raises(ValueError, match=r"partials of shape \(3, 2\), got \(3, 3\)"):
        ops.chunk_sums_(
            torch.zeros(3, 3, dtype=torch.float64), base, models, "gram", backend="cuda"
        )
    with pytest.raises(ValueError, match="2 rows of 2048 numbers"):
        ops.row_ranks_(torch.zeros(2, 64, dtype=torch.int32), base, models, 64, backend="cuda")
    with pytest.raises(ValueError, match="contiguous float64"):
        ops.chunk_sums_(torch.zeros(3, 2), base, models, "gram", backend="cuda")


@pytest.mark.usefixtures("launches")
def test_unknown_kinds_are_refused() -> None:
    """By name, and by the library itself."""
    kinds = kinds_of_ops(native())
    assert wrongly_named("cuda", kinds) == []
    assert wrong_statuses(native().table(0), kinds) == []
