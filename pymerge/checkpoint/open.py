"""An opened checkpoint: its content from the headers alone, its tensors without a copy."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.header import FileIdentity, TensorInfo, read_header
from pymerge.checkpoint.locate import Weights, find_weights, read_json_file
from pymerge.checkpoint.mapping import MappedFiles
from pymerge.checkpoint.pickled import PickledFiles
from pymerge.checkpoint.problems import Problems
from pymerge.checkpoint.tied import tied_aliases
from pymerge.dtypes import DTYPES
from pymerge.errors import CheckpointError, nearest
from pymerge.ops.array import Array

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "open_checkpoint", "open_file"]


class Checkpoint:
    """A checkpoint whose headers have been read; created by `open_checkpoint`.

    Attributes:
        path: the directory or file.
        label: its name in messages, e.g. "models[1] (/data/llama-ft)".
        tensors: by name, in the order of the names.
        files: the weight files and their sizes in bytes.
        metadata: `__metadata__` of the first file.
        config: config.json of a directory that has one.
        warnings: notes for the user, e.g. that a file is a pickle.
        tied: left-out tensors that equal another one, e.g.
            {"lm_head.weight": "model.embed_tokens.weight"}.
    """

    def __init__(
        self,
        path: Path,
        label: str,
        tensors: dict[str, TensorInfo],
        files: list[tuple[Path, int]],
        storage: MappedFiles | PickledFiles,
        *,
        metadata: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        warnings: list[str] | None = None,
    ) -> None:
        self.path = path
        self.label = label
        self.tensors = dict(sorted(tensors.items()))
        self.files = files
        self.metadata = metadata or {}
        self.config = config
        self.warnings = warnings or []
        self.tied = tied_aliases(self.tensors, config)
        self._storage = storage
        self._closed = False

    def array(self, name: str) -> Array:
        """Return a tensor as a 1-D zero-copy array in its own dtype.

        The memory is read-only (writing to it crashes), may be misaligned for the dtype, and stays
        valid for as long as the returned array lives, even after `close`.

        Args:
            name: a key of `tensors` or `tied`.

        Raises:
            CheckpointError: there is no such tensor, or the file changed since it was opened.
        """
        return self._storage.array(self._info(name))

    def flat(self, name: str) -> torch.Tensor:
        """Return the same as a torch tensor."""
        return self.array(name).tensor()

    def will_need(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Start reading elements [start, stop) into the page cache, in the background."""
        info = self._info(name)
        self._storage.will_need(info, *_byte_range(info, start, stop))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Release the page mappings of elements [start, stop); views on them stay valid."""
        info = self._info(name)
        self._storage.release(info, *_byte_range(info, start, stop))

    def close(self) -> None:
        """Release the files; tensors that `flat` returned stay valid."""
        self._closed = True
        self._storage.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.label}: {len(self.tensors)} tensors in {len(self.files)} files>"

    def _info(self, name: str) -> TensorInfo:
        if self._closed:
            raise ValueError(f"{self.label}: the checkpoint is closed")
        info = self.tensors.get(self.tied.get(name, name))
        if info is None:
            hint = nearest(name, self.tensors)
            raise CheckpointError(f"{self.label}: there is no tensor {name!r}{hint}")
        return info


def open_checkpoint(path: str | os.PathLike[str], label: str) -> Checkpoint:
    """Open a checkpoint and check all of its headers; no safetensors tensor is read.

    Args:
        path: a directory with safetensors or pickled weights, or one such file. In a directory,
            `model.safetensors.index.json` (or its only *.safetensors.index.json) takes precedence,
            then model.safetensors, its only *.safetensors file, and the pickled counterparts.
        label: the checkpoint's name in messages.

    Raises:
        CheckpointError: listing every problem that was found.
    """
    path = Path(path)
    problems = Problems(label)
    warnings: list[str] = []
    weights = find_weights(path, problems, warnings)
    config = None
    if weights is not None and weights.directory is not None:
        config_path = weights.directory / "config.json"
        if os.path.lexists(config_path):
            config = read_json_file(config_path, "config.json", problems, unique_keys=False)
    if weights is None:
        raise CheckpointError(problems.messages())
    return _opened(path, label, weights, config, problems, warnings)


def open_file(path: str | os.PathLike[str], label: str) -> Checkpoint:
    """Open one safetensors file, whatever its name; see `open_checkpoint`."""
    path = Path(path)
    return _opened(path, label, Weights((path,), False, None), None, Problems(label), [])


def _opened(
    path: Path,
    label: str,
    weights: Weights,
    config: dict[str, Any] | None,
    problems: Problems,
    warnings: list[str],
) -> Checkpoint:
    read = _Reader(weights, problems, warnings)
    read.files()
    if problems:
        read.storage.close()
        raise CheckpointError(problems.messages())
    return Checkpoint(
        path,
        label,
        read.tensors,
        read.sizes,
        read.storage,
        metadata=read.metadata,
        config=config,
        warnings=warnings,
    )


class _Reader:
    """Reads the headers of all files of a model, and compares them with its index."""

    def __init__(self, weights: Weights, problems: Problems, warnings: list[str]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.sizes: list[tuple[Path, int]] = []
        self.metadata: dict[str, str] | None = None
        self.storage: MappedFiles | PickledFiles
        self._weights = weights
        self._problems = problems
        self._warnings = warnings
        self._identities: dict[Path, FileIdentity] = {}
        self._home: dict[str, str] = {}  # tensor -> the file in which it was first seen

    def files(self) -> None:
        pickles = PickledFiles()
        for path in self._weights.files:
            # An index may name files in sub-directories; messages use the name in the index.
            base = self._weights.directory
            where = path.name if base is None else path.relative_to(base).as_posix()
            if self._weights.pickled:
                infos = pickles.load(path, where, self._problems, self._warnings)
                names = None if infos is None else [info.name for info in infos]
                self.sizes += [] if infos is None else [(path, path.stat().st_size)]
            else:
                header = read_header(path, where, self._problems)
                infos, names = None, None
                if header is not None:
                    infos, names = header.tensors, header.names
                    self._identities[path] = header.identity
                    self.sizes.append((path, header.identity.size))
                    if self.metadata is None:
                        self.metadata = header.metadata
            if infos is not None and names is not None:
                self.tensors.update({info.name: info for info in infos})
                self._compare(where, set(names))
        self.storage = (
            pickles
            if self._weights.pickled
            else MappedFiles(self._problems.label, self._identities)
        )
        if not self._problems and not self.tensors:
            self._problems.add("", "holds no tensors")

    def _compare(self, where: str, names: set[str]) -> None:
        """Compare the content of a file with the index, and with the files before it."""
        weights, problems = self._weights, self._problems
        if weights.expected is None:
            return
        promised = set(weights.expected[where])
        for name in sorted(promised - names):
            problems.add(
                where, f"lacks tensor {name!r}, which {weights.index} says it holds", "lacks"
            )
        for name in sorted(names - promised):
            if name not in weights.listed:
                problems.add(where, f"tensor {name!r} is not in {weights.index}", "not listed")
        for name in sorted(names):
            first = self._home.setdefault(name, where)
            if first != where:
                problems.add(where, f"tensor {name!r} is also in {first}", "twice")


def _byte_range(info: TensorInfo, start: int, stop: int | None) -> tuple[int, int]:
    """Return the bytes of elements [start, stop), clipped to the tensor."""
    itemsize = DTYPES[info.dtype]
    last = info.numel if stop is None else min(stop, info.numel)
    return max(start, 0) * itemsize, last * itemsize
