"""The report as one HTML file: tables and text are written here, plots by the page's script."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from pymerge.analysis.interference import ACROSS, predict_interference
from pymerge.analysis.page_data import mean_of, off_diagonal, page_data, percent, plain
from pymerge.analysis.records import Analysis
from pymerge.analysis.tables import DataTable, number, tables

__all__ = ["page"]

_SCALES = tuple(n / 20 for n in range(1, 31))  # for which the loss is predicted
# Nothing is loaded, whatever the names in a checkpoint contain.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def page(analysis: Analysis, plotly: str, advice: Sequence[str]) -> str:
    """Return the page.

    Args:
        analysis: the analysis to show.
        plotly: plotly.js, the whole text.
        advice: paragraphs of plain text.
    """
    data = page_data(analysis)
    data["predicted"] = _predicted(analysis)
    assets = resources.files("pymerge.analysis") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    scripts = [(assets / name).read_text(encoding="utf-8") for name in ("tables.js", "report.js")]
    title = f"Task vectors of {_count(len(analysis.models), 'model')}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
        '<a class="skip" href="#main">Skip to the content</a>',
        _navigation(analysis),
        f'<main id="main">\n<h1>{_text(title)}</h1>',
        f'<p class="soft">Against the base <strong>{_text(analysis.base.label)}</strong>'
        f" {_text(analysis.base.path)}</p>",
        "<noscript><p>The plots and the sorting of tables need JavaScript; the tables do not."
        "</p></noscript>",
        _facts(analysis),
        _advice(advice),
        *_sections(analysis, data),
        _notes(analysis, data["notes"]),
        "</main>",
        f'<script type="application/json" id="data">{_json(data)}</script>',
        *(f"<script>\n{text}</script>" for text in (scripts[0], plotly, scripts[1])),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _json(data: dict[str, Any]) -> str:
    """Return JSON that cannot end the element that contains it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _predicted(analysis: Analysis) -> dict[str, Any]:
    """Return each model's predicted loss at some scales, with and without interference."""
    found: dict[str, Any] = {"scales": list(_SCALES)}
    for key, across in (("lost", ACROSS), ("least", 0.0)):
        columns = [predict_interference(analysis, s, across=across).lost for s in _SCALES]
        found[key] = [[plain(percent(x)) for x in row] for row in zip(*columns, strict=True)]
    return found


def _navigation(analysis: Analysis) -> str:
    places = [("models", "Models"), ("between", "Between models"), ("depth", "Depth")]
    places += [("magnitudes", "Magnitudes")]
    if analysis.spectra:
        places.append(("spectra", "Spectra"))
    places += [("loss", "Expected loss"), ("tables", "Tables"), ("about", "Notes")]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in places)
    button = '<button type="button" id="theme">Dark</button>'
    return f'<nav aria-label="Sections"><div>{links}{button}</div></nav>'


def _facts(analysis: Analysis) -> str:
    whole = analysis.whole
    shown = [
        ("tensors", f"{whole.tensors:,}"),
        ("parameters", f"{whole.parameters:,}"),
    ]
    if len(analysis.models) > 1:
        shown += [
            ("mean cosine", number(mean_of(off_diagonal(whole.cosine)), 3)),
            ("mean sign conflict", _percents(mean_of(off_diagonal(whole.sign_conflict)))),
            ("equal weights", _percents(mean_of(off_diagonal(whole.equal)))),
        ]
    lengths = [x for x in whole.l2 if x is not None]
    if whole.base_l2 and lengths:
        low, high = (number(100 * f(lengths) / whole.base_l2, 3) for f in (min, max))
        span = low if low == high else f"{low} - {high}"
        shown.append(("length, % of the base", span))
    cells = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in shown)
    return f'<dl class="facts">{cells}</dl>'


def _percents(value: float | None) -> str:
    return number(percent(value), 3) + ("" if value is None else " %")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _advice(advice: Sequence[str]) -> str:
    if not advice:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in advice)
    return (
        '<section class="heuristic" aria-label="Heuristic advice"><p><span class="tag">heuristic'
        "</span>Rules of thumb from the numbers below, not a measurement of merged models.</p>"
        f"<ul>{items}</ul></section>"
    )


def _figure(key: str, caption: str, selects: Sequence[tuple[str, str]] = (), tall: str = "") -> str:
    """Return an empty plot with its selections (id, label), which the script fills."""
    controls = "".join(
        f'<label>{_text(label)}<select id="{key}-{name}"></select></label>'
        for name, label in selects
    )
    controls = f'<div class="controls">{controls}</div>' if controls else ""
    return (
        f'<figure><figcaption id="{key}-caption">{caption}</figcaption>{controls}'
        f'<div class="plot{tall}" id="{key}" role="img" aria-labelledby="{key}-caption"></div>'
        "</figure>"
    )


