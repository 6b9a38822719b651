"""The files that `pymerge collect` writes: their paths, whether they exist, and their settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.statistics import StatisticsRecord, filename_of
from pymerge.errors import MergeError, RequestError, shown
from pymerge.hashing import sha256_of
from pymerge.statistics.config import CollectConfig, ModelToCollect

__all__ = ["Target", "make_targets", "settings_of"]


def settings_of(
    config: CollectConfig, model: ModelToCollect, checkpoint: Checkpoint, loader: int | str
) -> dict[str, Any]:
    """Return the settings that a file records so that it can be made again, as JSON values.

    All weight files are read, for their checksums.

    Args:
        loader: the position or the name of the model's batches.
    """
    weights = {"weights": [[path.name, sha256_of(path)] for path, _ in checkpoint.files]}
    about = {"model": model.reference, "torch": torch.__version__}
    return {**_told(config, loader), **weights, **about}


def _told(config: CollectConfig, loader: int | str) -> dict[str, Any]:
    """Return the settings that can be recorded without reading files."""
    told = {
        "entry": config.entry,
        "arguments": config.arguments,
        "loader": loader,
        "options": config.options,
    }
    return json.loads(json.dumps(told, default=str))  # YAML has dates, JSON has none


@dataclass(frozen=True)
class Target:
    """The file of one model's statistics."""

    file: Path
    kind: str

    def state(
        self,
        config: CollectConfig,
        model: ModelToCollect,
        checkpoint: Checkpoint,
        loader: int | str,
        *,
        force: bool,
    ) -> str:
        """Return "collect", "replace", or "done" if the file already is the result of these
        settings.

        Raises:
            RequestError: a file with other settings exists, and may not be replaced.
        """
        if not os.path.lexists(self.file):
            return "collect"
        if not self.file.is_file():
            raise RequestError(f"{model.label}: {self.file} exists, but is not a file")
        if force:
            return "replace"
        try:
            differences = self._differences(config, model, checkpoint, loader)
        except RequestError as error:
            differences = [f"it is damaged, or not a file of statistics: {error}"]
        if not differences:
            return "done"
        raise RequestError(
            f"{model.label}: {self.file} exists, with other settings: {'; '.join(differences)}. "
            "--force replaces it, --out DIR writes elsewhere"
        )

    def _differences(
        self, config: CollectConfig, model: ModelToCollect, checkpoint: Checkpoint, loader: Any
    ) -> list[str]:
        record = self._record()
        if record.kind != self.kind:
            return [f"it holds {record.kind} statistics"]
        known = record.settings
        if not known:
            return ["it was not made by `pymerge collect` and does not record them"]
        now = _told(config, loader)
        found = []
        for key in ("entry", "arguments", "loader"):
            if known.get(key) != now[key]:
                found.append(f"{key} was {_short(known.get(key))}, now {_short(now[key])}")
        before = known.get("options")
        before = before if isinstance(before, Mapping) else {}
        for key, value in now["options"].items():
            # A later version's new option had its default value before.
            if before.get(key, value) != value:
                found.append(f"{key} was {_short(before[key])}, now {_short(value)}")
        if not found:
            weights = settings_of(config, model, checkpoint, loader)["weights"]
            if known.get("weights") != weights:
                found.append("the weights of the model were others")
        return found

    def _record(self) -> StatisticsRecord:
        with open_checkpoint(self.file, "the file") as checkpoint:
            return StatisticsRecord.from_metadata(checkpoint.metadata, "the file")

    def contents(self) -> tuple[int | None, int | None]:
        """Return the number of examples it was made from, and its size; None if it is
        unreadable."""
        try:
            return self._record().examples, self.file.stat().st_size
        except (RequestError, OSError):
            return None, None

    def prepare(self) -> None:
        """Create its folder, and remove the leftovers of a run that was killed while writing it.

        Raises:
            MergeError: that is not possible.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            left = re.compile(rf"\.{re.escape(self.file.name)}\.[0-9a-f]{{8}}")
            for path in self.file.parent.iterdir():
                if left.fullmatch(path.name):
                    with suppress(FileNotFoundError):
                        path.unlink()
        except OSError as error:
            folder = self.file.parent
            raise MergeError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _short(value: Any) -> str:
    return shown(value) if not isinstance(value, (dict, list)) else json.dumps(value)[:80]


def make_targets(
    config: CollectConfig, checkpoints: Sequence[Checkpoint], out: str | os.PathLike[str] | None
) -> list[Target]:
    """Return the file of each model.

    Raises:
        RequestError: two models have the same file, it is a weight file, or its folder cannot be
            written.
    """
    name = filename_of(config.kind)
    found: list[Target] = []
    problems: list[str] = []
    taken: dict[str, ModelToCollect] = {}
    for model, checkpoint in zip(config.models, checkpoints, strict=True):
        file = _beside(model) / name if out is None else Path(out) / f"{model.name}-{name}"
        found.append(Target(file, config.kind))
        other = taken.setdefault(os.path.realpath(file), model)
        if other is not model:
            instead = (
                "give --out DIR, and names where the models have the same"
                if out is None
                else "give them names: {model: ..., name: ...}"
            )
            problems.append(f"{model.label}: {file} is also the file of {other.label}; {instead}")
        if any(os.path.realpath(path) == os.path.realpath(file) for path, _ in checkpoint.files):
            problems.append(f"{model.label}: {file} is the model itself; give --out DIR")
        problem = _unwritable(file.parent)
        if problem is not None:
            problems.append(f"{model.label}: {problem}")
    if problems:
        raise RequestError(problems)
    return found


def _beside(model: ModelToCollect) -> Path:
    """Return the folder of a model, or of its adapter if it has one."""
    path = Path(model.path if model.adapter is None else model.adapter)
    return path if path.is_dir() else path.parent


def _unwritable(folder: Path) -> str | None:
    """Return why a folder cannot be written; checked early, since the results may take hours."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{folder} is not a folder: {there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} may not be written; --out DIR writes elsewhere"
    return None
