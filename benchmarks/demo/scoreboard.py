"""The table at the end of a demo: model x task, shown, and stored as JSON and Markdown."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.demo.cache import write_text

__all__ = ["Row", "Scoreboard", "machine", "paired_change"]


@dataclass(frozen=True)
class Row:
    """One model: its score on each task, their mean, and its merge's cost (None: not merged).

    `part` is "base", "individual" or "merged": the table draws a line between the parts.
    """

    label: str
    part: Literal["base", "individual", "merged"]
    scores: Mapping[str, float]
    mean: float
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass
class Scoreboard:
    """All rows of a demo. `better` defines the good scores; the best merged ones stand out."""

    title: str
    tasks: Sequence[str]
    mean_label: str
    better: Literal["lower", "higher"]
    decimals: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def best(self) -> Row:
        """Return the merged row with the best mean."""
        merged = [row for row in self.rows if row.part == "merged"]
        return (min if self.better == "lower" else max)(merged, key=lambda row: row.mean)

    def show(self, console: Console) -> None:
        """Print the table with its notes."""
        # narrow enough for 80 columns
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        head, *rest = self._columns()
        table.add_column(head, no_wrap=True)
        for column in rest:
            table.add_column(column, justify="right", no_wrap=True)
        previous = None
        for row, cells in zip(self.rows, self._cells("[bold green]{}[/]"), strict=True):
            if previous not in (None, row.part):
                table.add_section()
            previous = row.part
            table.add_row(*cells)
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", soft_wrap=True)

    def markdown(self) -> str:
        """Return the table with its notes as Markdown; the best merged scores are bold."""
        columns = self._columns()
        rule = ["---"] + ["---:"] * (len(columns) - 1)
        lines = [f"**{self.title}**", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (columns, rule, *self._cells("**{}**"))]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path, extra: Mapping[str, Any]) -> tuple[Path, Path]:
        """Write `results.json` and `results.md` into a folder and return their paths."""
        data = {
            "title": self.title,
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "better": self.better,
            "mean": self.mean_label,
            "rows": [
                {
                    "label": row.label,
                    "part": row.part,
                    "scores": dict(row.scores),
                    "mean": row.mean,
                    "merge_seconds": row.seconds,
                    "peak_bytes": row.peak_bytes,
                }
                for row in self.rows
            ],
            "notes": self.notes,
            **extra,
        }
        as_json, as_markdown = folder / "results.json", folder / "results.md"
        write_text(as_json, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        write_text(as_markdown, self.markdown())
        return as_json, as_markdown

    def _columns(self) -> list[str]:
        return ["", *self.tasks, self.mean_label, "merge s", "peak MB"]

    def _cells(self, emphasis: str) -> list[list[str]]:
        merged = [row for row in self.rows if row.part == "merged"]
        pick = min if self.better == "lower" else max
        best = [pick(scores) for scores in zip(*map(self._scores, merged), strict=True)]
        lines = []
        for row in self.rows:
            cells = [row.label]
            for score, top in zip(self._scores(row), best, strict=True):
                text = f"{score:.{self.decimals}f}"
                cells.append(emphasis.format(text) if row in merged and score == top else text)
            cells.append("" if row.seconds is None else f"{row.seconds:.2f}")
            cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}")
            lines.append(cells)
        return lines

    def _scores(self, row: Row) -> list[float]:
        return [*(row.scores[task] for task in self.tasks), row.mean]


def machine() -> str:
    """Return a description of the machine: cores, architecture, system, Python."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{count} cores, {platform.machine()}, {platform.system()}, "
        f"Python {platform.python_version()}"
    )


def paired_change(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference `one - other` over the same items, and its standard error."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))
