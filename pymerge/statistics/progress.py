"""The progress display of `pymerge collect`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO

from pymerge.errors import RequestError
from pymerge.statistics.batches import batch_size

__all__ = ["CollectProgress", "Counted"]

_LINE_EVERY = 5.0  # seconds between plain lines


class Counted:
    """Batches that report the number of examples processed."""

    def __init__(self, loader: Iterable[Any], advance: Callable[[int], None]) -> None:
        self._loader = loader
        self._advance = advance

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield batch
            # Execution resumes here when this batch is done and the next is requested.
            try:
                self._advance(batch_size(batch, ""))
            except RequestError:
                continue  # the collecting function reports the problem


class CollectProgress:
    """Shows progress: a bar on a terminal, plain lines elsewhere, nothing if quiet."""

    def __init__(self, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._done = self._total = 0
        self._spoken = 0.0

    def begin(self, name: str, samples: int) -> None:
        """Start a loaded model: up to `samples` examples follow."""
        self._name, self._done, self._total = name, 0, samples
        self._spoken = time.monotonic()
        if self._quiet:
            return
        if not self._stream.isatty():
            self.say(f"{name}: up to {samples} examples")
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=samples)

    def advance(self, examples: int) -> None:
        """Report that `examples` more examples are done."""
        self._done = min(self._done + examples, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._spoken > _LINE_EVERY:
            self._spoken = time.monotonic()
            self.say(f"{self._name}: {self._done} of up to {self._total} examples")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> CollectProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
