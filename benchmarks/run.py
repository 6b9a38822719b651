"""Runs the benchmarks of pymerge (`make bench`): kernels, then whole merges.

    python -m benchmarks.run [--only kernels,engine] [options of pytest, for kernels]

Kernels are those in the documents' tables, run by `pytest benchmarks --benchmark-only -m
documents`; options unknown here are passed to pytest, such as `-k ties` and `--elements 8Mi`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import RESULTS, write_markdown

__all__ = ["main", "parser"]

_ROOT = Path(__file__).resolve().parent.parent


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON and Markdown files"
    )
    return made


def run_kernels(results: Path, arguments: Sequence[str]) -> int:
    """Run the kernel benchmarks; keep their measurements if nothing was wrong.

    Returns:
        pytest's exit code.
    """
    with tempfile.TemporaryDirectory(prefix="pymerge-kernels-") as folder:
        measured = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-only"]
        command += ["--benchmark-quiet", f"--benchmark-json={measured}", "-m", "documents"]
        code = subprocess.run([*command, *arguments], cwd=_ROOT).returncode
        if code == 0 and measured.exists() and "--quick" not in arguments:
            keep_kernels(measured.read_text(encoding="utf-8"), results)
    return code


def keep_kernels(measured: str, results: Path) -> None:
    """Write pytest-benchmark's JSON, and its tables in Markdown, to the directory of results."""
    from benchmarks.kernel_tables import tables

    result = json.loads(measured)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"kernels-{result['datetime'][:10]}.json"
    path.write_text(f"{measured.rstrip()}\n", encoding="utf-8")
    write_markdown(path, "kernels", tables(result).values(), result["machine_info"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run kernels and engine."""
    from benchmarks import engine

    made = parser(__doc__ or "")
    made.add_argument("--only", default="kernels,engine", help="which of them")
    engine.add_options(made)
    options, others = made.parse_known_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - {"kernels", "engine"}:
        made.error(f"--only: expected kernels, engine or both, got {', '.join(sorted(unknown))}")
    if others and "kernels" not in chosen:
        made.error(f"unknown without kernels: {' '.join(others)}")
    if "kernels" in chosen and (code := run_kernels(options.results, others)):
        sys.exit(code)
    if "engine" in chosen:
        engine.run(options)


if __name__ == "__main__":
    main()
