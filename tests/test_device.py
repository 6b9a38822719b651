"""Merges on a device: the same bytes as on the CPU, with everything ordered.

The device is the processor (tests/host_device.py): what needs a GPU is in tests/test_cuda_merge.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.memory import DeviceSizes
from pymerge.merging.gpu.device import COMPUTE, IN, OUT, Cuda, OutOfDeviceMemory
from pymerge.methods import METHODS
from pymerge.methods.arcee import passes as arcee
from tests import device_merges, models
from tests.adapter_files import factors, projections, save_lora
from tests.device_merges import ROOMY, SMALL, Merge, two
from tests.host_device import HostDevice, Race
from tests.test_data_files import write
from tests.test_engine import METHODS as DIALECTS
from tests.test_methods import number_of_models, parameters_of
from tests.test_ties_restart import family

merge, no_waiting = device_merges.merge, models.no_waiting
pytestmark = [pytest.mark.usefixtures("no_waiting"), pytest.mark.compile]

# Those with kernels, so that they run on a device that runs the CPU's kernels.
NATIVE = [
    name
    for name, spec in METHODS.items()
    if "cpu" in spec.backends and name not in models.NEED_FILES
]


def config_of(root: Path, name: str, count: int) -> dict[str, Any]:
    config = models.config(root, name, count, **parameters_of(name))
    if not METHODS[name].needs_base:
        config.pop("base_model", None)
    return config


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_method(name: str, sizes: DeviceSizes, merge: Merge, tmp_path: Path) -> None:
    """Some tensors of more than a chunk, some of less, of several pieces of output."""
    count = number_of_models(name)
    base, tuned = models.llama(count, coarse=name == "ties", vocabulary=2101, layers=1)
    models.save_family(tmp_path, base, tuned, files=2)
    config = config_of(tmp_path, name, count)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    device = HostDevice()
    report = merge(config, tmp_path / "out", device, sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert report.device == "cuda:0 (the processor)"
    assert set(report.backends.values()) == {"cpu"}
    assert report.why.startswith("the device was asked for")
    assert device.copied[OUT] > 0.9 * report.output.bytes


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_of_ties(name: str, sizes: DeviceSizes, merge: Merge, tmp_path: Path) -> None:
    """Order statistics over tensors and models, exact positions, votes of zero, restarts."""
    base, tuned = models.llama(3, coarse=True, vocabulary=2101, layers=1)
    models.save_family(tmp_path, base, tuned)
    arguments = dict(DIALECTS[name])
    config = models.config(tmp_path, arguments.pop("method"), 3, **arguments)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    merge(config, tmp_path / "out", HostDevice(), sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
def test_a_sign_that_was_guessed_wrong(sizes: DeviceSizes, merge: Merge, tmp_path: Path) -> None:
    """Everything is computed, and comes back, a second time."""
    base, tuned = family(1, short=600, least=0)
    for k, state in enumerate((base, *tuned)):
        state["m.large.weight"] = torch.zeros(1000, 70)  # larger than a chunk, so that it may stay
        if k > 0:
            state["m.large.weight"][::5] = 3.0
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "ties", 3, semantics="official", density=0.9)
    report = pymerge.merge_checkpoints(config, tmp_path / "cpu")
    one_merge = sum(tensor.nbytes for state in (base, *tuned) for tensor in state.values())
    assert report.phases["ties"].bytes == 2 * one_merge
    device = HostDevice()
    merge(config, tmp_path / "out", device, sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert device.copied[OUT] == 2 * sum(tensor.nbytes for tensor in base.values())


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
def test_models_with_adapters(sizes: DeviceSizes, merge: Merge, tmp_path: Path) -> None:
    """Weights that are computed when they are loaded, not views of files."""
    base, _ = models.llama(1, vocabulary=2101, layers=1)
    models.save(tmp_path / "base", base)
    for k in range(2):
        save_lora(tmp_path / f"a{k}", factors(projections(base), seed=k))
    config = models.config(tmp_path, "ties", 2, density=0.3, semantics="official")
    for k, entry in enumerate(config["models"]):
        entry["model"] = f"{tmp_path}/base+{tmp_path}/a{k}"
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    merge(config, tmp_path / "out", HostDevice(), sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
def test_rows_of_any_length(
    sizes: DeviceSizes, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arcee Fusion: rows longer than a tile, and more rows than there is room for."""
    generator = torch.Generator().manual_seed(0)
    # Each of more than a selection holds at once.
    shapes = {"long": (3, 30_000), "row": (70_000,), "short": (30_001, 3), "none": (0, 4)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.items()
    }
    models.save_family(tmp_path, base, [tuned])
    config = models.config(tmp_path, "arcee_fusion", 1, semantics="exact")
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    monkeypatch.setattr(arcee, "TILE", 1 << 12)
    monkeypatch.setattr(arcee, "_KEPT", 100)
    merge(config, tmp_path / "out", HostDevice(), sizes)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")


