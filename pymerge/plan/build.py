"""Builds the plan of a merge from a configuration and the headers of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pymerge.checkpoint import TensorInfo
from pymerge.config import MergeConfig
from pymerge.dtypes import FLOATS
from pymerge.errors import RequestError
from pymerge.memory import MemoryPlan, default_threads, plan_memory
from pymerge.output import OutputTensor, plan_layout
from pymerge.plan.inputs import Inputs, folded_bytes, header, open_inputs
from pymerge.plan.parameters import (
    StepCounter,
    passes_text,
    resolve_parameters,
    unused_filters,
)
from pymerge.plan.records import MergePlan, PlannedTensor
from pymerge.plan.statistics import (
    StatisticsInputs,
    largest_system,
    matrix_bytes,
    open_statistics,
)

__all__ = ["make_plan"]


def make_plan(
    config: MergeConfig,
    *,
    memory: int = 2 << 30,
    shard_size: int = 5_000_000_000,
    threads: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    device_memory: int | None = None,
) -> MergePlan:
    """Plan a merge: open all checkpoints, check everything, read no tensor.

    Args:
        config: from `load_config`.
        memory: bytes of anonymous memory that the merge may take.
        shard_size: bytes of an output file; a larger tensor gets a file of its own.
        threads: compute threads; default one per processor.
        seed: for random masks, 0 <= seed < 2**63.
        device: "cpu", or the GPU that computes, "cuda" or "cuda:N"; it is not accessed.
        device_memory: bytes of the GPU's memory that the merge may take; default half of what is
            free when it begins.

    Raises:
        RequestError: listing every problem of the request and of all inputs.
    """
    problems = _check_numbers(memory, shard_size, threads, seed)
    threads = threads or default_threads()
    based = config.method.with_base(config.base is not None)
    base, like = (config.base, None) if based else (None, config.base)
    inputs = open_inputs(config.models, base, like=like, where=config.where)
    statistics = StatisticsInputs()
    try:
        statistics = open_statistics(config, inputs)
        problems += inputs.problems + statistics.problems
        counter = _count_passes(config, inputs)
        planned = _plan_tensors(config, inputs, counter, problems)
        computed = [tensor for tensor in planned if tensor.compute is not None]
        selects = any(counter.selects(tensor.parameters, tensor.numel) for tensor in computed)
        staged = device != "cpu"
        system = largest_system(config, inputs, statistics)
        folded = folded_bytes(inputs)
        fitted = _fit_memory(config, memory, threads, selects, staged, system, folded, problems)
        if problems or fitted is None:
            raise RequestError(problems)
        layout = plan_layout(
            [OutputTensor(tensor.name, tensor.dtype, tensor.shape) for tensor in planned],
            shard_size,
        )
        passes = max(tensor.passes for tensor in planned)
        most = max(tensor.most_passes for tensor in planned)
        by_name = {tensor.name: tensor for tensor in planned}
        tensors = {name: by_name[name] for name in layout.order}
        return MergePlan(
            config=config,
            base=inputs.base,
            models=inputs.models,
            side_files=Path(config.side_files_from),
            tensors=tensors,
            layout=layout,
            passes=passes,
            most_passes=most,
            passes_text=passes_text(
                (counter.steps(tensor.parameters, tensor.numel) for tensor in computed),
                passes,
                most,
            ),
            bytes_to_read=_bytes_to_read(inputs, statistics, counter, planned, "passes"),
            most_bytes_to_read=_bytes_to_read(inputs, statistics, counter, planned, "most_passes"),
            bytes_to_write=sum(shard.nbytes for shard in layout.shards),
            memory=fitted,
            threads=threads,
            seed=seed,
            device=device,
            device_memory=device_memory,
            warnings=[
                *config.warnings,
                *inputs.warnings,
                *statistics.warnings,
                *unused_filters(config, list(tensors)),
            ],
            statistics=statistics,
        )
    except BaseException:
        inputs.close()
        statistics.close()
        raise


def _check_numbers(memory: int, shard_size: int, threads: int | None, seed: int) -> list[str]:
    problems: list[str] = []
    for name, value in (("memory", memory), ("shard_size", shard_size)):
        if value < 1:
            problems.append(f"{name}: expected a positive number of bytes, got {value}")
    if threads is not None and threads < 1:
        problems.append(f"threads: expected at least 1, got {threads}")
    if not 0 <= seed < 2**63:
        problems.append(f"seed: expected an integer in [0, 2**63), got {seed}")
    return problems


def _count_passes(config: MergeConfig, inputs: Inputs) -> StepCounter:
    infos = {} if inputs.reference is None else inputs.reference.tensors
    return StepCounter(
        config.method, sum(info.numel for info in infos.values() if info.dtype in FLOATS)
    )


def _plan_tensors(
    config: MergeConfig, inputs: Inputs, counter: StepCounter, problems: list[str]
) -> list[PlannedTensor]:
    """Return the output's tensors; those that could not be planned are in `problems`."""
    if inputs.reference is None:
        # Without a model that provides the names, settings can still be checked for consistency.
        if not any(clause.filter is not None for clause in config.clauses()):
            resolve_parameters(config, ["*"], problems)
        return []
    infos = inputs.reference.tensors
    computed = {name: info for name, info in infos.items() if info.dtype in FLOATS}
    resolved = resolve_parameters(config, list(computed), problems)
    planned: list[PlannedTensor] = []
    for name, info in infos.items():
        if name not in computed:
            planned.append(PlannedTensor(name, info.dtype, info.shape, None, {}))
        elif name in resolved:
            dtype, compute = _dtypes(config, _dtypes_of(inputs, name))
            parameters = resolved[name]
            passes = counter.passes(parameters, info.numel)
            most = counter.most_passes(parameters, info.numel, compute == "F64")
            shape = info.shape
            planned.append(PlannedTensor(name, dtype, shape, compute, parameters, passes, most))
    return planned


