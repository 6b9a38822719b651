"""Progress of a merge: a bar on a terminal, plain lines elsewhere, the times for the report."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from pymerge.byte_sizes import format_size
from pymerge.merging.report import Phase

__all__ = ["Recorder"]

_LINE_EVERY = 5.0  # seconds between plain lines


class Recorder:
    """A Progress that keeps the seconds and bytes of each phase and, unless quiet, shows them.

    Phases with equal names (a repeated pass) are added up.
    """

    def __init__(self, *, quiet: bool, stream: TextIO | None = None) -> None:
        self.phases: dict[str, Phase] = {}
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._name: str | None = None
        self._total = 0
        self._done = 0
        self._started = self._spoken = time.monotonic()

    def phase(self, name: str, total_bytes: int) -> None:
        """Begin a phase, which ends the previous one."""
        self._end()
        self._name, self._total, self._done = name, total_bytes, 0
        self._started = self._spoken = time.monotonic()
        if self._quiet:
            return
        if self._stream.isatty():
            self._show_bar(name, total_bytes)

    def advance(self, nbytes: int) -> None:
        """Count bytes that were read."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.advance(self._task, nbytes)
        elif not self._quiet and time.monotonic() - self._spoken > _LINE_EVERY:
            self._spoken = time.monotonic()
            seconds = self._spoken - self._started
            share = f" ({100 * self._done / self._total:.0f} %)" if self._total else ""
            print(
                f"{self._name}: {format_size(self._done)}{share}, "
                f"{format_size(int(self._done / seconds))}/s",
                file=self._stream,
                flush=True,
            )

    def _show_bar(self, name: str, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description:>12}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total_bytes or None)

    def _end(self) -> None:
        if self._name is None:
            return
        done = self.phases.setdefault(self._name, Phase(0.0, 0))
        done.seconds += time.monotonic() - self._started
        done.bytes += self._done
        self._name = None

    def close(self) -> None:
        """End the last phase and remove the bar."""
        self._end()
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
