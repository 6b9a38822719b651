"""Inserts the tables of the latest results into the documents, so that no figure is typed by hand.

    python -m benchmarks.readme_table [--check]

Text between `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->` in README.md and in documents
of docs/ is replaced by the table of that name from benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.kernel_tables import tables
from benchmarks.tables import RESULTS, Table, describe_machine

__all__ = ["fill", "latest_tables", "main"]

ROOT = Path(__file__).resolve().parent.parent
_NAMES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/adamerging.md",
    "docs/analysis.md",
    "docs/quality.md",
    "docs/search.md",
)
DOCUMENTS = tuple(ROOT / name for name in _NAMES)
_BLOCK = re.compile(r"(<!-- benchmark:([\w-]+) -->\n).*?(<!-- /benchmark:\2 -->)", re.DOTALL)


def latest_tables(directory: Path) -> dict[str, str]:
    """Return Markdown by table name, from the newest file of each benchmark."""
    texts: dict[str, str] = {}
    for path in sorted(directory.glob("*.json")):  # dates sort; a later file wins
        result = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in result:  # pytest-benchmark's
            found, on, date = tables(result), result["machine_info"], result["datetime"][:10]
        else:
            found = {name: Table(**values) for name, values in result["tables"].items()}
            on, date = result["machine"], result["date"]
        line = describe_machine(on, date)
        for name, table in found.items():
            texts[name] = f"{table.markdown()}\n{line}\n"
    return texts


def fill(text: str, tables: Mapping[str, str]) -> tuple[str, list[str]]:
    """Replace the blocks of a document; return it, and the names without a table."""
    missing: list[str] = []

    def replace(block: re.Match[str]) -> str:
        if block[2] not in tables:
            missing.append(block[2])
            return block[0]
        return f"{block[1]}{tables[block[2]]}{block[3]}"

    return _BLOCK.sub(replace, text), missing


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the documents; with --check only report whether they are up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    options = parser.parse_args(arguments)
    newest = latest_tables(options.results)
    stale = False
    for document in DOCUMENTS:
        if not document.exists():
            continue
        before = document.read_text(encoding="utf-8")
        after, missing = fill(before, newest)
        for name in missing:
            print(f"{document.name}: no result has a table {name!r}", file=sys.stderr)
        stale = stale or after != before
        if after != before and not options.check:
            document.write_text(after, encoding="utf-8")
            print(f"{document.name}: updated")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
