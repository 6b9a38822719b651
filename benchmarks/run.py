"""Runs the benchmarks of pymerge (`make bench`): kernels, then whole merges.

python -m benchmarks.run [--only kernels,engine] [options of both]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import RESULTS

__all__ = ["main", "parser"]


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with what all benchmarks take."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON and Markdown files"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run kernels and engine."""
    from benchmarks import engine, kernels

    made = parser(__doc__ or "")
    made.add_argument("--only", default="kernels,engine", help="which of them")
    kernels.add_options(made)
    engine.add_options(made)
    options = made.parse_args(arguments)
    chosen = options.only.split(",")
    if "kernels" in chosen:
        kernels.run(options)
    if "engine" in chosen:
        engine.run(options)


if __name__ == "__main__":
    main()
