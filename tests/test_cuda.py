"""The CUDA kernels on a GPU: the case table on device tensors, equal to the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pymerge.backends import cuda
from tests.cases import DTYPES, Case, Inputs, make_inputs
from tests.test_cuda_host import BY_NAME, COUNTS, HERE, TILE
from tests.test_ops import LARGE, SIZES, SPECIAL, reference, same

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


def queue(case: Case, inputs: Inputs, result: torch.dtype, wide: bool = False) -> Outputs:
    """Call a case on the GPU; the outputs are there once the device has done its work."""
    base, models = inputs
    outputs = {name: moved(one) for name, one in case.outputs(base, models, result).items()}
    arguments = case.arguments(base, models)
    on_device = [moved(model) for model in models]
    device = {"base": moved(base), "models": on_device, "model": on_device[0]}
    arguments = {name: device.get(name, value) for name, value in arguments.items()}
    op = getattr(torch.ops.pymerge, case.op)
    op(**outputs, **arguments, wide=wide, backend="cuda")
    return outputs


def fetch(outputs: Outputs) -> Outputs:
    found = {name: tensor.cpu() for name, tensor in outputs.items()}
    if "counts" in found and found["counts"].dim() == 3:
        found["counts"] = found["counts"].sum(dim=0)
    return found


def run(case: Case, inputs: Inputs, result: torch.dtype, wide: bool = False) -> Outputs:
    return fetch(queue(case, inputs, result, wide))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_equal_to_reference(case: Case, dtypes: str) -> None:
    wide = dtypes == "f64"
    for numel in SIZES:
        for count in COUNTS:
            for result in {DTYPES[dtypes][0], torch.float32}:
                inputs, expected = reference(
                    case.name, numel, count, DTYPES[dtypes], result, numel % 2 == 1
                )
                assert same(expected, run(case, inputs, result, wide)), (numel, count, result)


@pytest.mark.parametrize("count", range(1, 18))
def test_every_number_of_models(count: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in HERE:
            inputs, expected = reference(case.name, 777, count, (dtype,), dtype)
            assert same(expected, run(case, inputs, dtype)), (case.name, dtype)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_large(case: Case, misaligned: bool) -> None:
    for numel in (TILE, LARGE):
        inputs, expected = reference(
            case.name, numel, 3, (torch.bfloat16,), torch.bfloat16, misaligned
        )
        assert same(expected, run(case, inputs, torch.bfloat16)), numel


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
    for index, case in enumerate(HERE):
        for dtype in (torch.float32, torch.bfloat16):
            for numel in (0, 3, 1000, TILE + 9):
                inputs = make_inputs(numel, 3, [dtype], seed=str(index), misaligned=numel == 3)
                prepared.append((case, inputs, dtype, case.run(inputs, dtype, "reference")))
    return prepared


def check_all(found: list[Outputs], prepared: list[Prepared]) -> None:
    for outputs, (case, inputs, dtype, expected) in zip(found, prepared, strict=True):
        assert same(expected, fetch(outputs)), (case.name, inputs[0].numel(), dtype)


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
    base, models = moved(inputs[0]), [moved(model) for model in inputs[1]]
    outputs = {name: moved(one) for name, one in case.outputs(*inputs, torch.bfloat16).items()}
    arguments = {**case.arguments(*inputs), "base": base, "models": models}

    def work() -> None:
        with cuda.phase(torch.device("cuda")):
            torch.ops.pymerge.ties_(**outputs, **arguments, backend="cuda")

    work()
    graph = capture(work)
    outputs["out"].fill_(float("nan"))
    outputs["stats"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(expected, fetch(outputs))


def test_host_tensors_are_refused() -> None:
    out, stats = torch.zeros(8, device="cuda"), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="counters on one CUDA device"):
        cuda.weighted_sum(out, stats, None, [out.clone()], [1.0], 1.0, 1.0, False)
