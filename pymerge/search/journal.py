"""The record of a study, which survives being killed: a line for each trial, synced to the disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pymerge.errors import MergeError, RequestError
from pymerge.strict_json import decode, load_json

__all__ = ["JOURNAL", "Journal", "Trial", "differences"]

JOURNAL = "study.jsonl"
_FORMAT = 1
_DAMAGED = "the study is damaged; begin anew with --restart"


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    number: from 0, in the order in which they were asked for. values: of the variables. value: what
    the metric returned, None for a failure. named: all that it returned, if it was a mapping.
    seconds_merging, seconds_evaluating: of this trial. elapsed: seconds of searching until its end,
    over all runs of the study.
    """

    number: int
    values: dict[str, float]
    state: Literal["complete", "failed"]
    value: float | None = None
    named: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    seconds_merging: float = 0.0
    seconds_evaluating: float = 0.0
    elapsed: float = 0.0


class Journal:
    """The file of a study; one process at a time has it.

    Args:
        folder: of the study; made if it is not there.
        identity: what trials depend on, as plain values.
        restart: start over, even if a journal exists.

    Raises:
        RequestError: the folder holds something else, another process has the study, or it is of
            another configuration: the message says what differs.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = folder / JOURNAL
        self.trials: dict[int, Trial] = {}
        self.warnings: list[str] = []
        own = json.loads(_text(identity))
        self._check_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise MergeError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RequestError(f"out: {folder}: another search is using this study") from None
            if restart:
                os.ftruncate(self._file, 0)
            self._read(own)
        except BaseException:
            self.close()
            raise

    def _check_folder(self, folder: Path) -> None:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise RequestError(f"out: {folder} exists and is not a folder")
        if not (folder / JOURNAL).is_file() and any(folder.iterdir()):
            raise RequestError(
                f"out: {folder} exists and is no study (it has no {JOURNAL}); name another folder"
            )

    def _read(self, identity: Any) -> None:
        size = os.fstat(self._file).st_size
        content = os.pread(self._file, size, 0) if size else b""
        header = {"format": _FORMAT, "study": identity}
        lines = content.split(b"\n")
        torn = lines.pop()  # was being written when the process ended
        if lines:
            self._check_header(lines[0], identity)
            for number, line in enumerate(lines[1:], 2):
                trial = self._trial(line, number)
                self.trials[trial.number] = trial
            if torn:
                self.warnings.append(f"{self.path}: the last line was incomplete and is left out")
        elif not _text(header).encode().startswith(torn):
            raise RequestError(f"{self.path}:1: {_DAMAGED}: expected the header of a study")
        if torn:
            os.ftruncate(self._file, size - len(torn))
        if not lines:
            self._write(header)
            _sync_folder(self.path.parent)

    def _check_header(self, line: bytes, identity: Any) -> None:
        header = self._parse(line, 1)
        if type(header.get("format")) is not int or "study" not in header:
            raise RequestError(f"{self.path}:1: {_DAMAGED}: expected the header of a study")
        if header["format"] != _FORMAT:
            raise RequestError(
                f"{self.path}:1: expected a study of format {_FORMAT}, got {header['format']}"
            )
        found = [f"{self.path}:1: {text}" for text in differences(header["study"], identity)]
        if found:
            raise RequestError(
                [
                    f"out: {self.path.parent} is a study of another configuration; name another "
                    "folder, or begin anew with --restart (restart=True)",
                    *found,
                ]
            )

    def _trial(self, line: bytes, number: int) -> Trial:
        where = f"{self.path}:{number}"
        # What a metric names need not be a number.
        trial: Trial = decode(
            Trial, self._parse(line, number), f"{where}: not a trial", finite=False
        )
        times = trial.seconds_merging, trial.seconds_evaluating, trial.elapsed
        numbers = [*trial.values.values(), *times, *([] if trial.value is None else [trial.value])]
        if not all(map(math.isfinite, numbers)):
            raise RequestError(f"{where}: {_DAMAGED}: expected finite numbers")
        if trial.number < 0 or trial.number in self.trials:
            raise RequestError(f"{where}: {_DAMAGED}: trial {trial.number} is there already")
        if (trial.state == "complete") != (trial.value is not None):
            raise RequestError(f"{where}: {_DAMAGED}: a trial is complete if it has a value")
        return trial

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}:{number}: {_DAMAGED}"
        found = load_json(line, where, finite=False)
        if not isinstance(found, dict):
            raise RequestError(f"{where}: expected a JSON object")
        return found

    def add(self, trial: Trial) -> None:
        """Write a trial and wait until it is on the disk.

        Raises:
            MergeError: it cannot be written.
        """
        self._write(asdict(trial))
        self.trials[trial.number] = trial

    def _write(self, record: Mapping[str, Any]) -> None:
        line = (_text(record) + "\n").encode()
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            raise MergeError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):
            os.close(self._file)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return a line for each place where two plain values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            at = f"{path}.{key}" if path else key
            if key not in before:
                found.append(f"{at}: the study has none, now {_short(now[key])}")
            elif key not in now:
                found.append(f"{at}: the study has {_short(before[key])}, now there is none")
            else:
                found += differences(before[key], now[key], at)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [text for n, (a, b) in pairs for text in differences(a, b, f"{path}[{n}]")]
    if before == now:
        return []
    return [f"{path}: the study has {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= 70 else text[:67] + "..."
