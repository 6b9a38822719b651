"""Draws a search: the best so far, the variables over time, parallel coordinates."""

from __future__ import annotations

import html as text_html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.output.replace import replace_file

if TYPE_CHECKING:
    from pymerge.search.journal import Trial
    from pymerge.search.space import Variable
    from pymerge.search.study import SearchResult

__all__ = ["best_so_far", "html", "save_pngs"]

_MOST_VARIABLES = 24  # of one plot; the page and the tables have all


def best_so_far(result: SearchResult) -> list[tuple[int, float]]:
    """Return (trial, best value until then), from the first trial with a value."""
    sign = 1.0 if result.config.direction == "maximize" else -1.0
    best: float | None = None
    found = []
    for trial in result.trials:
        if trial.value is not None and (best is None or sign * trial.value > sign * best):
            best = trial.value
        if best is not None:
            found.append((trial.number, best))
    return found


def _complete(result: SearchResult) -> list[Trial]:
    return [trial for trial in result.trials if trial.value is not None]


def _title(result: SearchResult) -> str:
    config = result.config
    return f"{config.metric_name} on {config.search_data.name} ({config.sampler})"


def save_pngs(result: SearchResult, folder: Path) -> list[Path]:
    """Write history.png, coefficients.png and parallel.png."""
    from matplotlib.figure import Figure

    def figure(height: float = 4.0) -> tuple[Any, Any]:
        made = Figure(figsize=(8, height), layout="constrained")
        return made, made.subplots()

    paths = []

    def save(made: Any, name: str) -> None:
        picture = io.BytesIO()
        made.savefig(picture, dpi=75, format="png")
        paths.append(folder / name)
        replace_file(paths[-1], picture.getvalue())

    done = _complete(result)
    numbers, values = [t.number for t in done], [t.value or 0.0 for t in done]
    made, axes = figure()
    axes.plot(numbers, values, "o", markersize=3, alpha=0.6, label="trial")
    axes.step(*zip(*best_so_far(result), strict=True), where="post", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("value")
    axes.set_title(_title(result), fontsize="small")
    axes.legend()
    save(made, "history.png")

    variables = result.space.variables[:_MOST_VARIABLES]
    assert result.best is not None
    made, axes = figure(5.0)
    for variable in variables:
        places = [variable.domain.unit(t.values[variable.name]) for t in done]
        (line,) = axes.plot(
            numbers, places, linewidth=0.8, alpha=0.7, label=_label(result, variable)
        )
        best = variable.domain.unit(result.best.values[variable.name])
        axes.plot(result.best.number, best, "*", color=line.get_color(), markersize=9)
    axes.set_xlabel("trial (star: the best)")
    axes.set_ylabel("place within the bounds")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize="x-small", ncols=2, loc="upper left", bbox_to_anchor=(0, -0.15))
    save(made, "coefficients.png")

    made, axes = figure(5.0)
    low, high = min(values), max(values)
    from matplotlib import colormaps

    colors = colormaps["viridis"]
    sign = 1.0 if result.config.direction == "maximize" else -1.0
    for trial in sorted(done, key=lambda t: sign * (t.value or 0.0)):
        value = trial.value or 0.0
        share = (value - low) / (high - low) if high > low else 0.5
        places = [v.domain.unit(trial.values[v.name]) for v in variables]
        best = trial.number == result.best.number
        style: dict[str, Any] = {"color": "red", "linewidth": 2} if best else {"linewidth": 0.7}
        axes.plot(range(len(variables)), places, **{"color": colors(share), "alpha": 0.8, **style})
    axes.set_xticks(range(len(variables)), [_label(result, v) for v in variables], rotation=60)
    axes.set_ylabel("place within the bounds")
    axes.set_title(f"bright: high; red: the best ({result.best.value:.6g})", fontsize="small")
    save(made, "parallel.png")
    return paths


def _label(result: SearchResult, variable: Variable) -> str:
    """Return a short name: the parameter, the model's folder, the group."""
    parts = [variable.parameter]
    if variable.models is not None and len(variable.models) == 1:
        model = result.space.raw["models"][variable.models[0]]["model"]
        folder = Path(model).name if isinstance(model, str) else ""
        shown = f"{folder[:17]}..." if len(folder) > 20 else folder
        parts.append(shown or f"models[{variable.models[0]}]")
    return " ".join([*parts, *([variable.group] if variable.group else [])])


def html(result: SearchResult) -> str:
    """Return a self-contained page: plots, and a table of all trials."""
    import plotly.graph_objects as go
    import plotly.io

    done = _complete(result)
    numbers: Sequence[int] = [t.number for t in done]
    values = [t.value for t in done]
    steps = best_so_far(result)
    history = go.Figure(
        [
            go.Scatter(x=numbers, y=values, mode="markers", name="trial"),
            go.Scatter(
                x=[number for number, _ in steps],
                y=[value for _, value in steps],
                mode="lines",
                line_shape="hv",
                name="best so far",
            ),
        ]
    )
    history.update_layout(title="Best so far", xaxis_title="trial", yaxis_title="value")
    trajectories = go.Figure(
        [
            go.Scatter(
                x=numbers, y=[t.values[v.name] for t in done], name=_label(result, v), mode="lines"
            )
            for v in result.space.variables
        ]
    )
    trajectories.update_layout(title="Coefficients", xaxis_title="trial", yaxis_title="value")
    parallel = go.Figure(
        go.Parcoords(
            line={"color": values, "colorscale": "Viridis", "showscale": True},
            dimensions=[
                {
                    "label": _label(result, v),
                    "range": [v.domain.low, v.domain.high]
                    if v.domain.high > v.domain.low
                    else [v.domain.low - 0.5, v.domain.high + 0.5],
                    "values": [t.values[v.name] for t in done],
                }
                for v in result.space.variables
            ]
            + [{"label": "value", "values": values}],
        )
    )
    parallel.update_layout(title="Parallel coordinates")
    parts = []
    for number, figure in enumerate((history, trajectories, parallel)):
        parts.append(plotly.io.to_html(figure, full_html=False, include_plotlyjs=number == 0))
    return _PAGE.format(
        title=text_html.escape(_title(result)),
        summary=text_html.escape(_summary(result)),
        plots="\n".join(parts),
        table=_table(result),
    )


def _summary(result: SearchResult) -> str:
    best, config = result.best, result.config
    assert best is not None
    return (
        f"Best: trial {best.number} of {len(result.trials)}, {best.value:.6g} "
        f"({config.direction}). Chosen on {config.search_data}. {result.failures} failures; "
        f"{result.seconds_merging:.1f} s merging, {result.seconds_evaluating:.1f} s evaluating."
    )


def _table(result: SearchResult) -> str:
    names = result.space.names
    head = "".join(f"<th>{text_html.escape(name)}</th>" for name in ["trial", "value", *names])
    rows = []
    for trial in result.trials:
        value = f"{trial.value:.6g}" if trial.value is not None else trial.error or "failed"
        cells = [str(trial.number), value, *(f"{trial.values[name]:.5g}" for name in names)]
        mark = ' class="best"' if trial is result.best else ""
        inner = "".join(f"<td>{text_html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{mark}>{inner}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:1.5em}} table{{border-collapse:collapse;font-size:small}}
td,th{{border:1px solid #ccc;padding:2px 6px;text-align:right}} .best{{background:#ffe9a8}}
.wide{{overflow-x:auto}}</style></head>
<body><h1>{title}</h1><p>{summary}</p>
{plots}
<h2>Trials</h2><div class="wide">{table}</div>
</body></html>
"""