def _dtypes_of(inputs: Inputs, name: str) -> list[str]:
    """Return the dtypes of a tensor in all checkpoints in which it is a float."""
    return [info.dtype for info in _headers(inputs, name) if info.dtype in FLOATS]


def _headers(inputs: Inputs, name: str) -> list[TensorInfo]:
    return [
        header(checkpoint, name)
        for checkpoint in inputs.all
        if name in checkpoint.tensors or name in checkpoint.tied
    ]


def _dtypes(config: MergeConfig, dtypes: list[str]) -> tuple[str, Literal["F32", "F64"]]:
    """Return the dtype of the output and that of the arithmetic."""
    compute = "F64" if "F64" in (*dtypes, config.dtype, config.out_dtype) else "F32"
    if config.out_dtype is not None:
        return config.out_dtype, compute
    if config.dtype is not None:
        return config.dtype, compute
    # neither F16 nor BF16 can represent the other
    if "F16" in dtypes and "BF16" in dtypes:
        dtypes = [*dtypes, "F32"]
    return max(dtypes, key=FLOATS.index), compute


def _fit_memory(
    config: MergeConfig,
    memory: int,
    threads: int,
    selects: bool,
    staged: bool,
    system: tuple[int, int] | None,
    folded: int,
    problems: list[str],
) -> MemoryPlan | None:
    found: list[str] = []

    def fitted(solvers: int) -> MemoryPlan | None:
        try:
            return plan_memory(
                memory,
                models=len(config.models),
                threads=threads,
                selects=selects,
                staged=staged,
                matrices=0 if system is None else matrix_bytes(*system, solvers),
                solvers=solvers,
                folded=folded,
            )
        except RequestError as error:
            found[:] = error.problems
            return None

    # As many threads solve the largest system at once as memory allows.
    attempts = (fitted(count) for count in ([0] if system is None else range(threads, 0, -1)))
    plan = next((plan for plan in attempts if plan is not None), None)
    problems += [] if plan is not None else found
    return plan


def _bytes_to_read(
    inputs: Inputs,
    statistics: StatisticsInputs,
    counter: StepCounter,
    planned: list[PlannedTensor],
    passes: Literal["passes", "most_passes"],
) -> int:
    models = sum(
        info.nbytes * getattr(tensor, passes)
        for tensor in planned
        for info in _headers(inputs, tensor.name)
    )
    extra = sum(
        statistics.nbytes(tensor.name) * counter.statistics_passes(tensor.parameters, tensor.numel)
        for tensor in planned
        if tensor.compute is not None
    )
    return models + extra
