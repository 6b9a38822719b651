"""The CUDA kernels on a GPU: the case table on device tensors, equal to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pymerge.ops.native import cuda
from tests.case import DTYPES, Case, Inputs, make_inputs, seen
from tests.cases import GPU_CASES
from tests.packed_checks import CHECKS, differing
from tests.test_cuda_host import BY_NAME, COUNTS, TILE
from tests.test_ops import LARGE, SIZES, SLOW_SIZES, SPECIAL, reference, same

# PYMERGE_REQUIRE=cuda makes a missing backend an error (tests/conftest.py).
pytestmark = pytest.mark.skipif(cuda.reason() is not None, reason=f"cuda: {cuda.reason()}")

Outputs = dict[str, torch.Tensor]


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the GPU that lies as far from an aligned address as the given one."""
    if tensor.dim() != 1:
        return tensor.to("cuda")
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
    room[offset:] = tensor
    return room[offset:]


def on_device(argument: Any) -> Any:
    if isinstance(argument, list):
        return [on_device(one) for one in argument]
    return moved(argument) if isinstance(argument, torch.Tensor) else argument


def queue(case: Case, inputs: Inputs, result: torch.dtype, wide: bool = False) -> Outputs:
    """Call a case on the GPU; the outputs are there once the device has done its work."""
    outputs = {name: moved(one) for name, one in case.outputs(*inputs, result).items()}
    arguments = {name: on_device(value) for name, value in case.arguments(*inputs).items()}
    case.call(outputs, arguments, "cuda", wide)
    return outputs


def fetch(outputs: Outputs, numel: int) -> Outputs:
    return seen({name: tensor.cpu() for name, tensor in outputs.items()}, numel)


def run(case: Case, inputs: Inputs, result: torch.dtype, wide: bool = False) -> Outputs:
    return fetch(queue(case, inputs, result, wide), inputs[0].numel())


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_equal_to_reference(case: Case, dtypes: str) -> None:
    wide = dtypes == "f64"
    for numel in SIZES if not case.slow else SLOW_SIZES:
        for count in COUNTS if not case.slow else COUNTS[::2]:
            for result in {DTYPES[dtypes][0], torch.float32}:
                inputs, expected = reference(
                    case.name, numel, count, DTYPES[dtypes], result, numel % 2 == 1
                )
                assert same(expected, run(case, inputs, result, wide)), (numel, count, result)


@pytest.mark.parametrize("count", range(1, 18))
def test_every_number_of_models(count: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in GPU_CASES:
            inputs, expected = reference(case.name, 777, count, (dtype,), dtype)
            assert same(expected, run(case, inputs, dtype)), (case.name, dtype)


def test_packed_at_random() -> None:
    assert differing("cuda", range(100), 20_000, moved) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS)
def test_layers_of_packed_task_vectors(check: str) -> None:
    assert CHECKS[check]("cuda")


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_large(case: Case, misaligned: bool) -> None:
    for numel in (TILE, LARGE):
        inputs, expected = reference(
            case.name, numel, 3, (torch.bfloat16,), torch.bfloat16, misaligned
        )
        assert same(expected, run(case, inputs, torch.bfloat16)), numel


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
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


def test_rounding_of_every_half() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        fine = torch.cat([every.float() * (1 + step * 2**-13) for step in range(-4, 5)])
        for values, kind in ((every, torch.float32), (every, dtype), (fine, dtype)):
            out = torch.zeros(values.shape, dtype=kind, device="cuda")
            stats = torch.zeros(3, dtype=torch.int64, device="cuda")
            models = [values.cuda()]
            torch.ops.pymerge.weighted_sum_(out, stats, models, [1.0], 1.0, backend="cuda")
            # 0 + -0 is 0
            assert same({"out": out.cpu()}, {"out": (values.float() + 0.0).to(kind)})


@pytest.mark.parametrize("count", range(1, 17))
def test_means_of_sums_of_all_sizes(count: int) -> None:
    """Quotients by a count are rounded as a division rounds them, subnormal ones too."""
    generator = torch.Generator().manual_seed(count)
    case = BY_NAME["ties_mean"]
    for exponent in (-149, -145, -126, -110, -20, 0, 100):
        base = torch.zeros(50_000)
        models = [
            torch.randint(-(1 << 24), 1 << 24, base.shape, generator=generator).float()
            * 2.0**-24
            * 2.0 ** (exponent + 24)
            for _ in range(count)
        ]
        inputs = base, models
        expected = case.run(inputs, torch.float32, "reference")
        assert same(expected, run(case, inputs, torch.float32)), exponent


Prepared = tuple[Case, Inputs, torch.dtype, Outputs]


def calls() -> list[Prepared]:
    prepared = []
    for index, case in enumerate(GPU_CASES):
        for dtype in (torch.float32, torch.bfloat16):
            for numel in (0, 3, 1000, TILE + 9):
                inputs = make_inputs(numel, 3, [dtype], seed=str(index), misaligned=numel == 3)
                prepared.append((case, inputs, dtype, case.run(inputs, dtype, "reference")))
    return prepared


def check_all(found: list[Outputs], prepared: list[Prepared]) -> None:
    for outputs, (case, inputs, dtype, expected) in zip(found, prepared, strict=True):
        numel = inputs[0].numel()
        assert same(expected, fetch(outputs, numel)), (case.name, numel, dtype)


def test_a_phase_gathers_launches() -> None:
    """Tensors may be dropped before a phase ends: it keeps them."""
    prepared = calls()
    with cuda.phase(torch.device("cuda")):
        found = [queue(case, inputs, dtype) for case, inputs, dtype, _ in prepared]
    check_all(found, prepared)


def test_streams() -> None:
    prepared = calls()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = [queue(case, inputs, dtype) for case, inputs, dtype, _ in prepared]
    stream.synchronize()
    check_all(found, prepared)


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def test_graphs() -> None:
    """A phase can be captured: nothing in it copies to the device or waits for it."""
    case = BY_NAME["ties_mean"]
    inputs, expected = reference("ties_mean", 4097, 3, (torch.bfloat16,), torch.bfloat16)
    outputs = {name: moved(one) for name, one in case.outputs(*inputs, torch.bfloat16).items()}
    arguments = {name: on_device(value) for name, value in case.arguments(*inputs).items()}

    def work() -> None:
        with cuda.phase(torch.device("cuda")):
            case.call(outputs, arguments, "cuda")

    work()
    graph = capture(work)
    outputs["out"].fill_(float("nan"))
    outputs["stats"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(expected, fetch(outputs, 4097))


def test_host_tensors_are_refused() -> None:
    out, stats = torch.zeros(8, device="cuda"), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="counters on one CUDA device"):
        cuda.weighted_sum(out, stats, None, [out.clone()], [1.0], 1.0, 1.0, False)
