"""Shows the progress of a search and the best so far: a bar on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from pymerge.search.config import SearchConfig
from pymerge.search.journal import Trial
from pymerge.search.space import Space

__all__ = ["Progress", "shown_values"]

_LINE_EVERY = 5.0  # seconds between plain lines
_MOST_SHOWN = 6


def shown_values(values: dict[str, float]) -> str:
    """Return a few values as text."""
    parts = [f"{name} {value:.4g}" for name, value in list(values.items())[:_MOST_SHOWN]]
    more = len(values) - len(parts)
    return ", ".join(parts) + (f", and {more} more" if more > 0 else "")


class Progress:
    """Is notified of trials."""

    def __init__(
        self, config: SearchConfig, space: Space, *, quiet: bool, stream: TextIO | None = None
    ) -> None:
        self._config = config
        self._space = space
        self._quiet = quiet
        self._stream = stream if stream is not None else sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._spoken = 0.0
        self._total: int | None = None
        self._done = 0

    def begin(self, total: int | None, done: int, best: Trial | None) -> None:
        """The search begins, or continues."""
        self._total, self._done = total, done
        if self._quiet:
            return
        if done:
            print(f"going on after {done} trials", file=self._stream, flush=True)
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[best]}"),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bar.start()
            name = self._config.sampler
            self._task = self._bar.add_task(
                name, total=total, completed=done, best=self._best(best)
            )

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A trial is complete."""
        self._done += 1
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, best=self._best(best))
        new = best is not None and best.number == trial.number
        if trial.state == "failed":
            self._say(f"trial {trial.number} failed: {trial.error}")
        elif self._bar is None and (new or time.monotonic() - self._spoken > _LINE_EVERY):
            self._spoken = time.monotonic()
            total = f" of {self._total}" if self._total else ""
            self._say(f"{self._done}{total} trials, {self._best(best)}")

    def _best(self, best: Trial | None) -> str:
        if best is None:
            return "none yet"
        return f"best {best.value:.6g} (trial {best.number})"

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
