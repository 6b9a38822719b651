"""The summary of an analysis for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from pymerge.analysis.records import Analysis, Group

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["print_summary"]

_PAIRS, _LAYERS = 28, 12  # rows of a table; the files have all
_WIDTH = 140  # if there is no terminal to determine the width


def print_summary(
    analysis: Analysis, *, advice: Sequence[str] = (), stream: TextIO | None = None
) -> None:
    """Print the most important results; as plain text if the stream is not a terminal.

    Args:
        analysis: the result of `pymerge.analyze`.
        advice: paragraphs, shown as heuristic.
        stream: default stdout.
    """
    from rich.console import Console

    to = sys.stdout if stream is None else stream
    console = Console(file=to, highlight=False, width=None if to.isatty() else _WIDTH)
    facts, whole = analysis.facts, analysis.whole
    speed = facts.bytes_read / facts.seconds / 1e9 if facts.seconds > 0 else 0.0
    passes = "1 pass" if facts.passes == 1 else f"{facts.passes} passes"
    _say(
        console,
        f"{len(analysis.models)} task vectors over {whole.parameters:,} parameters in "
        f"{whole.tensors} tensors; {passes}, {facts.bytes_read / 1e9:.2f} GB in "
        f"{facts.seconds:.2f} s ({speed:.1f} GB/s), {facts.backend}",
    )
    console.print(_models(analysis))
    if len(analysis.models) > 1:
        console.print(_pairs(analysis))
        _say(console, f"sign agreement {_number(whole.sign_agreement)}" + _trimmed(whole))
    console.print(_layers(analysis))
    for note in analysis.notes:
        _say(console, f"note: {note}")
    for text in advice:
        _say(console, f"heuristic: {text}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _row(table: Table, first: str, values: Sequence[str]) -> None:
    from rich.text import Text

    table.add_row(Text(first), *values)


def _models(analysis: Analysis) -> Table:
    whole = analysis.whole
    kept = [f"norm kept @{trimmed.density:g}" for trimmed in whole.trimmed]
    columns = ["model", "norm", "of the base's", "unchanged", "median |tau|", *kept]
    table = _table("\nTask vectors", columns)
    median = whole.quantiles.levels.index(0.5)
    for k, label in enumerate(analysis.labels):
        norm = whole.l2[k]
        relative = norm / whole.base_l2 if norm is not None and whole.base_l2 else None
        values = [
            _number(norm),
            _percent(relative),
            _percent(whole.unchanged[k]),
            _number(whole.quantiles.values[k][median]),
            *(_percent(trimmed.kept_norm[k]) for trimmed in whole.trimmed),
        ]
        _row(table, label, values)
    return table


def _pairs(analysis: Analysis) -> Table:
    whole, labels = analysis.whole, analysis.labels
    at = [f"conflict @{trimmed.density:g}" for trimmed in whole.trimmed]
    at += [f"overlap @{trimmed.density:g}" for trimmed in whole.trimmed]
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    # Those that have most in common first.
    pairs.sort(key=lambda pair: -abs(whole.cosine[pair[0]][pair[1]] or 0.0))
    more = f" ({_PAIRS} of {len(pairs)}, of largest cosine)" if len(pairs) > _PAIRS else ""
    table = _table(f"\nPairs{more}", ["models", "cosine", "equal", "conflict", *at])
    for i, j in pairs[:_PAIRS]:
        values = [
            _cosine(whole.cosine[i][j]),
            _percent(whole.equal[i][j]),
            _percent(whole.sign_conflict[i][j]),
            *(_percent(trimmed.sign_conflict[i][j]) for trimmed in whole.trimmed),
            *(_percent(trimmed.overlap[i][j]) for trimmed in whole.trimmed),
        ]
        _row(table, f"{labels[i]} / {labels[j]}", values)
    return table


def _trimmed(whole: Group) -> str:
    return "".join(f", {_number(t.sign_agreement)} @{t.density:g}" for t in whole.trimmed)


def _layers(analysis: Analysis) -> Table:
    groups = analysis.layers
    title = "\nLayers"
    if len(groups) > _LAYERS:
        title += f" ({_LAYERS} of {len(groups)}, of largest norm)"
        groups = sorted(groups, key=lambda group: -_mean(group.norm_share))[:_LAYERS]
    table = _table(title, ["layer", "parameters", "norm share", "mean cosine", "mean conflict"])
    for group in groups:
        shares = [value for value in group.norm_share if value is not None]
        span = f"{min(shares):.1%} - {max(shares):.1%}" if shares else "-"
        values = [
            f"{group.parameters:,}",
            span,
            _cosine(_mean_of_pairs(group.cosine)),
            _percent(_mean_of_pairs(group.sign_conflict)),
        ]
        _row(table, group.name, values)
    return table


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def _mean_of_pairs(matrix: Sequence[Sequence[float | None]]) -> float | None:
    pairs = [value for i, row in enumerate(matrix) for value in row[i + 1 :]]
    known = [value for value in pairs if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return (
        "-" if value is None else f"{value:.1%}" if value >= 0.001 or value == 0 else f"{value:.1e}"
    )
