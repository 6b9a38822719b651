"""Shows coefficients (text, PNG, HTML) and the progress of a fit."""

from __future__ import annotations

import html
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pymerge.errors import RequestError
from pymerge.output import write_file

if TYPE_CHECKING:
    from pymerge.adamerging.coefficients import Coefficients

__all__ = ["FitBar", "coefficients_text", "save_html", "save_png"]

_ROWS = 40  # groups in a printed table; files contain all


def coefficients_text(table: Coefficients) -> str:
    """Return a table of groups by models."""
    shown = list(table.groups[:_ROWS])
    first = max([len(name) for name in shown] + [5])
    widths = [max(len(name), 7) for name in table.models]
    head = "group".ljust(first) + "".join(
        f"  {name:>{width}}" for name, width in zip(table.models, widths, strict=True)
    )
    lines = [head]
    columns = table.values.T.tolist()
    for name, row in zip(shown, columns, strict=False):
        numbers = (f"  {x:>{w}.4f}" for x, w in zip(row, widths, strict=True))
        lines.append(name.ljust(first) + "".join(numbers))
    if len(table.groups) > _ROWS:
        lines.append(f"... and {len(table.groups) - _ROWS} more groups")
    if len(table.groups) > 1:
        mean = table.values.mean(dim=1).tolist()
        numbers = (f"  {x:>{w}.4f}" for x, w in zip(mean, widths, strict=True))
        lines.append("mean".ljust(first) + "".join(numbers))
    return "\n".join(lines)


def save_png(table: Coefficients, path: Path) -> None:
    """Draw a heat map of models by groups."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(
            f"save_png: needs matplotlib ({error}); pip install 'pymerge-kernels[plot]', or use "
            "save_html, which needs nothing"
        ) from None
    groups, models = len(table.groups), len(table.models)
    figure = Figure(figsize=(max(6.0, min(0.12 * groups, 40.0)), 1.6 + 0.35 * models))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = _range(table)
    image = axes.imshow(table.values.numpy(), aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_yticks(range(models), labels=list(table.models))
    step = max(1, groups // 60)
    places = list(range(0, groups, step))
    axes.set_xticks(places, labels=[table.groups[i] for i in places], rotation=90, fontsize=6)
    axes.set_title("merging coefficients")
    figure.colorbar(image, ax=axes, label="lambda")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def save_html(table: Coefficients, path: Path) -> None:
    """Write a coloured table of groups by models to one HTML file without scripts."""
    low, high = _range(table)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.models)
    rows = []
    for name, values in zip(table.groups, table.values.T.tolist(), strict=True):
        cells = "".join(
            f'<td style="background:{_colour(x, low, high)}">{x:.4f}</td>' for x in values
        )
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    style = (
        "body{font:13px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:2px 8px;text-align:right}th:first-child{text-align:left;font-weight:normal}"
        "thead th{position:sticky;top:0;background:Canvas}td{color:#000}"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Merging coefficients</title><style>{style}</style></head><body>"
        f"<h1>Merging coefficients</h1><p>{len(table.groups)} groups of tensors, "
        f"{len(table.models)} models; from {low:.4f} (light) to {high:.4f} (dark).</p>"
        f"<table><thead><tr><th>group</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</body></html>\n"
    )
    write_file(path, page)


def _range(table: Coefficients) -> tuple[float, float]:
    if table.values.numel() == 0:
        return 0.0, 1.0
    return float(table.values.min()), float(table.values.max())


def _colour(x: float, low: float, high: float) -> str:
    share = 0.5 if high <= low else (x - low) / (high - low)
    return f"hsl(205 75% {96 - 46 * share:.0f}%)"


class FitBar:
    """A progress bar on stderr with the entropy of each task; silent if stderr is not a
    terminal."""

    def __init__(self, steps: int, done: int, tasks: tuple[str, ...], *, shown: bool) -> None:
        self._steps, self._done, self._tasks, self._shown = steps, done, tasks, shown
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> FitBar:
        if self._shown:
            from rich.console import Console

            console = Console(stderr=True)
            if console.is_terminal:
                from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

                self._bar = Progress(
                    TextColumn("adamerging"),
                    BarColumn(bar_width=24),
                    TextColumn("{task.completed}/{task.total}"),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[entropies]}"),
                    console=console,
                )
                self._bar.start()
                self._task = self._bar.add_task(
                    "fit", total=self._steps, completed=self._done, entropies=""
                )
        return self

    def advance(self, entropies: list[float]) -> None:
        """Advance the bar by one step, and show its entropies."""
        if self._bar is not None:
            text = " ".join(f"{value:.3f}" for value in entropies)
            self._bar.update(self._task, advance=1, entropies=f"entropy {text}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
