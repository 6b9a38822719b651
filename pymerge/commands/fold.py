"""`pymerge fold BASE ADAPTER OUT`: folds an adapter into its base."""

from __future__ import annotations

import argparse

from pymerge.commands.options import Commands, integer, size
from pymerge.commands.words import print_warnings

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "fold", help="fold a LoRA or IA3 adapter into its base, and write the model"
    )
    parser.add_argument("base", metavar="BASE", help="the base model")
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter's directory (PEFT)")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--dtype", metavar="NAME", help="dtype of the output (default: the base's)")
    parser.add_argument("--memory", type=size, default="2GiB", metavar="SIZE", help="to stay under")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="default: one per core")
    parser.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="largest file to write"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.adapters.fold import fold

    report = fold(
        options.base,
        options.adapter,
        options.out,
        dtype=options.dtype,
        memory=options.memory,
        threads=options.threads,
        shard_size=options.shard_size,
        force=options.force,
        quiet=options.quiet,
    )
    if not options.quiet:
        print_warnings(report.warnings)
        print(report.summary())
