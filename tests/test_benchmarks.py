"""The benchmarks run, and they fail where a result is wrong."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import (
    checkpoints,
    engine,
    gpu_check,
    gpu_rows,
    kernel_checks,
    peers,
    readme_table,
)
from benchmarks.checkpoints import CheckpointSet
from benchmarks.kernels import Kernel, settings_kept
from benchmarks.measure import WrongResult, run_process
from benchmarks.tables import Table, save
from pymerge import merge_checkpoints
from pymerge.ops.native import cpu
from tests.case import Case, Inputs
from tests.cases import CASES, GPU_CASES

NAMES = {case.name: case for case in CASES}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads of torch would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def arrays() -> Inputs:
    return kernel_checks.make_arrays(10_007)


def measured(kernel: Kernel, isa: str, threads: int) -> None:
    """Do what a benchmark does around its clock: the loop, the kernel, the checks."""
    with settings_kept():
        cpu.set_threads(threads)
        kernel.stream(threads)
        cpu.use_isa(isa)
        kernel.clear()
        kernel.call()
        kernel.check(f"{kernel.case.name} on {isa}")
        kernel.check_stream(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_can_be_measured(case: Case, arrays: Inputs) -> None:
    kernel = Kernel(case, arrays)
    assert kernel.nbytes > 0
    assert kernel.loop_bytes > 0
    for threads in (1, 2):
        for isa in cpu.supported_isas():
            measured(kernel, isa, threads)
    assert cpu.threads() == cpu.build()["threads"]


@pytest.mark.parametrize("name", ["linear", "ties_mean_signs", "magnitude_histogram"])
def test_a_wrong_kernel_gives_no_figure(
    name: str, arrays: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(function: str, argument: int, index: tuple[int, ...]) -> None:
        original = getattr(cpu, function)

        def changed(*arguments: object) -> None:
            original(*arguments)
            written = arguments[argument]
            assert isinstance(written, torch.Tensor)
            written[index] += 1

        monkeypatch.setattr(cpu, function, changed)

    if name == "linear":
        wrong("weighted_sum", 0, (10_006,))
    elif name == "ties_mean_signs":
        wrong("ties", 1, (0,))
    else:
        wrong("magnitude_histogram", 0, (0, 1, 3))
    with pytest.raises(WrongResult, match=name):
        measured(Kernel(NAMES[name], arrays), "baseline", 1)


def test_what_the_loop_wrote_is_no_result(arrays: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop before a kernel writes to the same output: a kernel that does nothing is found."""
    monkeypatch.setattr(cpu, "weighted_sum", lambda *arguments: None)
    with pytest.raises(WrongResult, match="linear"):
        measured(Kernel(NAMES["linear"], arrays), "baseline", 1)


