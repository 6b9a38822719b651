"""`pymerge ada CONFIG OUT`: learns coefficients without labels, and merges with them."""

from __future__ import annotations

import argparse

from pymerge.commands.options import Commands, integer, size
from pymerge.commands.words import print_warnings

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "ada", help="learn merging coefficients without labels (AdaMerging), and merge with them"
    )
    parser.add_argument("config", metavar="CONFIG", help="models, entry point and options (YAML)")
    parser.add_argument("out", metavar="OUT", help="directory to write; OUT.ada gets the rest")
    parser.add_argument("--memory", type=size, default="2GiB", metavar="SIZE", help="of the merge")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="of the merge")
    parser.add_argument("--restart", action="store_true", help="do not go on from an earlier run")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.adamerging.run import run_ada

    result, report = run_ada(
        options.config,
        options.out,
        force=options.force,
        quiet=options.quiet,
        memory=options.memory,
        threads=options.threads,
        resume=not options.restart,
    )
    if not options.quiet:
        print_warnings(report.warnings)
        if result.history:
            first, last = result.history[0]["entropy"], result.history[-1]["entropy"]
            print(f"{result.steps} steps: mean entropy {first:.4f} -> {last:.4f} nats")
        print(f"coefficients: {options.out}.ada")
        print(report.summary())
