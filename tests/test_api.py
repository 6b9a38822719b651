"""The Python API over tensors in memory: structures, dtypes, memory, arguments and their errors."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pymerge
from pymerge.ops.backends import BACKENDS
from tests.conftest import BACKEND_IDS

METHODS = ["linear", "task_arithmetic", "ties"]


def call(method: str, base: Any, tuned: list[Any], **arguments: Any) -> Any:
    """Call a method's own function."""
    if method == "linear":
        return pymerge.linear(tuned, **arguments)
    function = {"task_arithmetic": pymerge.task_arithmetic, "ties": pymerge.ties_merge}[method]
    return function(base, tuned, **arguments)


def draw(shape: tuple[int, ...] = (40, 30), count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    """Return a base and models."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base, *(base + torch.randn(shape, generator=generator) * 0.1 for _ in range(count))]


# doctests


PACKAGE = Path(pymerge.__file__).parent
EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8") and path.parent.name != "search"
)  # those of the search show calls on files


class Finder(doctest.DocTestFinder):
    """Finds the examples of decorated functions too."""

    def _from_module(self, module: Any, object: Any) -> bool:
        return super()._from_module(module, inspect.unwrap(object))


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_of_the_documentation(module: str) -> None:
    loaded = importlib.import_module(module)
    tests = Finder(exclude_empty=True).find(loaded, module, extraglobs={"torch": torch})
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    result = runner.summarize()
    assert result.failed == 0
    least = {"pymerge.merging.task_vector": 5, "pymerge.methods.sums.functions": 3}
    assert result.attempted >= least.get(module, 1)


# structures


@pytest.mark.parametrize("method", METHODS)
def test_structures(method: str) -> None:
    """The result has the structure of the base, and its tensors those of single merges."""
    first, second = draw((5, 4), seed=1), draw((7,), seed=2)
    whole = {"scope": "tensor"} if method == "ties" else {}
    one, two = (call(method, t[0], t[1:], **whole) for t in (first, second))
    assert isinstance(one, torch.Tensor)
    assert one.shape == (5, 4)

    makers: list[Callable[[torch.Tensor, torch.Tensor], Any]] = [
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: {"b": b, "a": a},
        lambda a, b: OrderedDict([("b", b), ("a", a)]),
    ]
    for make in makers:
        base, *tuned = (make(a, b) for a, b in zip(first, second, strict=True))
        merged = call(method, base, tuned, **whole)
        assert type(merged) is type(base)
        if isinstance(merged, dict):
            assert list(merged) == ["b", "a"]
            merged = (merged["a"], merged["b"])
        assert len(merged) == 2
        assert torch.equal(merged[0], one)
        assert torch.equal(merged[1], two)


def test_a_module_state_dict() -> None:
    """What state_dict() gives, with its buffers and its metadata, loads again."""
    modules = [
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(3)
    ]
    states = [module.state_dict() for module in modules]
    expected = (states[0]["0.bias"] + states[1]["0.bias"] + states[2]["0.bias"]) / 3
    merged = pymerge.linear(states)
    assert list(merged) == list(states[0])
    assert merged["1.num_batches_tracked"].dtype == torch.int64
    modules[0].load_state_dict(merged)
    assert torch.equal(modules[0].state_dict()["0.bias"], expected)


def test_many_entries_of_a_list_keep_their_order() -> None:
    values = [torch.tensor([float(k)]) for k in range(25)]
    merged = pymerge.linear([values, values])
    assert [float(tensor) for tensor in merged] == list(range(25))
    assert pymerge.linear([[], []]) == []
    assert pymerge.linear([{}, {}]) == {}


# memory


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("method", METHODS)
def test_any_memory_layout(method: str, identifier: str, use_backend: Callable[[str], str]) -> None:
    """Strided, transposed, expanded, misaligned, and with a gradient: the same, and unchanged."""
    backend = use_backend(identifier)
    tensors = draw((33, 17))
    expected = call(method, tensors[0], tensors[1:], backend="reference")

    def misaligned(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.zeros(tensor.numel() * 4 + 1, dtype=torch.uint8)
        memory[1:] = tensor.reshape(-1).view(torch.uint8)
        return torch.from_numpy(memory.numpy()[1:].view(np.float32)).view(tensor.shape)

    layouts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda t: t.t().contiguous().t(),
        "strided": lambda t: torch.stack([t, t + 9], dim=-1)[..., 0],
        "offset": lambda t: torch.cat([torch.zeros(1), t.reshape(-1)])[1:].view(t.shape),
        "misaligned": misaligned,
        "gradient": lambda t: t.clone().requires_grad_(),
        "parameter": torch.nn.Parameter,
    }
    for name, layout in layouts.items():
        given = [layout(tensor.clone()) for tensor in tensors]
        before = [tensor.detach().clone() for tensor in given]
        merged = call(method, given[0], given[1:], backend=backend)
        assert torch.equal(merged, expected), name
        assert merged.is_contiguous()
        assert not merged.requires_grad
        assert type(merged) is torch.Tensor
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), name
        mixed = call(method, given[0], tensors[1:], backend=backend)
        assert torch.equal(mixed, expected), name
    wide = torch.randn(1, 20).expand(6, 20)
    assert torch.equal(call(method, wide, [wide, wide], backend=backend), wide)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_shared_with_the_inputs(method: str) -> None:
    base, *tuned = draw(count=1)
    merged = call(method, base, tuned)
    before = [base.clone(), tuned[0].clone()]
    merged.fill_(7)
    assert torch.equal(base, before[0])
    assert torch.equal(tuned[0], before[1])
    integers = torch.arange(5)
    copied = call(method, [base, integers], [[tuned[0], integers]])[1]
    copied.fill_(0)
    assert integers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_stay_tied(method: str) -> None:
    base, *tuned = draw(count=2)
    state = {"a": base, "b": base}
    tied = call(method, state, [{"b": t, "a": t} for t in tuned])
    assert tied["a"].data_ptr() == tied["b"].data_ptr()
    # in the models after the first, equal content is as good as shared memory
    first, second = {"a": tuned[0], "b": tuned[0]}, {"a": tuned[1], "b": tuned[1].clone()}
    tied = call(method, state, [first, second])
    assert tied["a"].data_ptr() == tied["b"].data_ptr()
    # but where a model has trained them apart, they are apart
    apart = call(method, state, [first, {"a": tuned[0], "b": tuned[1]}])
    assert apart["a"].data_ptr() != apart["b"].data_ptr()
    assert not torch.equal(apart["a"], apart["b"])
    # and views of one memory that differ are not the same tensor
    split = call(
        method, {"a": base[:20], "b": base[20:]}, [{"a": t[:20], "b": t[20:]} for t in tuned]
    )
    assert split["a"].data_ptr() != split["b"].data_ptr()


# shapes, dtypes, numbers of models


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("method", METHODS)
def test_sizes(method: str, identifier: str, use_backend: Callable[[str], str]) -> None:
    backend = use_backend(identifier)
    for shape in [(), (0,), (0, 3), (1,), (15,), (16,), (17,), (1023,), (4097,), (2, 3, 4, 5)]:
        for count in (1, 2, 17):
            base, *tuned = draw(shape, count, seed=count)
            merged = call(method, base, tuned, backend=backend)
            assert merged.shape == shape
            expected = call(method, base, tuned, backend="reference")
            assert torch.equal(merged, expected), (shape, count)
            assert bool(torch.isfinite(merged).all())


FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_dtypes(method: str, dtype: torch.dtype | None) -> None:
    """The base's dtype unless dtype= says otherwise; models may be of any; cpu equals reference."""
    for kind in FLOATS:
        base, *tuned = draw(count=4)
        base = base.to(kind)
        tuned = [tensor.to(other) for tensor, other in zip(tuned, FLOATS, strict=True)]
        merged = call(method, base, tuned, dtype=dtype, backend="cpu")
        leader = tuned[0].dtype if method == "linear" else kind
        assert merged.dtype == (dtype or leader)
        assert torch.equal(merged, call(method, base, tuned, dtype=dtype, backend="reference"))
        exact = call(method, base.double(), [t.double() for t in tuned])
        torch.testing.assert_close(merged.double(), exact, rtol=1e-2, atol=1e-2)


def test_float64_is_computed_in_float64() -> None:
    tiny = 1.0 + 2.0**-40
    one, other = torch.ones(3, dtype=torch.float64), torch.full((3,), tiny, dtype=torch.float64)
    for backend in ("cpu", "reference"):
        assert pymerge.linear([one, other], backend=backend).tolist() == [1.0 + 2.0**-41] * 3
        assert pymerge.task_arithmetic(one, [other], backend=backend).tolist() == [tiny] * 3
        merged = pymerge.ties_merge(one, [other], density=1.0, backend=backend)
        assert merged.tolist() == [tiny] * 3
    # float32 inputs are when the result is to be
    thirds = [torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0])]
    assert float(pymerge.linear(thirds, dtype=torch.float64)) == 1 / 3


