"""The report's plots as PNG files, for papers, model cards and terminals that show images."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

from pymerge.analysis.page_data import mean_of, off_diagonal, percent
from pymerge.analysis.records import Analysis, Matrix

__all__ = ["pictures"]

_MANY = 12  # up to this many models, cells have numbers
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#5b3fa8", "#555555")
_DASHES = ("-", "--", ":", "-.")


def pictures(analysis: Analysis) -> dict[str, bytes]:
    """Return PNG files by name: `pairs.png` (for two or more models), `depth.png`,
    `magnitudes.png`, and `spectra.png` if there are spectra."""
    found = {}
    if len(analysis.models) > 1:
        found["pairs.png"] = _pairs(analysis)
    found["depth.png"] = _depth(analysis)
    found["magnitudes.png"] = _magnitudes(analysis)
    if analysis.spectra:
        found["spectra.png"] = _spectra(analysis)
    return found


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    """Return the file; the same figure gives the same bytes."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return target.getvalue()


def _label(text: str, length: int = 26) -> str:
    """Return a name that fits, and that matplotlib does not interpret as a formula."""
    if len(text) > length:
        half = (length - 1) // 2
        text = f"{text[: length - 1 - half]}…{text[len(text) - half :]}"
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable.replace("$", r"\$")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        "linewidth": 1.3,
    }


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _pairs(analysis: Analysis) -> bytes:
    whole = analysis.whole
    panels: list[tuple[str, Matrix, bool]] = [
        ("cosine", whole.cosine, True),
        ("sign conflict, %", whole.sign_conflict, False),
    ]
    if whole.trimmed:
        trimmed = whole.trimmed[len(whole.trimmed) // 2]
        name = f"overlap of the top {100 * trimmed.density:g} %, %"
        panels.append((name, trimmed.overlap, False))
    panels.append(("equal weights, %", whole.equal, False))
    count = len(analysis.models)
    side = min(8.0, 2.2 + 0.33 * count)
    columns = 2
    rows = -(-len(panels) // columns)
    figure = _figure(1.25 * side * columns, side * rows)
    names = [_label(label) for label in analysis.labels]
    for number, (title, matrix, signed) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        cells = [
            [math.nan if i == j else _cell(x, signed) for j, x in enumerate(row)]
            for i, row in enumerate(matrix)
        ]
        known = [abs(x) for row in cells for x in row if not math.isnan(x)]
        limit = max(known, default=1.0) or 1.0
        low = -limit if signed else min(known, default=0.0)
        image = axes.imshow(
            cells, cmap="RdBu_r" if signed else "Blues", vmin=low, vmax=limit, aspect="auto"
        )
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(count), labels=names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(count), labels=names, fontsize=8)
        if count <= _MANY:
            for i, row in enumerate(cells):
                for j, x in enumerate(row):
                    if not math.isnan(x):
                        near = (abs(x) if signed else x - low) > 0.6 * (
                            limit - (0 if signed else low)
                        )
                        axes.text(
                            j,
                            i,
                            f"{x:.3g}",
                            ha="center",
                            va="center",
                            fontsize=7,
                            color="white" if near else "black",
                        )
        figure.colorbar(image, ax=axes)
    return _png(figure)


def _cell(value: float | None, signed: bool) -> float:
    shown = value if signed else percent(value)
    return math.nan if shown is None else shown


def _ticks(axes: Any, names: Sequence[str]) -> None:
    step = max(1, len(names) // 24)
    places = list(range(0, len(names), step))
    turned = any(len(name) > 3 for name in names)
    axes.set_xticks(
        places,
        labels=[_label(names[place], 18) for place in places],
        rotation=60 if turned else 0,
        fontsize=8,
    )
    axes.set_xlabel("layer")
    axes.grid(alpha=0.25)


def _depth(analysis: Analysis) -> bytes:
    layers = analysis.layers
    names = [group.name for group in layers]
    several = len(analysis.models) > 1
    figure = _figure(16 if several else 6, 4.2)
    axes = figure.add_subplot(1, 3 if several else 1, 1)
    for k, label in enumerate(analysis.labels):
        values = _gaps([percent(group.norm_share[k]) for group in layers])
        axes.plot(range(len(layers)), values, label=_label(label), **_style(k))
    axes.set_title("share of the squared norm, %", fontsize=11)
    axes.set_ylim(bottom=0)
    _ticks(axes, names)
    if several:
        axes.legend(fontsize=7, ncols=2)
        first = figure.add_subplot(1, 3, 2)
        rows = [[x for x in off_diagonal(g.cosine) if x is not None] for g in layers]
        _band(first, rows)
        first.set_title("cosine: mean, lowest and highest of the pairs", fontsize=11)
        _ticks(first, names)
        second = figure.add_subplot(1, 3, 3)
        values = [percent(mean_of(off_diagonal(g.sign_conflict))) for g in layers]
        second.plot(range(len(layers)), _gaps(values), label="all", **_style(0))
        for n, density in enumerate(analysis.densities):
            values = [percent(mean_of(off_diagonal(g.trimmed[n].sign_conflict))) for g in layers]
            second.plot(
                range(len(layers)), _gaps(values), label=f"top {100 * density:g} %", **_style(n + 1)
            )
        second.set_title("sign conflict, %, mean of the pairs", fontsize=11)
        second.legend(fontsize=7)
        _ticks(second, names)
    return _png(figure)


def _band(axes: Any, rows: Sequence[Sequence[float]]) -> None:
    places = range(len(rows))
    axes.fill_between(
        places,
        _gaps([min(row, default=None) for row in rows]),
        _gaps([max(row, default=None) for row in rows]),
        color=_COLOURS[0],
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(places, _gaps([mean_of(row) for row in rows]), **_style(0))


def _magnitudes(analysis: Analysis) -> bytes:
    histogram = analysis.whole.histogram
    trimmed = analysis.whole.trimmed
    figure = _figure(11 if trimmed else 6, 4.2)
    axes = figure.add_subplot(1, 2 if trimmed else 1, 1)
    if histogram.log2_edges:
        edges = [2.0**edge for edge in histogram.log2_edges]
        widths = [b - a for a, b in itertools.pairwise(histogram.log2_edges)]
        for k, label in enumerate(analysis.labels):
            total = max(1, analysis.whole.parameters)
            shares = [
                100 * count / total / width
                for count, width in zip(histogram.counts[k], widths, strict=True)
            ]
            axes.stairs(shares, edges, label=_label(label), **_style(k))
        axes.set_xscale("log")
        axes.legend(fontsize=7)
    axes.set_title("magnitudes of the task vectors, % of the entries per octave", fontsize=11)
    axes.set_xlabel("magnitude")
    axes.grid(alpha=0.25)
    if trimmed:
        other = figure.add_subplot(1, 2, 2)
        for k, label in enumerate(analysis.labels):
            values = _gaps([percent(one.kept_norm[k]) for one in trimmed])
            densities = [100 * one.density for one in trimmed]
            other.plot(
                densities, values, marker="o", markersize=3, label=_label(label), **_style(k)
            )
        other.set_ylim(0, 103)
        other.set_xlim(left=0)
        other.set_title("squared norm in the largest entries, %", fontsize=11)
        other.set_xlabel("density, % of the entries")
        other.grid(alpha=0.25)
    return _png(figure)


def _spectra(analysis: Analysis) -> bytes:
    spectra = analysis.spectra
    figure = _figure(max(8.0, min(24.0, 3 + 0.14 * len(spectra))), 4.6)
    axes = figure.add_subplot()
    for k, label in enumerate(analysis.labels):
        values = _gaps([spectrum.effective_rank[k] for spectrum in spectra])
        style = {**_style(k), "linestyle": "none"}
        axes.plot(
            range(len(spectra)), values, marker="o", markersize=3, label=_label(label), **style
        )
    step = max(1, len(spectra) // 60)
    places = list(range(0, len(spectra), step))
    axes.set_xticks(
        places,
        labels=[_label(spectra[place].tensor, 34) for place in places],
        rotation=90,
        fontsize=6,
    )
    axes.set_ylim(bottom=0)
    axes.set_title("effective rank of the task vectors' matrices", fontsize=11)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.25)
    return _png(figure)