def test_a_loop_that_leaves_an_input_out_is_found(
    arrays: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = cpu.streaming_floor
    monkeypatch.setattr(
        cpu,
        "streaming_floor",
        lambda out, base, models, threads: stream(out, base, models[1:], threads),
    )
    with pytest.raises(WrongResult, match="streaming loop"):
        measured(Kernel(NAMES["ties_mean"], arrays), "baseline", 1)


@pytest.mark.parametrize(
    ("name", "tile"),
    [("ties_signs", 1 << 16), ("magnitude_histogram", 1 << 16), ("magnitude_equal_counts", 40_000)],
)
def test_counters_are_put_together_from_tiles(
    name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_checks, "_TILE", tile)
    inputs = kernel_checks.make_arrays(150_001)
    measured(Kernel(NAMES[name], inputs), cpu.supported_isas()[-1], 2)


def test_plain_torch_is_checked(arrays: Inputs) -> None:
    kernel = Kernel(NAMES["linear"], arrays)
    found = kernel.plain_torch()
    kernel.check_plain_torch(found)
    for wrong in (found.float(), arrays[1][0]):
        with pytest.raises(WrongResult, match="plain torch"):
            kernel.check_plain_torch(wrong)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSet:
    root = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return checkpoints.make_checkpoints(root, checkpoints.LLAMA_TINY)


def test_checkpoints_are_sharded_differently_and_repeatable(
    tiny: CheckpointSet, tmp_path: Path
) -> None:
    files = [len(list(path.glob("*.safetensors"))) for path in (tiny.base, *tiny.models)]
    assert len(set(files)) > 2
    again = checkpoints.make_checkpoints(tmp_path / "again", tiny.shape, models=1)
    for path in tiny.models[0].glob("*.safetensors"):
        assert path.read_bytes() == (again.models[0] / path.name).read_bytes()
    linked = checkpoints.make_checkpoints(tmp_path / "linked", tiny.shape, models=3, distinct=2)
    config = linked.models[2] / "config.json"
    assert config.samefile(linked.models[0] / "config.json")


@pytest.mark.parametrize("method", engine.METHODS)
def test_wrong_output_is_found(method: str, tiny: CheckpointSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(engine.make_config(method, tiny), out)
    engine.check_output(method, out, tiny)

    file = out / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name].view(-1)[77] += 0.01
    save_file(tensors, file)
    with pytest.raises(WrongResult, match="q_proj"):
        engine.check_output(method, out, tiny)

    tensors[name] = tensors[name].float()
    save_file(tensors, file)
    with pytest.raises(WrongResult, match="float32"):
        engine.check_output(method, out, tiny)

    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(WrongResult, match="q_proj"):
        engine.check_output(method, out, tiny)


def test_repetitions_must_write_the_same_bytes(tiny: CheckpointSet, tmp_path: Path) -> None:
    out, digests = tmp_path / "out", dict[str, str]()
    merge_checkpoints(engine.make_config("linear", tiny), out)
    engine.check_again("linear", out, tiny, digests)
    engine.check_again("linear", out, tiny, digests)
    tensors = load_file(out / "model.safetensors")
    unsampled = "model.layers.1.self_attn.k_proj.weight"  # the first check alone would not see it
    tensors[unsampled].view(-1)[3] += 0.01
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    engine.check_output("linear", out, tiny)
    with pytest.raises(WrongResult, match="other bytes"):
        engine.check_again("linear", out, tiny, digests)


def test_distinct_checkpoints_have_distinct_exact_deltas(tmp_path: Path) -> None:
    paths = checkpoints.make_distinct_checkpoints(tmp_path, checkpoints.LLAMA_TINY, models=1)
    base, model = peers.Reader(paths.base), peers.Reader(paths.models[0])
    for name in base.names:
        delta = model.get(name) - base.get(name)
        assert torch.equal(base.get(name) + delta, model.get(name))
        assert len(delta.abs().unique()) == delta.numel()


def test_compare_counts_equal_elements(tiny: CheckpointSet, tmp_path: Path) -> None:
    merge_checkpoints(engine.make_config("linear", tiny), tmp_path / "a")
    merge_checkpoints(engine.make_config("task_arithmetic", tiny), tmp_path / "b")
    same = peers.compare(tmp_path / "a", tmp_path / "a")
    assert (same.equal, same.largest) == (tiny.shape.parameters, 0.0)
    other = peers.compare(tmp_path / "a", tmp_path / "b")
    assert other.elements == tiny.shape.parameters
    assert other.share < 0.9
    assert other.largest > 0


def test_one_merge_in_a_process(tiny: CheckpointSet, tmp_path: Path) -> None:
    config = tmp_path / "linear.yml"
    config.write_text(json.dumps(engine.make_config("linear", tiny)))
    merge = engine.merge_once("linear", config, tmp_path / "out")
    engine.check_output("linear", tmp_path / "out", tiny)
    assert 0 < merge.inside < merge.process.wall
    assert merge.process.peak_resident > merge.peak_anonymous > 0
    data = sum(f.stat().st_size for path in tiny.models for f in path.glob("*.safetensors"))
    assert merge.input_bytes == data


def test_a_failing_program_is_an_error_with_its_output() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3.*no such luck"):
        run_process(["sh", "-c", "echo no such luck; exit 3"])


def test_a_terminated_benchmark_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMERGE_BENCH_DIR", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    # The program that is being measured ends the benchmark, and would itself go on.
    program = "kill -TERM $PPID; exec sleep 60"
    started = time.monotonic()

    def measure() -> None:
        with checkpoints.workspace(1) as root:
            (root / "large").write_text("data")
            run_process(["sh", "-c", program])

    with pytest.raises(SystemExit):
        measure()
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_documents_take_their_tables_from_the_newest_results(tmp_path: Path) -> None:
    table = Table("Kernels", ["kernel", "GB/s"], notes=["checked"])
    table.add("linear", "12.3")
    path = save("engine", {"kernels": table}, [], tmp_path)
    path.rename(tmp_path / "engine-2020-01-02.json")
    table.rows = [["linear", "45.6"]]
    save("engine", {"kernels": table}, [], tmp_path)

    tables = readme_table.latest_tables(tmp_path)
    text = "before\n<!-- benchmark:kernels -->\nold\n<!-- /benchmark:kernels -->\nafter\n"
    text += "<!-- benchmark:none -->\nkept\n<!-- /benchmark:none -->\n"
    filled, missing = readme_table.fill(text, tables)
    assert "| linear | 45.6 |" in filled
    assert "12.3" not in filled
    assert "old" not in filled
    assert "kept" in filled
    assert filled.startswith("before\n")
    assert missing == ["none"]
    assert readme_table.fill(filled, tables)[0] == filled


def test_gpu_rows_are_of_every_op() -> None:
    measured = [*gpu_rows.MAIN, *gpu_rows.REST]
    assert len(set(measured)) == len(measured)
    assert {NAMES[name].op for name in measured} == {case.op for case in GPU_CASES}


def bench(tmp_path: Path) -> gpu_rows.Bench:
    return gpu_rows.Bench(gpu_check.Log(tmp_path, 1.0, dry=True), True, 1 << 15)


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "dare_ties",
        "della",
        "sums_gram.rows",
        "sums_dots",
        "packed_sum",
        "packed_dots",
        "pcb_root_scores",
        "row_ranks",
        "divergence_all.rows",
        "arcee_fusion",
    ],
)
def test_gpu_rows_are_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is measured on what it computed; one wrong number and it is not."""
    measure = bench(tmp_path)
    measure.make(2, "bf16")
    measure.row(name, "bf16", "cpu")
    assert [row["op"] for row in measure.log.found["rows"]] == [name]

    call = Case.call

    def wrong(case: Case, outputs: dict[str, Any], *arguments: Any) -> None:
        call(case, outputs, *arguments)
        if "cpu" in arguments:
            next(tensor for key, tensor in outputs.items() if key != "stats").view(-1)[-1] += 1

    monkeypatch.setattr(Case, "call", wrong)
    with pytest.raises(AssertionError, match=f"{name}: wrong"):
        measure.row(name, "bf16", "cpu")
    assert len(measure.log.found["rows"]) == 1


def test_gpu_check_keeps_what_it_found(tmp_path: Path) -> None:
    log = gpu_check.Log(tmp_path, 1.0, dry=True)
    assert log.step("one", lambda: 3) == 3
    assert log.step("two", lambda: 1 // 0) is None
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["failed"] for step in kept["steps"]] == [
        None,
        "ZeroDivisionError: integer division or modulo by zero",
    ]
    assert [gpu_check.aim(name) for name in ("linear", "pcb_root", "ram")] == ["90%", "60%", ""]
