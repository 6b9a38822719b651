"""Statistics of a model: a dictionary of tensors with a record of its origin, and its file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from pymerge._version import __version__
from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.statistics import StatisticsRecord, filename_of
from pymerge.errors import RequestError
from pymerge.output.replace import replace_file

__all__ = ["ModelStatistics", "load_statistics", "save_statistics"]


class ModelStatistics(Mapping[str, torch.Tensor]):
    """Tensors by the names of a model's parameters, and a record of how they were made.

    Fisher information has the shape of the parameter; a Gram matrix is [in, in] and has the name of
    its linear layer's weight. All are float32, on the CPU. Other names of a shared parameter are
    keys too, but iteration skips them.

    Attributes:
        record: kind, estimator, number of examples and tokens, names of the model's tensors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], record: StatisticsRecord) -> None:
        self.record = record
        self._tensors = dict(tensors)

    @property
    def kind(self) -> str:
        """ "fisher" or "gram"."""
        return self.record.kind

    def __getitem__(self, name: str) -> torch.Tensor:
        own = self.record.name_of(name, self._tensors)
        if own is None:
            raise KeyError(name)
        return self._tensors[own]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.record.name_of(name, self._tensors) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        record = self.record
        tokens = f", {record.tokens} tokens" if record.tokens else ""
        return (
            f"<ModelStatistics {record.kind} ({record.estimator}): {len(self)} tensors, "
            f"{record.examples} examples{tokens}>"
        )


def save_statistics(path: str | os.PathLike[str], statistics: ModelStatistics) -> Path:
    """Write statistics to a safetensors file, atomically.

    Args:
        path: a file ending in `.safetensors`, or an existing directory, such as the model's: it
            then gets the file `fisher.safetensors` or `gram.safetensors`. An existing file is
            replaced.
        statistics: from `collect_fisher` or `collect_gram`.

    Returns: the file.

    Raises:
        RequestError: `path` or `statistics` is of another kind.
        MergeError: the file cannot be written.

    >>> import pymerge, tempfile, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> gram = pymerge.collect_gram(model, [torch.ones(4, 3)])
    >>> save_statistics(tempfile.mkdtemp(), gram).name
    'gram.safetensors'
    """
    from safetensors.torch import save

    if not isinstance(statistics, ModelStatistics):
        raise RequestError(
            "save_statistics: statistics: expected ModelStatistics (of collect_fisher or "
            f"collect_gram), got {type(statistics).__name__}"
        )
    target = Path(path)
    if target.is_dir():
        target = target / filename_of(statistics.kind)
    elif target.suffix != ".safetensors":
        raise RequestError(
            f"save_statistics: path: expected an existing directory or a file ending in "
            f".safetensors, got {os.fspath(path)!r}"
        )
    problems = _problems("save_statistics: statistics", statistics, statistics.record)
    if problems:
        raise RequestError(problems)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in statistics.items()}
    replace_file(target, save(tensors, statistics.record.to_metadata()))
    return target


def load_statistics(path: str | os.PathLike[str], *, kind: str | None = None) -> ModelStatistics:
    """Read a file of `save_statistics`, and check it.

    Args:
        path: the file, or a directory with one in it.
        kind: "fisher" or "gram", if it matters; required if a directory has both.

    Raises:
        RequestError: the file is missing, damaged or of another kind, or holds numbers that such
            statistics cannot have.
    """
    file = Path(path)
    if file.is_dir():
        found = [file / filename_of(k) for k in ([kind] if kind else ["fisher", "gram"])]
        there = [candidate for candidate in found if candidate.exists()]
        if len(there) != 1:
            names = " or ".join(candidate.name for candidate in found)
            what = "both exist; name one, or give kind" if there else "there is none"
            raise RequestError(f"load_statistics: path: {file}: expected {names} in it; {what}")
        file = there[0]
    if not file.exists():
        raise RequestError(f"load_statistics: path: no such file: {file}")
    with open_checkpoint(file, f"load_statistics: {file}") as checkpoint:
        record = StatisticsRecord.from_metadata(checkpoint.metadata, checkpoint.label)
        if kind is not None and record.kind != kind:
            raise RequestError(f"{checkpoint.label}: holds {record.kind} statistics, not {kind}")
        tensors = {
            name: checkpoint.flat(name).reshape(info.shape).clone()
            for name, info in checkpoint.tensors.items()
        }
    problems = _problems(f"load_statistics: {file}", tensors, record)
    if problems:
        raise RequestError(problems)
    return ModelStatistics(tensors, record)


def make_record(
    kind: str,
    estimator: str,
    model: torch.nn.Module,
    examples: int,
    tokens: int = 0,
    transposed: frozenset[str] = frozenset(),
    aliases: Mapping[str, str] | None = None,
) -> StatisticsRecord:
    """Return the record of statistics of a module."""
    return StatisticsRecord(
        kind,
        estimator,
        examples,
        tokens,
        transposed,
        aliases or {},
        tuple(sorted(model.state_dict())),
        __version__,
    )


def _problems(
    where: str, tensors: Mapping[str, torch.Tensor], record: StatisticsRecord
) -> list[str]:
    found = []
    for name in tensors:
        tensor = tensors[name]
        if not tensor.is_floating_point():
            found.append(f"{where}: {name!r} has dtype {tensor.dtype}, expected float32")
        elif not bool(tensor.isfinite().all()):
            found.append(f"{where}: {name!r} holds NaN or infinity")
        elif record.kind == "fisher" and bool((tensor < 0).any()):
            found.append(f"{where}: {name!r} holds negative Fisher information")
        elif record.kind == "gram" and (tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]):
            found.append(
                f"{where}: {name!r} has shape {tuple(tensor.shape)}; a Gram matrix is square"
            )
    if not found and not len(tensors):
        found.append(f"{where}: holds no tensors")
    return found
