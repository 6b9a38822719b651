"""Opens the files of statistics that a method needs beside its models; headers only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod

from pymerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from pymerge.checkpoint.statistics import (
    StatisticsRecord,
    filename_of,
    foreign_problem,
    kind_problem,
    shape_problem,
)
from pymerge.config import MergeConfig
from pymerge.dtypes import FLOATS
from pymerge.errors import RequestError, listed
from pymerge.ops.constants import SOLVED_AT_ONCE
from pymerge.plan.inputs import Inputs, check_exists, header

__all__ = [
    "StatisticsFile",
    "StatisticsInputs",
    "largest_system",
    "matrix_bytes",
    "open_statistics",
    "statistics_paths",
]


@dataclass
class StatisticsFile:
    """An open file of statistics, and its description of itself."""

    checkpoint: Checkpoint
    record: StatisticsRecord

    def name_of(self, tensor: str) -> str | None:
        """Return the name under which the file has a model's tensor, or None."""
        return self.record.name_of(tensor, self.checkpoint.tensors)

    def info(self, tensor: str) -> TensorInfo | None:
        name = self.name_of(tensor)
        return None if name is None else self.checkpoint.tensors[name]


@dataclass
class StatisticsInputs:
    """The statistics of each model, in their order, and those of the base."""

    models: list[StatisticsFile] = field(default_factory=list)
    base: StatisticsFile | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[StatisticsFile]:
        return [*([] if self.base is None else [self.base]), *self.models]

    def nbytes(self, tensor: str) -> int:
        """Return the bytes of all statistics of a tensor."""
        infos = [file.info(tensor) for file in self.all]
        return sum(info.nbytes for info in infos if info is not None)

    def close(self) -> None:
        for file in self.all:
            file.checkpoint.close()


def statistics_paths(config: MergeConfig) -> list[str]:
    """Return the files of statistics that a configuration names, those of the base first."""
    if config.method.statistics is None:
        return []
    base = config.parameters.get("base_statistics")
    given = [] if base is None else [base.value_for("")]
    for entry in config.models:
        setting = entry.parameters.get("statistics") or config.parameters.get("statistics")
        given.append(None if setting is None else setting.value_for(""))
    return [located(path, config.method.statistics) for path in given if path is not None]


def located(path: str, kind: str) -> str:
    """Return the file that a path refers to: for a directory, `fisher.safetensors` or
    `gram.safetensors` in it."""
    return os.path.join(path, filename_of(kind)) if os.path.isdir(path) else path


def open_statistics(config: MergeConfig, inputs: Inputs) -> StatisticsInputs:
    """Open the files that the configuration names, and compare them with the models, collecting
    problems."""
    found = StatisticsInputs()
    kind = config.method.statistics
    if kind is None:
        return found
    try:
        setting = config.parameters.get("base_statistics")
        if setting is not None:
            name = "base_statistics"
            found.base = _open(setting.value_for(""), name, setting.where, found, config)
        complete = True
        for entry in config.models:
            setting = entry.parameters.get("statistics") or config.parameters.get("statistics")
            if setting is None:
                complete = False
                found.problems.append(
                    f"{entry.where}: 'statistics' is missing under 'parameters'; {kind} statistics "
                    f"of the model are needed (`pymerge collect`, pymerge.collect_{kind})"
                )
                continue
            name = f"{entry.name}.statistics"
            file = _open(setting.value_for(""), name, setting.where, found, config)
            complete = complete and file is not None
            if file is not None:
                found.models.append(file)
        if inputs.reference is not None:
            for file in found.all:
                _compare(file, inputs.reference, found)
            if complete:
                _check_coverage(found, inputs.reference)
    except BaseException:
        found.close()
        raise
    return found


def _open(
    path: str, name: str, where: str, found: StatisticsInputs, config: MergeConfig
) -> StatisticsFile | None:
    kind = str(config.method.statistics)
    path = located(path, kind)
    if not check_exists(path, where, found.problems, config.where):
        return None
    label = f"{name} ({path})"
    try:
        checkpoint = open_checkpoint(path, label)
    except RequestError as error:
        found.problems += error.problems
        return None
    except OSError as error:
        found.problems.append(f"{label}: cannot read: {error.strerror or error}")
        return None
    try:
        record = StatisticsRecord.from_metadata(checkpoint.metadata, label)
        problem = kind_problem(record, kind, config.method.name)
        if problem is not None:
            raise RequestError(f"{label}: {problem}")
    except RequestError as error:
        found.problems += error.problems
        checkpoint.close()
        return None
    return StatisticsFile(checkpoint, record)


