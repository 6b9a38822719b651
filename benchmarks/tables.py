"""Results: tables on the terminal and in Markdown, files, and the description of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from pymerge.ops.native import cpu

__all__ = ["RESULTS", "Table", "console", "describe_machine", "machine", "save", "write_markdown"]

RESULTS = Path(__file__).parent / "results"
console = Console(soft_wrap=True)
if not console.is_terminal:
    console = Console(width=140, soft_wrap=True)


@dataclass
class Table:
    """A table of formatted text: the first column is left-aligned, the others right."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"table: expected {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(list(cells))

    def show(self) -> None:
        """Print the table."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim", highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [f"**{self.title}**", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        if self.notes:
            lines += ["", *(f"{note}  " for note in self.notes[:-1]), self.notes[-1]]
        return "\n".join(lines) + "\n"


def _cpu_model() -> str:
    """Return the processor's name; on x86 with family and model, because names omit the core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        said.setdefault(key.strip(), value.strip())
    name = said.get("model name", platform.machine())
    if "cpu family" in said and "model" in said:
        name += f" (family {said['cpu family']}, model {said['model']})"
    return name


def machine() -> dict[str, Any]:
    """Return a description of the machine on which the numbers were measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "isa": cpu.supported_isas(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "compiler": cpu.build().get("compiler", ""),
    }


def describe_machine(found: Mapping[str, Any], date: str) -> str:
    """Return the machine as one line."""
    return (
        f"{found['cpu']}, {found['cores']} cores ({', '.join(found['isa'])}), "
        f"{found['memory_gib']} GiB, {found['system']}, Python {found['python']}, "
        f"torch {found['torch']}, {date}."
    )


def save(
    what: str, tables: Mapping[str, Table], records: Sequence[Mapping[str, Any]], directory: Path
) -> Path:
    """Write `<what>-<date>.json` and `.md`; return the path of the JSON.

    Args:
        what: "engine", "peers" and so on.
        tables: by the name that a document's marker uses.
        records: the raw measurements.
    """
    directory.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    found = machine()
    content = {
        "what": what,
        "date": date,
        "machine": found,
        "tables": {name: asdict(table) for name, table in tables.items()},
        "records": list(records),
    }
    path = directory / f"{what}-{date}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_markdown(path, what, tables.values(), found)
    return path


def write_markdown(
    path: Path, what: str, tables: Iterable[Table], machine: Mapping[str, Any]
) -> None:
    """Write tables beside the JSON file at that path, whose name ends in the date."""
    text = "\n".join(table.markdown() for table in tables)
    line = describe_machine(machine, path.stem.removeprefix(f"{what}-"))
    path.with_suffix(".md").write_text(f"# {what}\n\n{line}\n\n{text}", encoding="utf-8")
    console.print(f"[dim]{path} and .md[/dim]", highlight=False)
