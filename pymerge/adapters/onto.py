"""Merges the deltas of adapters and adds the result to their base: a whole model, streamed.

Nothing is rounded in between: deltas are merged in float32, added to the base, and rounded once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pymerge.adapters.arithmetic import Whole, saved_of
from pymerge.adapters.deltas import DeltaSource
from pymerge.checkpoint import Checkpoint
from pymerge.checkpoint.peft.adapted import bound
from pymerge.checkpoint.peft.adapter import Adapter, Module
from pymerge.config import MergeConfig, load_config
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Work
from pymerge.errors import CheckpointError, MergeError, NonFiniteError, RequestError
from pymerge.memory import PeakMemory, most_bins
from pymerge.merging.card import model_card
from pymerge.merging.progress import Recorder
from pymerge.merging.report import (
    REPORT_NAME,
    InputFile,
    InputReport,
    MergeReport,
    OutputReport,
    package_version,
)
from pymerge.ops.array import Array, Flat, widen
from pymerge.ops.call import call
from pymerge.ops.native import marshal as cpu
from pymerge.ops.runner import Runner
from pymerge.ops.threads import kernel_threads
from pymerge.output import OutputDirectory, ShardWriter, copy_side_files
from pymerge.output.layout import INDEX_NAME
from pymerge.plan import MergePlan, make_plan
from pymerge.plan.parameters import resolve_parameters, unused_filters

__all__ = ["merge_onto_base"]

Tensors = Mapping[str, tuple[Array, tuple[int, ...]]]


def merge_onto_base(
    config: MergeConfig,
    adapters: Sequence[Adapter],
    out: str | os.PathLike[str],
    *,
    saved: Whole = "error",
    dtype: str | None = None,
    seed: int = 0,
    memory: int = 2 << 30,
    shard_size: int = 5_000_000_000,
    threads: int | None = None,
    force: bool = False,
    quiet: bool = True,
) -> MergeReport:
    """Write the base of a configuration with the merged deltas of adapters.

    Args:
        config: method and parameters; its models are the adapters, its base a checkpoint.
        adapters: opened, in the order of the models.
        saved: see `merge_adapters`.
        dtype: name of the output's dtype; default that of each tensor of the base.
        seed: of random masks.
        memory, shard_size, threads: of the writing and of the kernels; see `merge_checkpoints`.

    Raises:
        RequestError, MergeError: as `merge_checkpoints`.
    """
    started = time.monotonic()
    base = str(config.base_model)
    plain: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": base}]}
    if dtype is not None:
        plain["dtype"] = dtype
    inputs = [Path(base), *(one.path for one in adapters if one.path is not None)]
    directory = OutputDirectory(Path(out), force=force, inputs=inputs)
    problems = directory.check()
    with ExitStack() as stack:
        peak = stack.enter_context(PeakMemory())
        recorder = stack.enter_context(Recorder(quiet=quiet))
        recorder.phase("plan", 0)
        try:
            plan = stack.enter_context(
                make_plan(
                    load_config(plain),
                    memory=memory,
                    shard_size=shard_size,
                    threads=threads,
                    seed=seed,
                )
            )
        except RequestError as error:
            raise RequestError([*problems, *error.problems]) from None
        request = _Bound(plan.models[0], config, adapters, saved, problems)
        if problems:
            raise RequestError(problems)
        stack.enter_context(kernel_threads(plan.threads))
        with directory:
            runner = _stream(plan, request, adapters, directory.path, seed, recorder)
            recorder.phase("finish", 0)
            _finish(plan, config, directory.path, Path(out).name)
            result = MergeReport(
                method=config.method.name,
                config=config.raw,
                config_text=config.text,
                seed=seed,
                backend="cpu" if cpu.reason() is None else "reference",
                isa=cpu.build().get("isa"),
                device="cpu",
                threads=plan.threads,
                inputs=_inputs(plan, adapters),
                output=OutputReport(
                    str(Path(out).absolute()),
                    {shard.filename: shard.nbytes for shard in plan.layout.shards},
                    sum(shard.nbytes for shard in plan.layout.shards),
                ),
                tensors=len(plan.tensors),
                parameters=plan.parameters_count,
                phases=recorder.phases,
                seconds=time.monotonic() - started,
                peak_anonymous=peak.anonymous,
                peak_resident=peak.resident,
                warnings=[*request.warnings, *(w for one in adapters for w in one.warnings)],
                backends=dict(sorted(runner.ran.items())),
                why="the deltas of adapters are merged, and added to the base",
            )
            _write(directory.path / REPORT_NAME, result.to_json())
            directory.commit()
        result.warnings += directory.warnings
        recorder.close()
        result.seconds = time.monotonic() - started
        result.peak_anonymous, result.peak_resident = peak.anonymous, peak.resident
    return result


class _Bound:
    """The modules of all adapters, by the tensors of the base; problems are collected."""

    def __init__(
        self,
        base: Checkpoint,
        config: MergeConfig,
        adapters: Sequence[Adapter],
        saved: Whole,
        problems: list[str],
    ) -> None:
        self.spec = config.method
        self.modules: dict[str, Module] = {}
        self.owned: list[dict[str, Module]] = []
        self.whole: dict[str, tuple[Array, tuple[int, ...]]] = {}
        self.warnings: list[str] = list(config.warnings)
        names: dict[str, str] = {}
        for adapter in adapters:
            if adapter.peft_type == "LORA":
                self._bind(adapter, base, names, problems)
            else:
                problems.append(
                    f"{adapter.label}: is IA3, whose deltas depend on the base; merge models with "
                    "their adapters (MODEL+ADAPTER) instead"
                )
        try:
            whole = saved_of(adapters, saved, config.where)
            self.whole = {names[name]: one for name, one in whole.items() if name in names}
        except RequestError as error:
            problems += error.problems
        extra = [name for name in self.whole if name not in base.tensors]
        extra += [name for name in self.whole if name in self.modules]
        if extra:
            problems.append(
                f"{config.where}: '{extra[0]}' is in whole in an adapter and not in the base, or "
                "has a LoRA too; merge models with their adapters (MODEL+ADAPTER) instead"
            )
        self.resolved = resolve_parameters(config, sorted(self.modules), problems)
        self.warnings += unused_filters(config, sorted(self.modules))

    def _bind(
        self, adapter: Adapter, base: Checkpoint, names: dict[str, str], problems: list[str]
    ) -> None:
        try:
            modules, found = bound(adapter, base, adapter.label)
        except CheckpointError as error:
            problems += error.problems
            return
        names.update(found)
        self.owned.append(modules)
        self.modules.update(modules)


class _Source(DeltaSource):
    """Deltas by the names and the orientation of the base."""

    def __init__(self, adapters: Sequence[Adapter], request: _Bound, based: bool) -> None:
        super().__init__(adapters, request.modules, based)
        self._owned = dict(zip(map(id, adapters), request.owned, strict=True))

    def delta(self, adapter: Adapter, name: str) -> np.ndarray | None:
        module = self._owned[id(adapter)].get(name)
        return None if module is None else adapter.delta(module.name, module.transposed)


class _Sum:
    """A sink that adds each merged delta to the base, and copies what lies between."""

    def __init__(
        self, writer: ShardWriter, plan: MergePlan, whole: Tensors, runner: Runner, nan: str
    ) -> None:
        self._writer = writer
        self._plan = plan
        self._base = plan.models[0]
        self._whole = whole
        self._runner = runner
        self._keeps_nan = nan == "keep"
        self._order = list(plan.tensors)
        self._next = 0

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        self._copy_until(name)
        planned = self._plan.tensors[name]
        delta = Array.of(np.empty(planned.numel, np.float32), "F32")
        yield 0, delta
        self._put(name, [self._base.array(name), delta], planned.compute == "F64")

    def restart(self) -> None:
        self._writer.restart()
        self._next = 0

    def finish(self) -> None:
        """Copy the tensors after the last one that is merged."""
        self._copy_until(None)

    def _copy_until(self, name: str | None) -> None:
        while self._next < len(self._order) and self._order[self._next] != name:
            current = self._order[self._next]
            planned = self._plan.tensors[current]
            whole = self._whole.get(current)
            values = self._base.array(current) if whole is None else whole[0]
            if planned.compute is None:
                for start, out in self._writer.pieces(current):
                    out.numpy()[:] = values[start : start + out.numel()].numpy()
            else:
                self._put(current, [values], planned.compute == "F64")
            self._base.release(current)
            self._next += 1
        self._next += 1

    def _put(self, name: str, terms: Sequence[Array], wide: bool) -> None:
        for start, out in self._writer.pieces(name):
            parts = [term[start : start + out.numel()] for term in terms]
            stats = np.zeros(3, np.int64)
            ones = [1.0] * len(parts)
            call("weighted_sum_", out, stats, parts, ones, 1.0, wide=wide, backend=self._runner)
            if stats[0] and not self._keeps_nan:
                _refuse(self._base, name, start, parts[0])


def _refuse(base: Checkpoint, name: str, start: int, part: Array) -> None:
    bad = np.flatnonzero(~np.isfinite(widen(part, True)))
    if bad.size:
        raise NonFiniteError(
            f"{base.label}: tensor '{name}' holds NaN or infinity at flat index "
            f"{start + int(bad[0])}"
        )


def _stream(
    plan: MergePlan,
    request: _Bound,
    adapters: Sequence[Adapter],
    directory: Path,
    seed: int,
    recorder: Recorder,
) -> Runner:
    works = [
        Work(name, planned.numel, False, False, request.resolved[name], module.matrix)
        for name, planned in plan.tensors.items()
        if (module := request.modules.get(name)) is not None
    ]
    spec = request.spec
    source = _Source(adapters, request, spec.with_base(True))
    writer = ShardWriter(directory, plan.layout, slot_bytes=plan.slot_bytes, slots=plan.slots)
    runner = Runner("auto")
    nan = works[0].parameters.get("nan", "error")
    sink = _Sum(writer, plan, request.whole, runner, nan)
    context = Context(
        backend=runner,
        bins=most_bins(len(adapters)),
        nan=nan,
        seed=seed,
        progress=recorder,
    )
    try:
        execute(spec, works, source, sink, context)
        sink.finish()
        recorder.phase("write", 0)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    if plan.layout.index is not None:
        _write(directory / INDEX_NAME, plan.layout.index.decode())
    return runner


def _finish(plan: MergePlan, config: MergeConfig, directory: Path, name: str) -> None:
    dtypes = {tensor.dtype for tensor in plan.tensors.values() if tensor.compute is not None}
    one = dtypes.pop() if len(dtypes) == 1 else None
    copied = copy_side_files(plan.side_files, directory, dtype=one)
    card = model_card(name, config, version=package_version(), side_files=copied)
    _write(directory / "README.md", card)


def _inputs(plan: MergePlan, adapters: Sequence[Adapter]) -> list[InputReport]:
    base = plan.models[0]
    files = [InputFile(path.name, size) for path, size in base.files]
    reports = [InputReport("base_model", str(base.path), files)]
    for adapter in adapters:
        files = [InputFile(path.name, size) for path, size in adapter.files]
        reports.append(InputReport(adapter.label, str(adapter.path), files))
    return reports


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MergeError(f"{path}: cannot be written: {error.strerror or error}") from error
