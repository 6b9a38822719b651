"""Fits statistics to the models that they are given with: tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pymerge.checkpoint.statistics import (
    StatisticsRecord,
    foreign_problem,
    kind_problem,
    shape_problem,
)
from pymerge.engine.work import TensorStatistics
from pymerge.errors import RequestError
from pymerge.merging.structures import named_tensors
from pymerge.methods import MethodSpec

__all__ = ["match_statistics"]

Tensors = Mapping[str, torch.Tensor]


def match_statistics(
    spec: MethodSpec,
    where: str,
    inputs: Mapping[str, Tensors],
    like: Any,
    collected: tuple[Any, Any],
    names: tuple[str, str],
) -> Callable[[str], TensorStatistics] | None:
    """Check the statistics of all models, and return what gives those of a tensor.

    Args:
        inputs: the models by label, as dictionaries; "base" first where it is given.
        like: the first model as it was given.
        collected, names: the statistics of models and base, and what the caller calls them.

    Raises:
        RequestError: listing everything that does not fit.
    """
    models, base = collected
    if spec.statistics is None:
        given = [name for name, value in zip(names, collected, strict=True) if value is not None]
        if given:
            raise RequestError(f"{where}: {given[0]}: {spec.name} takes none; leave them out")
        return None
    count = len([label for label in inputs if label != "base"])
    if not isinstance(models, Sequence) or isinstance(models, (str, torch.Tensor)):
        got = "None" if models is None else type(models).__name__
        raise RequestError(
            f"{where}: {names[0]}: expected a list of {count} {spec.statistics} statistics, one "
            f"for each model; got {got}"
        )
    if len(models) != count:
        raise RequestError(
            f"{where}: {names[0]}: expected {count} {spec.statistics} statistics, one for each "
            f"model; got {len(models)}"
        )
    if base is not None and not spec.needs_base:
        raise RequestError(f"{where}: {names[1]}: {spec.name} takes none; leave it out")
    labels = [f"{where}: {names[0]}[{k}]" for k in range(count)]
    given = dict(zip(labels, models, strict=True))
    if base is not None:
        given = {f"{where}: {names[1]}": base, **given}
    files = {label: _Statistics(label, value, spec, like) for label, value in given.items()}
    leader = next(iter(inputs.values()))
    problems = [problem for file in files.values() for problem in file.problems(leader)]
    if not problems:
        own = [files[label] for label in labels]
        base_file = files.get(f"{where}: {names[1]}")
        problems = _uncovered(leader, own, base_file)
    if problems:
        raise RequestError(problems)
    return lambda name: _of_tensor(name, list(files.values()), count)


class _Statistics:
    """The statistics of one model: a structure of tensors like it, or a `ModelStatistics`."""

    def __init__(self, label: str, value: Any, spec: MethodSpec, like: Any) -> None:
        self.label = label
        record = getattr(value, "record", None)
        kind = str(spec.statistics)
        self.record = record if record is not None else StatisticsRecord(kind)
        problem = kind_problem(self.record, kind, spec.name)
        if problem is not None:
            raise RequestError(f"{label}: {problem}")
        self.tensors = named_tensors(value, label, like)

    def get(self, name: str) -> torch.Tensor | None:
        own = self.record.name_of(name, self.tensors)
        return None if own is None else self.tensors[own]

    def problems(self, model: Tensors) -> list[str]:
        """Return what does not fit the model."""
        found: list[str] = []
        names = {name: [name] for name in self.tensors}
        for alias, name in self.record.aliases.items():
            names.setdefault(name, [name]).append(alias)
        foreign: list[str] = []
        for name, tensor in self.tensors.items():
            own = [n for n in names[name] if n in model]
            shown = f"{self.label}[{name!r}]" if name else self.label
            if not own:
                foreign.append(name)
            elif not tensor.is_floating_point():
                found.append(f"{shown}: has dtype {tensor.dtype}, expected float32")
            elif not model[own[0]].is_floating_point():
                found.append(f"{shown}: is of a tensor of dtype {model[own[0]].dtype}")
            else:
                problem = shape_problem(self.record, name, tensor.shape, model[own[0]].shape)
                if problem is not None:
                    found.append(f"{shown}: {problem}")
        if foreign:
            text = foreign_problem(foreign, len(self.tensors), "the model", model)
            found.append(f"{self.label}: {text}")
        if not self.tensors:
            found.append(f"{self.label}: holds no tensors")
        return found


def _uncovered(model: Tensors, files: Sequence[_Statistics], base: _Statistics | None) -> list[str]:
    """All models must have the statistics of a tensor, or none."""
    problems = []
    for name in model:
        having = [file for file in files if file.get(name) is not None]
        if not having:
            continue
        lacking = [
            file for file in (*files, *([] if base is None else [base])) if not _has(file, name)
        ]
        for file in lacking:
            problems.append(
                f"{file.label}: lacks the statistics of {name!r}, which {having[0].label} has"
            )
        sides = {file.record.name_of(name, file.record.transposed) is None for file in having}
        if len(sides) > 1:
            problems.append(
                f"{having[0].label}: {name!r} is a weight of shape [in, out] in some statistics "
                "and [out, in] in others"
            )
    return problems


def _has(file: _Statistics, name: str) -> bool:
    return file.get(name) is not None


def _of_tensor(name: str, files: Sequence[_Statistics], count: int) -> TensorStatistics:
    flats = [None if (t := file.get(name)) is None else _flat(t) for file in files]
    models = flats[-count:]
    return TensorStatistics(
        models,
        flats[0] if len(flats) > count else None,
        any(file.record.name_of(name, file.record.transposed) is not None for file in files),
        [file.label for file in files],
    )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1)