@pytest.mark.parametrize("method", METHODS)
def test_integers_must_be_equal(method: str) -> None:
    base, *tuned = draw((3,), count=2)
    for values in (torch.arange(6).view(2, 3), torch.tensor([True, False]), torch.tensor(7)):
        state = {"w": base, "n": values}
        merged = call(method, state, [{"w": t, "n": values.clone()} for t in tuned])
        assert torch.equal(merged["n"], values)
        assert merged["n"].dtype == values.dtype
        other = values.clone()
        other.view(-1)[-1] = not other.view(-1)[-1]
        with pytest.raises(
            pymerge.RequestError,
            match=rf"models\[1\]: tensor\['n'\] is of dtype {values.dtype} and must equal that of "
            rf".*at flat index {values.numel() - 1} it has",
        ):
            call(method, state, [{"w": tuned[0], "n": values}, {"w": tuned[1], "n": other}])


# NaN and infinity


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite(
    method: str, identifier: str, use_backend: Callable[[str], str]
) -> None:
    backend = use_backend(identifier)
    for value in (float("nan"), float("inf")):
        for place in range(4 if method != "linear" else 3):
            tensors = draw((100,))
            spoiled = tensors[::-1] if method == "linear" else [*tensors[1:], tensors[0]]
            spoiled[place][61] = value
            label = f"models[{place}]" if place < 3 else "base"
            if method == "linear":
                tensors = [tensors[0], *spoiled[:3]]
            with pytest.raises(pymerge.NonFiniteError) as caught:
                call(method, tensors[0], tensors[1:], backend=backend)
            name = "ties_merge" if method == "ties" else method
            expected = f"{name}: {label}: the tensor holds {value} at flat index 61; "
            assert str(caught.value).startswith(expected)
            with pytest.raises(pymerge.NonFiniteError, match=r"tensor\['w'\] holds"):
                call(method, {"w": tensors[0]}, [{"w": t} for t in tensors[1:]], backend=backend)
            kept = call(method, tensors[0], tensors[1:], nan="keep", backend=backend)
            reference = call(method, tensors[0], tensors[1:], nan="keep", backend="reference")
            assert torch.equal(kept.nan_to_num(nan=5.0), reference.nan_to_num(nan=5.0))


