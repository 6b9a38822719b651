"""The output of a running demo: lines with the time since its start, and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Advance", "Log"]

# Without a terminal, a long stage reports its progress this often.
_SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Reports one finished step, with a note such as "loss 2.71"."""

    def __call__(self, note: str = "") -> None: ...


class Log:
    """Writes the demo's messages to the terminal or to a log file."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._start

    def say(self, text: str) -> None:
        """Print a line, with the time before it."""
        self.console.print(f"[dim]{_clock(self.seconds)}[/dim]  {text}", soft_wrap=True)

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Advance]:
        """Show the progress of `total` steps: a bar on a terminal, otherwise occasional lines.

        Yields:
            A function to call after each step.
        """
        start = time.perf_counter()
        done, latest, last = 0, "", start
        with Progress(
            TextColumn("       {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as bar:
            task = bar.add_task(label, total=total, note="")

            def advance(note: str = "") -> None:
                nonlocal done, last, latest
                done, latest = done + 1, note
                bar.update(task, advance=1, note=note)
                now = time.perf_counter()
                if bar.disable and done < total and now - last >= _SECONDS_BETWEEN_LINES:
                    last = now
                    self.say(f"{label}: {done} of {total} {note}".rstrip())

            yield advance
        taken = time.perf_counter() - start
        self.say(f"{label}: {taken:.0f} s {latest}".rstrip())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:2d}:{rest:02d}"
