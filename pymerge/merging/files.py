"""Merges checkpoints on disk: plan, stream, and put the result in place, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pymerge.byte_sizes import parse_size
from pymerge.checkpoint import Checkpoint
from pymerge.config import MergeConfig, load_config
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Sink, Source, TensorStatistics, Work
from pymerge.hashing import sha256_of
from pymerge.memory import available_memory
from pymerge.merging.gpu.device import open_device
from pymerge.merging.gpu.place import Place, choose_place
from pymerge.merging.gpu.staged import run_staged
from pymerge.merging.progress import Recorder
from pymerge.merging.publish import Publication
from pymerge.merging.report import InputFile, InputReport, MergeReport
from pymerge.ops.array import Flat
from pymerge.ops.native import cpu
from pymerge.ops.runner import Runner
from pymerge.ops.threads import kernel_threads, torch_threads
from pymerge.plan import MergePlan, make_plan
from pymerge.plan.statistics import StatisticsFile, StatisticsInputs, statistics_paths

__all__ = ["CheckpointSource", "merge_checkpoints"]

_READ_AHEAD = 256 << 20  # bytes requested before they are needed


class CheckpointSource:
    """Inputs that are checkpoints: views of memory-mapped files, read ahead in the announced
    order."""

    def __init__(
        self,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        statistics: StatisticsInputs | None = None,
    ) -> None:
        self._base = base
        self._models = models
        self._statistics = statistics or StatisticsInputs()
        self._all = [*([] if base is None else [base]), *models]
        self.labels = [checkpoint.label for checkpoint in self._all]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pymerge-read-ahead")
        self._order: dict[str, int] = {}
        self._names: list[str] = []
        self._asked = 0  # how many of _names were asked for
        self._ahead = 0  # their bytes that have not been loaded yet

    def describe(self, name: str) -> str:
        return f"tensor {name!r}"

    def nbytes(self, name: str) -> int:
        models = sum(
            (checkpoint.tensors.get(name) or checkpoint.tensors[checkpoint.tied[name]]).nbytes
            for checkpoint in self._all
        )
        return models + self._statistics.nbytes(name)

    def statistics(self, name: str) -> TensorStatistics:
        files = self._statistics
        return TensorStatistics(
            [_array_of(file, name) for file in files.models],
            None if files.base is None else _array_of(files.base, name),
            any(file.record.name_of(name, file.record.transposed) for file in files.models),
            [file.checkpoint.label for file in files.all],
        )

    def announce(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._order = {name: position for position, name in enumerate(self._names)}
        self._asked = self._ahead = 0

    def can_hold(self, nbytes: int) -> bool:
        return nbytes < 0.8 * available_memory()

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        position = self._order.get(name)
        if position is not None:
            self._read_ahead(position)
        base = None if self._base is None else self._base.array(name)
        return base, [model.array(name) for model in self._models]

    def _read_ahead(self, position: int) -> None:
        if position >= self._asked:
            self._asked, self._ahead = position + 1, 0
        while self._asked < len(self._names) and self._ahead < _READ_AHEAD:
            name = self._names[self._asked]
            self._asked += 1
            self._ahead += self.nbytes(name)
            self._reader.submit(self._will_need, name)

    def _will_need(self, name: str) -> None:
        for checkpoint in self._all:
            checkpoint.will_need(name)
        for file, own in self._files_of(name):
            file.checkpoint.will_need(own)

    def _files_of(self, name: str) -> Iterator[tuple[StatisticsFile, str]]:
        for file in self._statistics.all:
            own = file.name_of(name)
            if own is not None:
                yield file, own

    def release(self, name: str) -> None:
        self._ahead = max(0, self._ahead - self.nbytes(name))
        self._reader.submit(self._release, name)

    def _release(self, name: str) -> None:
        for checkpoint in self._all:
            checkpoint.release(name)
        for file, own in self._files_of(name):
            file.checkpoint.release(own)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)


def _array_of(file: StatisticsFile, name: str) -> Flat | None:
    own = file.name_of(name)
    return None if own is None else file.checkpoint.array(own)


def merge_checkpoints(
    config: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    backend: str | None = "auto",
    memory: int | str = "2GiB",
    device_memory: int | str | None = None,
    threads: int | None = None,
    shard_size: int | str = "5GB",
    seed: int = 0,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    quiet: bool = True,
    checksums: bool = False,
    search: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Merge checkpoints as a mergekit-style config says, and write a checkpoint.

    The output directory appears under its name only when it is complete. Its bytes do not depend on
    `device`, `backend`, `threads`, `memory` or the way the inputs are sharded.

    Args:
        config: path of a YAML file, or its content as a mapping.
        out: directory to write; must not exist unless `force`.
        device: "cpu", "cuda" or "cuda:N"; "auto" is the CPU, unless `backend` needs a GPU.
        backend: "auto", "reference", "cpu", "cuda" or "triton".
        memory: bytes of anonymous memory to stay within, or a size such as "2GiB".
        device_memory: the same of a GPU's memory; default half of what is free there.
        threads: of the CPU kernels; default one for each core the process may run on.
        shard_size: bytes of an output file, or a size such as "5GB".
        seed: of random masks; recorded in the report.
        report: also write the report there.
        force: replace an existing `out`.
        quiet: show no progress on stderr.
        checksums: put the SHA-256 of every input file into the report.
        search: what chose the coefficients (`pymerge.search`), for the report and the model card.

    Returns:
        What was merged, from what, how, how long it took and how much memory.

    Raises:
        RequestError: something is wrong with the request or the inputs; lists every problem.
        MergeError: the output could not be written, or a GPU failed.
    """
    # Who has a configuration already gives that.
    settings = config if isinstance(config, MergeConfig) else load_config(config)
    budget = None if device_memory is None else parse_size(device_memory, "device_memory")
    inputs = [*settings.paths, *statistics_paths(settings)]
    with Publication(out, inputs, force=force, quiet=quiet, report=report) as output:
        place = output.collect(
            lambda: choose_place(settings.dialect, device, backend, open_device)
        ) or Place("reference", None, "")
        plan = output.open(
            lambda: make_plan(
                settings,
                memory=parse_size(memory, "memory"),
                shard_size=parse_size(shard_size, "shard_size"),
                threads=threads,
                seed=seed,
                device="cpu" if place.device is None else place.device.name,
                device_memory=budget,
            )
        )
        output.begin()
        assert plan is not None
        input_reports = _describe_inputs(plan, output.recorder if checksums else None)
        output.keep(kernel_threads(plan.threads))
        if place.backend == "reference" or place.device is not None:
            output.keep(torch_threads(plan.threads))
        runner = _stream(plan, output, place)
        output.describe(plan, settings, search)
        result = output.merge_report(
            plan,
            settings,
            backend=_who_ran(place, runner),
            isa=cpu.build().get("isa") if place.backend == "cpu" else None,
            device="cpu" if place.device is None else place.device.title,
            inputs=input_reports,
            warnings=[*plan.warnings, *place.warnings],
            backends=dict(sorted(runner.ran.items())),
            why=place.why,
            peak_device=0 if place.device is None else place.device.peak(),
            search=None if search is None else dict(search),
        )
        return output.publish(result)