def _sections(analysis: Analysis, data: dict[str, Any]) -> list[str]:
    found = {table.key: table for table in tables(analysis)}
    parts = ['<h2 id="models">Models</h2>', _table(found["models"])]
    parts.append('<h2 id="between">Between models</h2>')
    if "pairs" in found:
        parts += [
            _figure(
                "pairs",
                "Each pair of models; the diagonal is left out.",
                [("statistic", "Show"), ("place", "of")],
                " tall",
            ),
            _table(found["pairs"]),
        ]
    else:
        parts.append("<p>There is one model: nothing to compare.</p>")
    parts.append('<h2 id="depth">Depth</h2>')
    models = _figure("models-lines", "Layers of each model.", [("statistic", "Show")])
    parts.append(
        f'<div class="row">{models}{_figure("models-map", "The same, layers by models.")}</div>'
    )
    second = [
        _figure(
            "pairs-lines",
            "Layers, mean of the pairs of models; the band is from the lowest pair to the highest.",
            [("statistic", "Show")],
        )
        if "pairs" in found
        else "",
        _figure("grid", "Layers by module types.", [("statistic", "Show")]) if data["grid"] else "",
    ]
    parts.append(f'<div class="row">{"".join(second)}</div>')
    if data["alike"]:
        parts.append(
            _figure(
                "alike",
                "Layers by layers: whether the same pairs of models have high cosines in both "
                f"(correlation over {data['alike']['pairs']} pairs).",
                tall=" tall",
            )
        )
    parts.append('<h2 id="magnitudes">Magnitudes</h2>')
    histogram = _figure(
        "histogram",
        "How often each magnitude |τ| of a task vector occurs; unchanged weights are not shown.",
        [("place", "Of")],
    )
    trim = _figure(
        "trim",
        "What the largest entries hold: share of the squared norm of the whole task vector that "
        "TIES' trim keeps.",
    )
    parts.append(f'<div class="row">{histogram}{trim if analysis.densities else ""}</div>')
    if analysis.spectra:
        parts.append('<h2 id="spectra">Spectra</h2>')
        one = _figure("spectra-models", "Matrices of each model.", [("statistic", "Show")])
        two = _figure("spectra-values", "Largest singular values.", [("tensor", "Of")])
        parts.append(f'<div class="row">{one}{two}</div>')
        if "pairs" in found:
            parts.append(
                _figure("spectra-pairs", "Between models, by matrix.", [("statistic", "Show")])
            )
        parts.append(_table(found["spectra"]))
    parts += [
        '<h2 id="loss">Expected loss of a weighted sum</h2>',
        '<div class="heuristic"><p><span class="tag">heuristic</span>The share of its fine-tune\'s '
        "gain that each model is expected to lose in base + λ (τ₁ + τ₂ + …): "
        f"(1 - c)² + {ACROSS:g} |r|² / |τ|², where c is how far the sum goes along the model's own "
        "task vector and r what is orthogonal to it. This is a second-order theory, which assumes "
        "a quadratic loss. In measured merges it predicted roughly how much is lost, but not "
        "which pairs of models lose more; it cannot compare methods."
        "</p></div>",
        _figure("predicted", "Solid: the rule. Dotted: only steps too short or too long."),
        '<h2 id="tables">Tables</h2>',
        *(f"<h3>{_text(found[k].title)}</h3>{_table(found[k])}" for k in ("layers", "types")),
        f"<h3>Tensors</h3>{_table(found['tensors'], search=True)}",
    ]
    return parts


def _table(table: DataTable, search: bool = False) -> str:
    heads = []
    for column in table.columns:
        about = f' title="{_text(column.about)}"' if column.about else ""
        kind = ' class="text"' if column.text else ""
        heads.append(
            f'<th scope="col"{kind}{about}><button type="button">{_text(column.name)}</button>'
        )
    starts = ["<td class=text>" if column.text else "<td>" for column in table.columns]
    rows = [
        "<tr>" + "".join(f"{start}{_text(cell)}" for start, cell in zip(starts, row, strict=True))
        for row in table.rows
    ]
    count = _count(len(rows), "row")
    tools = (
        f'<div class="tools"><label>Name contains<input type="search" data-of="{table.key}">'
        f'</label><span id="found-{table.key}" role="status">{count}</span></div>'
        if search
        else ""
    )
    return (
        f'{tools}<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}">'
        f'<table id="table-{table.key}"><thead><tr>{"".join(heads)}</thead><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _notes(analysis: Analysis, more: Sequence[str]) -> str:
    facts = analysis.facts
    made = [
        f"pymerge {facts.version}; {facts.backend}{f' ({facts.isa})' if facts.isa else ''} on "
        f"{facts.device}, {_count(facts.threads, 'thread')}; {facts.seconds:.3g} s.",
        f"{_bytes(facts.bytes_read)} read in {facts.passes} pass"
        f"{'es' if facts.passes != 1 else ''}; thresholds of the trims: {facts.thresholds}; at "
        f"most {_bytes(facts.peak_anonymous)} of memory beside the mapped files.",
        *(f"{model.label}: {model.path or 'tensors in memory'}" for model in analysis.models),
    ]
    items = "".join(f"<li>{_text(line)}</li>" for line in (*analysis.notes, *more, *made))
    return f'<h2 id="about">Notes, and what was read</h2><ul>{items}</ul>'