# backends


def test_backends() -> None:
    base, *tuned = draw()
    merged = [
        pymerge.ties_merge(base, tuned, backend=b) for b in (None, "auto", "cpu", "reference")
    ]
    assert all(torch.equal(merged[0], other) for other in merged)
    with pytest.raises(pymerge.RequestError, match="got 'cpuu'; did you mean 'cpu'"):
        pymerge.linear(tuned, backend="cpuu")
    for name in ("cuda", "triton"):
        reason = BACKENDS[name].reason()
        if reason is not None:
            with pytest.raises(pymerge.RequestError) as caught:
                pymerge.linear(tuned, backend=name)
            assert str(caught.value) == f"backend: '{name}' is not available: {reason}"


def test_other_devices() -> None:
    """Of meta tensors only shapes and dtypes are merged."""
    meta = torch.empty(3, device="meta")
    for method in METHODS:
        merged = call(method, [meta, meta], [[meta, meta]] * 2, dtype=torch.bfloat16)
        assert merged[0] is not merged[1]
        for tensor in merged:
            assert (tensor.device.type, tensor.shape) == ("meta", (3,))
            assert tensor.dtype == torch.bfloat16
    with pytest.raises(pymerge.RequestError, match="backend: 'cpu' computes on cpu tensors"):
        pymerge.linear([meta, meta], backend="cpu")
    with pytest.raises(
        pymerge.RequestError, match=r"models\[1\] is on meta, expected cpu like models\[0\]"
    ):
        pymerge.linear([torch.zeros(3), meta])


BROKEN = """
import warnings
import torch, pymerge
from pymerge.commands.main import main
models = [torch.zeros(4), torch.ones(4)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert pymerge.linear(models).tolist() == [0.5] * 4
print(*[warning.message for warning in caught])
try:
    pymerge.linear(models, backend="cpu")
except pymerge.RequestError as error:
    print(error)
main(["info"])
"""


@pytest.mark.parametrize("way", ["isa", "missing"])
def test_a_broken_native_library_is_no_hurdle(way: str, tmp_path: Path) -> None:
    """`import` works, auto computes with the reference; the error shows where cpu is asked for."""
    root = str(Path(pymerge.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "COLUMNS": "200"}
    code = BROKEN
    if way == "isa":
        environment["PYMERGE_CPU_ISA"] = "nonsense"
    else:
        code = "import sys; sys.modules['pymerge._C'] = None\n" + BROKEN
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warned, said, *info = done.stdout.splitlines()
    assert warned.startswith("pymerge computes with the slow reference backend: ")
    assert said.startswith("backend: 'cpu' is not available: ")
    hint = "nonsense" if way == "isa" else "the native library could not be loaded"
    assert hint in warned
    assert hint in said
    assert hint in "\n".join(info)
