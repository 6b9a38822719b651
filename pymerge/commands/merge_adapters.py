"""`pymerge merge-adapters CONFIG OUT`: merges adapters into one, or onto their base."""

from __future__ import annotations

import argparse

from pymerge.commands.options import Commands, integer, size
from pymerge.commands.words import print_warnings

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "merge-adapters",
        help="merge the LoRA or IA3 adapters of a config into one adapter, or onto their base",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a merge configuration whose models are adapters (YAML)"
    )
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="seed of random masks (default: 0)"
    )
    parser.add_argument(
        "--memory", type=size, default="2GiB", metavar="SIZE", help="memory for writing a model"
    )
    parser.add_argument("--threads", type=integer(1), metavar="N", help="default: one per core")
    parser.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="largest file of a model"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.adapters.config import run_merge_adapters

    report = run_merge_adapters(
        options.config,
        options.out,
        seed=options.seed,
        force=options.force,
        quiet=options.quiet,
        memory=options.memory,
        shard_size=options.shard_size,
        threads=options.threads,
    )
    if not options.quiet:
        print_warnings(report.warnings)
        print(report.summary())