def test_rows_longer_than_the_tiles_of_a_device(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later steps of a row's divergence read what earlier ones found, in every tile."""
    generator = torch.Generator().manual_seed(1)
    base = {"long": torch.randn(2, 140_000, generator=generator)}
    tuned = {"long": base["long"] + 0.1 * torch.randn(2, 140_000, generator=generator)}
    models.save_family(tmp_path, base, [tuned])
    config = models.config(tmp_path, "arcee_fusion", 1, semantics="exact")
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    monkeypatch.setattr(arcee, "TILE", 1 << 17)
    merge(config, tmp_path / "out", HostDevice(), SMALL)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")


def test_a_dialect_on_torch_is_computed_on_the_cpu(merge: Merge, tmp_path: Path) -> None:
    base, tuned = models.llama(1, vocabulary=64, layers=1)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "arcee_fusion", 1, semantics="mergekit")
    report = merge(config, tmp_path / "out", HostDevice())
    assert report.device == "cpu"
    assert report.backend == "reference"
    (warning, _) = report.warnings
    assert warning.startswith("arcee_fusion with semantics 'mergekit' is computed on the CPU")


def test_tensors_stay_while_they_are_needed_again(merge: Merge, tmp_path: Path) -> None:
    """Tensors that fit are copied once, however many passes there are."""
    base, tuned = models.llama(2, vocabulary=2101, layers=1)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "ties", 2, density=0.3, semantics="official")
    copied = []
    for number, sizes in enumerate((SMALL, replace(SMALL, resident_bytes=1 << 20), ROOMY)):
        device = HostDevice()
        merge(config, tmp_path / str(number), device, sizes)
        copied.append(device.copied[IN])
    assert copied[0] > copied[1] > copied[2] > 0
    found = [models.weight_bytes(tmp_path / str(number)) for number in range(3)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("count", [1, 2, 5, 17])
@pytest.mark.parametrize(
    "kinds",
    [
        (torch.float32,),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ],
    ids=["f32", "mixed", "halves", "f64"],
)
def test_dtypes_and_numbers_of_models(
    kinds: tuple[torch.dtype, ...], count: int, merge: Merge, tmp_path: Path
) -> None:
    base, tuned = models.llama(count, torch.float32, vocabulary=40, layers=1, mlp=32)
    states = [
        {name: t.to(kinds[k % len(kinds)]) if t.is_floating_point() else t for name, t in s.items()}
        for k, s in enumerate([base, *tuned])
    ]
    states[0]["large.weight"] = torch.linspace(-1, 1, 70_001).to(kinds[0])
    for k, state in enumerate(states[1:], 1):
        kind = kinds[k % len(kinds)]
        state["large.weight"] = (torch.linspace(-1, 1, 70_001) * (1 + 0.1 * k)).sin().to(kind)
    models.save_family(tmp_path, states[0], states[1:])
    requests: dict[str, dict[str, Any]] = {
        "linear": {},
        "ties": {"density": 0.3, "semantics": "official", "exact_k": True},
        "dare_ties": {"density": 0.5, "rescale": "l1"},
        "magmax": {},
    }
    for name, parameters in requests.items():
        config = models.config(tmp_path, name, count, **parameters)
        pymerge.merge_checkpoints(config, tmp_path / f"{name}-cpu")
        merge(config, tmp_path / name, HostDevice(), SMALL)
        expected = models.weight_bytes(tmp_path / f"{name}-cpu")
        assert models.weight_bytes(tmp_path / name) == expected, name


@pytest.mark.parametrize("what", ["wait", "finish"])
@pytest.mark.parametrize("actor", [IN, COMPUTE, OUT])
def test_every_wait_is_needed(
    what: str, actor: str, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the waits of one stream, or those of the host for one, a race is found."""
    if what == "finish" and actor == COMPUTE:
        pytest.skip("the host waits for copies alone")
    device = HostDevice()
    original = getattr(device, what)

    def wait(stream: str, event: Any) -> None:
        if stream != actor:
            original(stream, event)

    def finish(event: Any) -> None:
        if event.stream != actor:
            original(event)

    monkeypatch.setattr(device, what, {"wait": wait, "finish": finish}[what])
    # Results are larger than the buffers, and so is what goes through the chunks.
    with pytest.raises(Race):
        merge(two(tmp_path), tmp_path / "out", device, SMALL)
    assert not (tmp_path / "out").exists()


def test_a_device_without_all_kernels(merge: Merge, tmp_path: Path) -> None:
    """What has none is computed on the host, and the report says so."""
    config = two(tmp_path)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    for number, lacks in enumerate((["ties_"], ["magnitude_histogram_"], ["ties_", "x"])):
        out = tmp_path / str(number)
        sizes = SMALL if number < 2 else ROOMY
        report = merge(config, out, HostDevice(lacks=lacks), sizes)
        assert models.weight_bytes(out) == models.weight_bytes(tmp_path / "cpu")
        assert report.backends[lacks[0]] == "cpu on the host"
        assert "ties_: cpu on the host" in report.summary() or number == 1


def test_methods_without_kernels_run_on_the_cpu(merge: Merge, tmp_path: Path) -> None:
    """Bytes must not depend on the device, which adds up and decomposes in another order."""
    base, tuned = models.llama(2, layers=1, hidden=8, mlp=8, vocabulary=16)
    models.save_family(tmp_path, base, tuned)
    report = merge(models.config(tmp_path, "tsv_m", 2), tmp_path / "out", HostDevice())
    assert report.device == "cpu"
    assert report.why == "no backend has kernels for tsv_m on a GPU"
    assert "tsv_m is computed on the CPU: no backend has kernels for tsv_m" in report.warnings[0]


@pytest.mark.parametrize("sizes", [SMALL, ROOMY], ids=["tiles", "resident"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear", "pcb"])
def test_nan_is_found_and_named(
    name: str, value: float, sizes: DeviceSizes, merge: Merge, tmp_path: Path
) -> None:
    base, tuned = models.llama(2, torch.float32, layers=1, vocabulary=1100)
    tuned[1]["model.embed_tokens.weight"][1099, 3] = value
    models.save_family(tmp_path, base, tuned)
    config = config_of(tmp_path, name, 2)
    expected = rf"m1\): tensor 'model.embed_tokens.weight' holds {value} at flat index 70339"
    with pytest.raises(pymerge.NonFiniteError, match=expected):
        merge(config, tmp_path / "out", HostDevice(), sizes)
    assert not (tmp_path / "out").exists()
    if name == "pcb":
        return  # its statistics would be NaN
    config["parameters"]["nan"] = "keep"
    merge(config, tmp_path / "kept", HostDevice(), sizes)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    kept = models.load(tmp_path / "kept")
    for key, tensor in models.load(tmp_path / "cpu").items():
        assert torch.equal(kept[key].nan_to_num(7.0), tensor.nan_to_num(7.0)), key


def test_flags_of_finite_inputs_do_not_stay(merge: Merge, tmp_path: Path) -> None:
    """A sum beyond the range of float32 raises the flag of NaN, although no input is NaN."""
    state = {f"t{k}": torch.full((5000,), 3e38) for k in range(3)}
    models.save_family(tmp_path, state, [state, state])
    config = models.config(tmp_path, "linear", 2, normalize=False)
    merge(config, tmp_path / "out", HostDevice(), SMALL)
    assert bool(models.load(tmp_path / "out")["t2"].isinf().all())


def test_requests_that_do_not_fit_together(tmp_path: Path) -> None:
    config = two(tmp_path)
    for options, expected in (
        ({"device": "cuda", "backend": "cpu"}, "'cpu' computes on cpu tensors, but these are on"),
        ({"device": "cpu", "backend": "cuda"}, "backend: 'cuda' "),
        ({"device": "cuda", "device_memory": "1G"}, "device_memory: expected a size"),
        ({"device": "cuda:"}, "device: expected auto, cpu, cuda or cuda:N; got 'cuda:'"),
    ):
        with pytest.raises(pymerge.RequestError) as caught:
            pymerge.merge_checkpoints(config, tmp_path / "out", **options)
        assert expected in str(caught.value)


class FakeStream:
    """A stream of torch.cuda that does nothing later."""

    def __init__(self, device: Any = None) -> None:
        assert device is None or device.type == "cuda"

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded is not None


class FakeEvent:
    def __init__(self, blocking: bool = False) -> None:
        self.recorded: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.recorded = stream

    def synchronize(self) -> None:
        assert self.recorded is not None


def test_torch_is_called_as_it_must_be(merge: Merge, tmp_path: Path, monkeypatch: Any) -> None:
    """The class for real devices, over a torch.cuda that is made up."""
    config = two(tmp_path)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    made_up = {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "current_stream": FakeStream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "get_device_name": lambda index: "made up",
        "mem_get_info": lambda device: (1 << 30, 1 << 31),
        "max_memory_reserved": lambda device: 123,
    }
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    device = Cuda(0)
    device._device = torch.device("cpu")
    monkeypatch.setattr(device, "missing", lambda: {"cpu": None})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    report = merge(config, tmp_path / "out", device, SMALL)
    assert models.weight_bytes(tmp_path / "out") == models.weight_bytes(tmp_path / "cpu")
    assert (report.device, report.peak_device) == ("cuda:0 (made up)", 123)
    assert "123 B of the GPU's" in report.summary()


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError])
def test_errors_of_a_device(error: type[Exception]) -> None:
    device = object.__new__(Cuda)
    device._torch, device.title = torch, "cuda:0 (X)"

    def failing(raised: Exception) -> Any:
        def fail() -> None:
            raise raised

        return device.launch(fail, [])

    with pytest.raises(OutOfDeviceMemory, match=r"^Tried to allocate 2 GiB$"):
        failing(error("Tried to allocate 2 GiB. GPU 0 has a total capacity of"))
    with pytest.raises(pymerge.MergeError, match=r"^cuda:0 \(X\): CUDA error: unspecified launch"):
        failing(RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(ValueError, match="refused"):
        failing(ValueError("refused"))


@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec.statistics])
def test_statistics_are_read_from_the_host(name: str, merge: Merge, tmp_path: Path) -> None:
    """No kernels there: the CPU computes, with a warning, or torch where it is asked for."""
    config = write(tmp_path, name)
    pymerge.merge_checkpoints(config, tmp_path / "cpu")
    report = merge(config, tmp_path / "out", HostDevice(), SMALL)
    assert report.device == "cpu"
    assert any("no backend has kernels" in warning for warning in report.warnings)
    merge(config, tmp_path / "asked", HostDevice(), SMALL, backend="reference")
    for out in ("out", "asked"):
        assert models.weight_bytes(tmp_path / out) == models.weight_bytes(tmp_path / "cpu")