def _compare(file: StatisticsFile, reference: Checkpoint, found: StatisticsInputs) -> None:
    """Report statistics of tensors that the model does not have, or that have another shape."""
    label, record = file.checkpoint.label, file.record
    names: dict[str, list[str]] = {name: [name] for name in file.checkpoint.tensors}
    for alias, name in record.aliases.items():
        names.setdefault(name, [name]).append(alias)
    foreign: list[str] = []
    for name, info in file.checkpoint.tensors.items():
        if info.dtype not in FLOATS:
            found.problems.append(f"{label}: '{name}' has dtype {info.dtype}, expected F32")
        own = [n for n in names[name] if n in reference.tensors or n in reference.tied]
        if not own:
            foreign.append(name)
            continue
        wanted = header(reference, own[0]).shape
        problem = shape_problem(record, name, info.shape, wanted)
        if problem is not None:
            found.problems.append(f"{label}: '{name}' {problem} of {reference.label}")
    if foreign:
        known = [*reference.tensors, *reference.tied]
        text = foreign_problem(foreign, len(file.checkpoint.tensors), reference.label, known)
        found.problems.append(f"{label}: {text}")


def _check_coverage(found: StatisticsInputs, reference: Checkpoint) -> None:
    """Report a tensor for which some models have statistics and others do not; if none has any,
    it is a plain average."""
    averaged: list[str] = []
    for name, info in reference.tensors.items():
        if info.dtype not in FLOATS:
            continue
        lacking = [file for file in found.models if file.name_of(name) is None]
        if len(lacking) == len(found.models):
            averaged.append(name)
        for file in lacking if len(lacking) < len(found.models) else ():
            found.problems.append(
                f"{file.checkpoint.label}: lacks the statistics of '{name}', which "
                f"{next(f for f in found.models if f not in lacking).checkpoint.label} has"
            )
        base = found.base
        if base is not None and not lacking and base.name_of(name) is None:
            found.problems.append(
                f"{base.checkpoint.label}: lacks the statistics of '{name}', which those of the "
                "models have"
            )
        sides = {file.record.name_of(name, file.record.transposed) for file in found.models}
        if not lacking and len({side is None for side in sides}) > 1:
            found.problems.append(
                f"statistics: '{name}' is a weight of shape [in, out] in some and [out, in] in "
                "others; collect them from models of one architecture"
            )
    unknown = [
        name
        for name in averaged
        if not any(name in file.record.model_tensors for file in found.models)
    ]
    if len(averaged) == sum(info.dtype in FLOATS for info in reference.tensors.values()):
        return  # every tensor is foreign: already reported
    if unknown:
        found.warnings.append(
            f"statistics: {len(unknown)} tensors are averaged, because the models that statistics "
            f"were collected from do not have them: {listed(unknown)}"
        )


def largest_system(
    config: MergeConfig, inputs: Inputs, found: StatisticsInputs
) -> tuple[int, int] | None:
    """Return the (inputs, outputs) of the weight whose linear system is the largest, or None."""
    if config.method.statistics != "gram" or inputs.reference is None or not found.models:
        return None
    systems: list[tuple[int, int]] = []
    for name, info in inputs.reference.tensors.items():
        gram = found.models[0].info(name)
        if gram is not None and len(info.shape) >= 2 and len(gram.shape) == 2 and gram.shape[0]:
            systems.append((gram.shape[0], prod(info.shape) // gram.shape[0]))
    return max(systems, key=lambda shape: matrix_bytes(shape[0], shape[1], 1), default=None)


def matrix_bytes(inputs: int, outputs: int, solvers: int) -> int:
    """Return the bytes that a linear system takes: see `reference.statistics.RegMean`."""
    square, block = inputs * inputs, inputs * min(outputs, SOLVED_AT_ONCE)
    # The sum of Gram matrices, its factor and LAPACK's copy of it; for each thread, right-hand
    # sides with rows of a Gram matrix; the result.
    return 8 * (3 * square + 7 * solvers * block + inputs * outputs)
