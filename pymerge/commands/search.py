"""`pymerge search CONFIG OUT`: searches for the coefficients that score best on a metric."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.commands.options import Commands, integer, size
from pymerge.commands.words import print_warnings

if TYPE_CHECKING:
    from pymerge.search.study import SearchResult

__all__ = ["add", "print_result", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "search", help="search for the coefficients that score best (grid, random, CMA-ES)"
    )
    parser.add_argument("config", metavar="CONFIG", help="what is searched, and how (YAML)")
    parser.add_argument("out", metavar="OUT", help="folder of the study; a search goes on there")
    parser.add_argument(
        "--metric", metavar="PACKAGE.MODULE:FUNCTION", help="the metric, instead of CONFIG's"
    )
    parser.add_argument("--evaluations", type=int, metavar="N", help="budget, instead of CONFIG's")
    parser.add_argument("--seconds", type=float, metavar="S", help="budget, instead of CONFIG's")
    parser.add_argument("--seed", type=integer(0), metavar="N", help="instead of CONFIG's")
    parser.add_argument("--workers", type=integer(1), metavar="N", help="instead of CONFIG's")
    parser.add_argument(
        "--executor", choices=("threads", "processes"), help="kind of workers, instead of CONFIG's"
    )
    parser.add_argument(
        "--memory", type=size, default="8GiB", metavar="SIZE", help="for all merges (default: 8GiB)"
    )
    parser.add_argument("--threads", type=integer(1), metavar="N", help="of a merge")
    parser.add_argument("--merge", action="store_true", help="write the best model to OUT/merged")
    parser.add_argument("--restart", action="store_true", help="discard an earlier run's trials")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.search import run_search

    result = run_search(
        options.config,
        options.out,
        metric=options.metric,
        evaluations=options.evaluations,
        seconds=options.seconds,
        seed=options.seed,
        workers=options.workers,
        executor=options.executor,
        memory=options.memory,
        threads=options.threads,
        merge=options.merge,
        restart=options.restart,
        quiet=options.quiet,
    )
    if not options.quiet:
        print_warnings(result.warnings)
        print_result(result, Path(options.out))
        if result.merged is not None:
            print(result.merged.summary())


def print_result(result: SearchResult, folder: Path) -> None:
    """Print the best trials as a table, and the time that the search took."""
    from rich.console import Console
    from rich.table import Table

    from pymerge.search.results import BEST

    config = result.config
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(width=140, soft_wrap=True)
    sign = -1.0 if config.direction == "maximize" else 1.0
    good = [t for t in result.trials if t.value is not None]
    ranked = sorted(good, key=lambda t: (sign * (t.value or 0.0), t.number))[:5]
    first = result.first
    if first is not None and first.value is not None and first not in ranked:
        ranked.append(first)
    table = Table(title=f"{config.metric_name} ({config.direction})", title_justify="left")
    table.add_column("variable")
    for trial in ranked:
        note = " (first)" if first is not None and trial.number == first.number else ""
        table.add_column(f"trial {trial.number}{note}", justify="right")
    table.add_row("value", *(f"[bold]{trial.value:.6g}[/]" for trial in ranked))
    for name in result.space.names:
        table.add_row(_plain(name), *(f"{trial.values[name]:.4g}" for trial in ranked))
    if ranked:
        console.print(table)
    failed = f", {result.failures} failed" if result.failures else ""
    console.print(
        f"{len(result.trials)} trials{failed}: {result.seconds_merging:.1f} s merging, "
        f"{result.seconds_evaluating:.1f} s evaluating, {result.seconds:.1f} s in all; "
        f"{result.finished}",
        highlight=False,
    )
    console.print(f"chosen on {config.search_data}", highlight=False, markup=False)
    if result.report is not None:
        parts = [
            f"{key} {result.report[key]['value']:.6g}"
            for key in ("best", "first")
            if key in result.report and result.report[key]["value"] is not None
        ]
        if parts:
            console.print(
                f"on {config.report_data}: {', '.join(parts)}", highlight=False, markup=False
            )
    if result.best is not None:
        console.print(f"{folder / BEST}: pymerge merge merges it", highlight=False, markup=False)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
