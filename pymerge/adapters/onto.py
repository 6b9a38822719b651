"""Merges the deltas of adapters and adds the result to their base: a whole model, streamed.

Nothing is rounded in between: deltas are merged in float32, added to the base, and rounded once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pymerge.adapters.arithmetic import Whole, saved_of
from pymerge.adapters.deltas import DeltaSource
from pymerge.checkpoint import Checkpoint
from pymerge.checkpoint.peft.adapted import bound
from pymerge.checkpoint.peft.adapter import Adapter, Module
from pymerge.config import MergeConfig
from pymerge.config.reader import plain_config
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Work
from pymerge.errors import CheckpointError, NonFiniteError, RequestError
from pymerge.memory import most_bins
from pymerge.merging.publish import Publication
from pymerge.merging.report import (
    InputFile,
    InputReport,
    MergeReport,
)
from pymerge.methods.directions.record import PASSTHROUGH
from pymerge.ops.array import Array, Flat, widen
from pymerge.ops.call import call
from pymerge.ops.native import cpu
from pymerge.ops.runner import Runner
from pymerge.ops.threads import kernel_threads
from pymerge.output import ShardWriter
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
        adapters: open adapters, in the order of the models.
        saved: see `merge_adapters`.
        dtype: name of the output's dtype; default that of each tensor of the base.
        seed: of random masks.
        memory, shard_size, threads: as in `merge_checkpoints`.

    Raises:
        RequestError, MergeError: as `merge_checkpoints`.
    """
    base = config.base
    assert base is not None
    inputs = [*(path for path in (base.path, base.adapter) if path is not None)]
    inputs += [str(one.path) for one in adapters if one.path is not None]
    with Publication(out, inputs, force=force, quiet=quiet) as output:
        # Tensors, dtypes, files and memory are those of a copy of the base.
        plan = output.open(
            lambda: make_plan(
                plain_config(PASSTHROUGH, [base], dtype, where=config.where),
                memory=memory,
                shard_size=shard_size,
                threads=threads,
                seed=seed,
            )
        )
        request = None
        if plan is not None:
            request = _Bound(plan.models[0], config, adapters, saved, output.problems)
        output.begin()
        assert plan is not None
        assert request is not None
        output.keep(kernel_threads(plan.threads))
        runner = _stream(plan, request, adapters, output, seed)
        output.describe(plan, config)
        result = output.merge_report(
            plan,
            config,
            backend="cpu" if cpu.reason() is None else "reference",
            isa=cpu.build().get("isa"),
            device="cpu",
            inputs=_inputs(plan, adapters),
            warnings=[*request.warnings, *(w for one in adapters for w in one.warnings)],
            backends=dict(sorted(runner.ran.items())),
            why="the deltas of adapters are merged, and added to the base",
        )
        return output.publish(result)


class _Bound:
    """The modules of all adapters, mapped to the tensors of the base; problems are collected."""

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
    """Deltas with the names and the orientation of the base."""

    def __init__(self, adapters: Sequence[Adapter], request: _Bound, based: bool) -> None:
        super().__init__(adapters, request.modules, based)
        self._owned = dict(zip(map(id, adapters), request.owned, strict=True))

    def delta(self, adapter: Adapter, name: str) -> np.ndarray | None:
        module = self._owned[id(adapter)].get(name)
        return None if module is None else adapter.delta(module.name, module.transposed)


class _Sum:
    """A sink that adds each merged delta to the base, and copies the tensors in between."""

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
        """Copy the tensors after the last merged one."""
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
    output: Publication,
    seed: int,
) -> Runner:
    works = [
        Work(name, planned.numel, False, False, request.resolved[name], module.matrix)
        for name, planned in plan.tensors.items()
        if (module := request.modules.get(name)) is not None
    ]
    spec = request.spec
    source = _Source(adapters, request, spec.with_base(True))
    runner = Runner("auto")
    nan = works[0].parameters.get("nan", "error")
    context = Context(
        backend=runner,
        bins=most_bins(len(adapters)),
        nan=nan,
        seed=seed,
        progress=output.recorder,
    )
    with output.shards(plan.layout, slot_bytes=plan.slot_bytes, slots=plan.slots) as writer:
        sink = _Sum(writer, plan, request.whole, runner, nan)
        execute(spec, works, source, sink, context)
        sink.finish()
    return runner


def _inputs(plan: MergePlan, adapters: Sequence[Adapter]) -> list[InputReport]:
    base = plan.models[0]
    files = [InputFile(path.name, size) for path, size in base.files]
    reports = [InputReport("base_model", str(base.path), files)]
    for adapter in adapters:
        files = [InputFile(path.name, size) for path, size in adapter.files]
        reports.append(InputReport(adapter.label, str(adapter.path), files))
    return reports
