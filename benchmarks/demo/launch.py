"""The common frame of the demos: options, cache, interruption, and the table at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.demo.merging import Merged
from benchmarks.demo.scoreboard import Row, Scoreboard

__all__ = ["fill", "launch", "show"]


def launch(
    name: str,
    about: str,
    disk: int,
    run: Callable[[Cache, Path, Log], None],
    arguments: Sequence[str] | None,
) -> int:
    """Run a demo from its command line; return the exit code.

    Args:
        name: of the demo; names its folder in the cache.
        about: one line that describes what will happen.
        disk: bytes that everything takes together.
        run: does the work, given the cache, the output folder and the log.
        arguments: of the command line; None: those of the process.
    """
    cache = Cache(Cache.default(name))
    parser = argparse.ArgumentParser(prog=f"benchmarks.demo.{name}", description=about)
    parser.add_argument(
        "--output",
        type=Path,
        default=cache.root / "output",
        help="folder of configurations, merged models and tables (default: %(default)s)",
    )
    output = parser.parse_args(arguments).output.expanduser().absolute()
    log = Log()
    log.say(f"{about} What is slow is kept in {cache.root}")
    cache.require_space(disk)
    try:
        run(cache, output, log)
    except KeyboardInterrupt:
        log.say("interrupted; the stages that are done are kept for the next run")
        return 130
    log.say(f"configurations, models and tables: {output}")
    log.say("done")
    return 0


def fill(
    board: Scoreboard,
    scores: Mapping[str, Sequence[float]],
    mean: Callable[[Sequence[float]], float],
    merged: Sequence[Merged],
) -> Merged:
    """Fill a scoreboard and return the merge with the best mean.

    Args:
        board: gets a row for each model.
        scores: label -> score on each task; the pretrained model comes first.
        mean: function of a model's scores.
        merged: the merges, labelled as in `scores`.
    """
    merges = {one.recipe.label: one for one in merged}
    for label, values in scores.items():
        by_task = dict(zip(board.tasks, values, strict=True))
        if label in merges:
            one = merges[label]
            row = Row(label, "merged", by_task, mean(values), one.seconds, one.peak_bytes)
        else:
            row = Row(label, "individual" if board.rows else "base", by_task, mean(values))
        board.rows.append(row)
    return merges[board.best().label]


def show(board: Scoreboard, output: Path, log: Log, extra: Mapping[str, Any]) -> None:
    """Print a scoreboard and write it into the output folder as JSON and Markdown."""
    log.console.print()
    board.show(log.console)
    log.console.print()
    board.save(output, extra)
