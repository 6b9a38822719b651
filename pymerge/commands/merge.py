"""`pymerge merge CONFIG OUT`: merges checkpoints into a directory."""

from __future__ import annotations

import argparse

from pymerge.commands.options import Commands, add_plan_options
from pymerge.commands.words import print_warnings

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("merge", help="merge the models of a config into OUT")
    parser.add_argument("config", metavar="CONFIG", help="a merge configuration (YAML)")
    parser.add_argument(
        "out", metavar="OUT", help="directory to write; it appears complete or not at all"
    )
    add_plan_options(parser)
    parser.add_argument(
        "--report", metavar="FILE", help="write the report (JSON) there too, beside OUT's own"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--checksums", action="store_true", help="put the SHA-256 of every input file in the report"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pymerge.merging.files import merge_checkpoints

    report = merge_checkpoints(
        options.config,
        options.out,
        device=options.device,
        backend=options.backend,
        memory=options.memory,
        device_memory=options.device_memory,
        threads=options.threads,
        shard_size=options.shard_size,
        seed=options.seed,
        report=options.report,
        force=options.force,
        quiet=options.quiet,
        checksums=options.checksums,
    )
    if not options.quiet:
        print_warnings(report.warnings)
        print(report.summary())
