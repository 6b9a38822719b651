"""The arguments of `pymerge collect`. Imports nothing heavy before the command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["add_collect_command", "run"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_collect_command(commands: Commands, device: Callable[[str], str]) -> None:
    """Add the command's parser.

    Args:
        device: reads the name of a device.
    """
    collect = commands.add_parser(
        "collect",
        help="collect statistics of models (Fisher, Gram matrices) for a merge with data",
    )
    collect.add_argument("config", metavar="CONFIG", help="models, entry point and options (YAML)")
    collect.add_argument(
        "--out", metavar="DIR", help="folder for the files (default: beside each model)"
    )
    collect.add_argument(
        "--device",
        type=device,
        default="auto",
        help="cpu, cuda or cuda:N; auto leaves the entry point's model where it is (default: auto)",
    )
    collect.add_argument("--force", action="store_true", help="collect anew, and replace files")
    collect.add_argument(
        "--dry-run", action="store_true", help="check everything, and say what would be done"
    )
    amount = collect.add_mutually_exclusive_group()
    amount.add_argument("--verbose", action="store_true", help="tell more of each model")
    amount.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(options: argparse.Namespace) -> None:
    """Run the command; raises as `run_collect` does."""
    from pymerge.statistics.progress import print_table
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