def _stream(plan: MergePlan, output: Publication, place: Place) -> Runner:
    """Compute and write all tensors; return what ran."""
    works = [
        Work(
            tensor.name,
            tensor.numel,
            tensor.compute == "F64",
            tensor.compute is None,
            tensor.parameters,
            tensor.shape,
        )
        for tensor in plan.tensors.values()
    ]
    nan = next((work.parameters["nan"] for work in works if not work.copied), "error")

    def run(runner: Runner, source: Source, sink: Sink) -> None:
        context = Context(
            backend=runner,
            bins=plan.memory.histogram_bins or 1,
            sample=plan.memory.sample_elements or 1,
            nan=nan,
            seed=plan.seed,
            solvers=plan.memory.solvers,
            progress=output.recorder,
        )
        execute(plan.config.method, works, source, sink, context)

    source = CheckpointSource(plan.base, plan.models, plan.statistics)
    runner = Runner(place.ops or place.backend)
    try:
        with output.shards(plan.layout, slot_bytes=plan.slot_bytes, slots=plan.slots) as writer:
            if place.device is None:
                run(runner, source, writer)
            else:
                runner = run_staged(place.device, place.backend, plan, run, source, writer)
    finally:
        source.close()
    return runner


def _who_ran(place: Place, runner: Runner) -> str:
    """Return the backend, or the backends of a device where none was named."""
    if place.device is None or place.backend != "auto":
        return place.backend
    return ", ".join(sorted(set(runner.ran.values()))) or "auto"


def _describe_inputs(plan: MergePlan, recorder: Recorder | None) -> list[InputReport]:
    """List the input files; with a recorder, hash them."""
    if recorder is not None:
        recorder.phase("checksums", sum(size for c in plan.inputs for _, size in c.files))
    known: dict[Path, str] = {}
    reports = []
    for checkpoint in plan.inputs:
        files = []
        for path, size in checkpoint.files:
            if recorder is not None and path not in known:
                known[path] = sha256_of(path, recorder.advance)
            files.append(InputFile(path.name, size, known.get(path)))
        reports.append(InputReport(checkpoint.label, str(checkpoint.path), files))
    return reports
