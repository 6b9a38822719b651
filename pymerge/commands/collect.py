"""`pymerge collect CONFIG`: collects statistics of models, each in a file beside its model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.byte_sizes import format_size
from pymerge.commands.options import Commands, device

if TYPE_CHECKING:
    from pymerge.statistics.run import Collected

__all__ = ["add", "print_table", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "collect",
        help="collect statistics of models (Fisher, Gram matrices) for a merge with data",
    )
    parser.add_argument("config", metavar="CONFIG", help="models, entry point and options (YAML)")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the files (default: beside each model)"
    )
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        help="cpu, cuda or cuda:N; auto leaves the entry point's model where it is (default: auto)",
    )
    parser.add_argument("--force", action="store_true", help="collect anew, and replace files")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, and report what would be done"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--verbose", action="store_true", help="print more about each model")
    amount.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.statistics.run import run_collect

    found = run_collect(
        options.config,
        out=options.out,
        force=options.force,
        device=options.device,
        dry_run=options.dry_run,
        quiet=options.quiet,
        verbose=options.verbose,
    )
    if not options.quiet:
        print_table(found)


def print_table(found: Sequence[Collected]) -> None:
    """Print a line for each model: its file, the number of examples, the file's size, the
    action."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table()
    table.add_column("model", overflow="fold")
    table.add_column("file", overflow="fold")
    table.add_column("examples", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in found:
        table.add_row(
            Text(one.model),
            Text(str(one.file)),
            "" if one.examples is None else f"{one.examples:,}",
            "" if one.size is None else format_size(one.size),
            one.state,
        )
    console.print(table)
