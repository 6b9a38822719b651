"""Tables, plots and records of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pymerge
from benchmarks.quality.methods import METHODS
from benchmarks.quality.runner import Outcome, Run
from benchmarks.quality.suite import Suite
from benchmarks.tables import Table

__all__ = ["PUBLISHED", "paired", "plot", "records", "tables"]

# Mean accuracy of eight tasks with CLIP's ViT-B/32, as repeated in later papers' tables
# (WUDI-Merging's, StatsMerging's). For orientation only: another model, other tasks.
PUBLISHED: Mapping[str, float] = {
    "pretrained": 48.0,
    "individual": 90.5,
    "multi_task": 88.9,
    "averaging": 65.8,
    "fisher": 68.3,
    "regmean": 71.8,
    "task_arithmetic": 69.1,
    "ties": 72.4,
    "ties_sum": 72.9,
    "consensus": 73.6,
    "pcb_vision": 76.3,
    "ada_task": 71.1,
    "ada_task_pp": 73.7,
    "ada_layer": 80.1,
    "ada_layer_pp": 81.1,
}
# The row with which every other row is compared: the simplest method that has a coefficient.
REFERENCE = "task_arithmetic"
_REFERENCE_ROWS = ("pretrained", "individual", "multi_task")


def paired(one: Sequence[Outcome], other: Sequence[Outcome]) -> tuple[float, float]:
    """Return the difference of mean scores (one - other) and half of its 95 % confidence interval.

    Item by item: the mean over seeds of each item's difference, then the mean over items of each
    task, then the mean over tasks. The interval is over items, not over seeds.
    """
    means, variances = [], []
    for task in range(len(one[0].items)):
        pairs = [
            zip(a.items[task], b.items[task], strict=True) for a, b in zip(one, other, strict=True)
        ]
        items = [
            sum(x - y for x, y in per_seed) / len(one) for per_seed in zip(*pairs, strict=True)
        ]
        mean = sum(items) / len(items)
        means.append(mean)
        spread = sum((value - mean) ** 2 for value in items) / max(1, len(items) - 1)
        variances.append(spread / len(items))
    tasks = len(means)
    return sum(means) / tasks, 1.96 * math.sqrt(sum(variances)) / tasks


def tables(suite: Suite, found: Run, *, published: bool = False) -> dict[str, Table]:
    """Return the tables of a run by the names of their markers in docs/quality.md.

    Args:
        published: add the column of published results of another benchmark.
    """
    name = f"quality-{suite.name}"
    return {
        name: _overview(suite, found, published),
        f"{name}-tasks": _by_task(suite, found),
        f"{name}-search": _search(suite, found),
    }


def _group(found: Run, method: str, chosen: bool) -> list[Outcome]:
    return [o for o in found.outcomes if o.method == method and o.chosen == chosen]


def _rows(found: Run) -> list[str]:
    """Return the methods' keys: those that are not merges first, then the methods in order."""
    there = {outcome.method for outcome in found.outcomes}
    order = [*_REFERENCE_ROWS, *(m.key for m in METHODS)]
    return [key for key in order if key in there] + sorted(there - set(order))


def _mean(suite: Suite, outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Return the mean over seeds, in the shown unit, and the largest deviation from it."""
    means = [suite.shown(sum(o.scores) / len(o.scores)) for o in outcomes]
    centre = sum(means) / len(means)
    return centre, max(abs(value - centre) for value in means)


def _overview(suite: Suite, found: Run, published: bool) -> Table:
    digits = 1 if suite.better == "higher" else 2
    columns = ["", "as recommended", "coefficient from validation", "chosen", "seeds +-"]
    columns.append("against task arithmetic (95 %)")
    if published:
        columns.append("published: ViT-B/32 on CLIP's 8")
    table = Table(f"{suite.title}: {suite.unit}, mean of the tasks", columns)
    reference = _group(found, REFERENCE, True)
    per_task = {method.key for method in METHODS if method.per_task}
    for key in _rows(found):
        default, chosen = _group(found, key, False), _group(found, key, True)
        outcomes = chosen or default
        centre, spread = _mean(suite, outcomes)
        label = outcomes[0].label + (" (a model for each task)" if key in per_task else "")
        values = sorted({o.value for o in chosen if o.value is not None})
        searched = bool(values) and any(s["method"] == key for s in found.searches)
        cells = [label, f"{_mean(suite, default)[0]:.{digits}f}"]
        cells.append(f"{centre:.{digits}f}" if searched else "")
        cells.append(", ".join(f"{value:g}" for value in values) if searched else "")
        cells.append(f"{spread:.{digits}f}" if len(outcomes) > 1 else "")
        cells.append(_against(suite, outcomes, reference) if key != REFERENCE else "")
        if published:
            cells.append(f"{PUBLISHED[key]:.1f}" if key in PUBLISHED else "")
        table.add(*cells)
    table.notes.append(describe_geometry(found))
    labels = {method.key: method.label for method in METHODS}
    for key, what in found.missing.items():
        table.add(labels[key], *["not available yet"], *[""] * (len(columns) - 2))
        table.notes.append(f"{labels[key]}: this version has no {what}.")
    return table


def describe_geometry(found: Run) -> str:
    """Return a sentence on the length of the task vectors and how far their directions agree."""
    lengths = [100 * value for one in found.geometry for value in one["lengths"]]
    cosines = [value for one in found.geometry for value in one["cosines"]]
    return (
        f"Task vectors are {min(lengths):.1f} to {max(lengths):.1f} % as long as the base; the"
        f" cosine of two is {sum(cosines) / len(cosines):.3f} in the mean, {min(cosines):.3f} to"
        f" {max(cosines):.3f}."
    )


def _against(suite: Suite, one: Sequence[Outcome], other: Sequence[Outcome]) -> str:
    if len(one) != len(other) or not one:
        return ""
    mean, half = paired(one, other)
    if suite.better == "lower":  # items are log-likelihoods: a ratio of perplexities
        low, centre, high = (100 * math.expm1(-v) for v in (mean + half, mean, mean - half))
        return f"{centre:+.1f} % ({low:+.1f} to {high:+.1f})"
    low, centre, high = (suite.shown(value) for value in (mean - half, mean, mean + half))
    return f"{centre:+.1f} ({low:+.1f} to {high:+.1f})"


def _by_task(suite: Suite, found: Run) -> Table:
    digits = 1 if suite.better == "higher" else 2
    table = Table(
        f"{suite.title}: {suite.unit}, each task, coefficients from validation",
        ["", *suite.tasks, "mean"],
    )
    for key in _rows(found):
        outcomes = _group(found, key, True) or _group(found, key, False)
        count = len(outcomes)
        scores = [
            suite.shown(sum(o.scores[task] for o in outcomes) / count)
            for task in range(len(suite.tasks))
        ]
        cells = [f"{score:.{digits}f}" for score in scores]
        table.add(outcomes[0].label, *cells, f"{_mean(suite, outcomes)[0]:.{digits}f}")
    return table


def _search(suite: Suite, found: Run) -> Table:
    digits = 1 if suite.better == "higher" else 2
    table = Table(
        f"{suite.title}: {suite.unit} on validation data at each setting",
        ["", "coefficient", "setting: score"],
    )
    for method in METHODS:
        searches = [s for s in found.searches if s["method"] == method.key]
        if not searches:
            continue
        curve = curve_of(suite, searches)
        cells = [f"{value:g}: {score:.{digits}f}" for value, score in curve]
        table.add(method.label, method.symbol, " / ".join(cells))
    return table


def curve_of(suite: Suite, searches: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return (setting, mean validation score over tasks and seeds) of a method."""
    points = []
    for position, value in enumerate(searches[0]["values"]):
        means = [sum(s["validation"][position]) / len(suite.tasks) for s in searches]
        points.append((value, suite.shown(sum(means) / len(means))))
    return points


def records(suite: Suite, found: Run, seconds: float) -> list[dict[str, Any]]:
    """Return everything for the JSON file: settings, searches, each task's score of each row.

    Args:
        seconds: duration of the run; less if parts were kept from an earlier one.
    """
    return [
        {
            "suite": suite.name,
            "tasks": dict(zip(suite.tasks, suite.about, strict=True)),
            "settings": suite.settings(),
            "pymerge": pymerge.__version__,
            "seconds": round(seconds, 1),
            "load_average": list(os.getloadavg()),
            "missing": found.missing,
            "geometry": found.geometry,
            "searches": found.searches,
            "extras": found.extras,
            "outcomes": [
                {
                    "method": outcome.method,
                    "label": outcome.label,
                    "seed": outcome.seed,
                    "chosen_on_validation": outcome.chosen,
                    "value": outcome.value,
                    "scores": dict(zip(suite.tasks, outcome.scores, strict=True)),
                    "items": [len(values) for values in outcome.items],
                }
                for outcome in found.outcomes
            ],
        }
    ]


def plot(suite: Suite, found: Run, path: Path) -> None:
    """Draw score against coefficient (validation) and the test scores of all rows.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit(f"the plots need matplotlib ({error}): pip install matplotlib") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for method in METHODS:
        searches = [s for s in found.searches if s["method"] == method.key]
        if searches and method.symbol in ("lambda", "scale"):
            x, y = zip(*curve_of(suite, searches), strict=True)
            number = len(left.lines)
            left.plot(
                x,
                y,
                marker="o",
                markersize=3,
                linewidth=1.2,
                color=plt.get_cmap("tab10")(number % 7),
                linestyle=("-", "--", ":")[number // 7 % 3],
                label=method.label,
            )
    left.set_xscale("log")
    left.set_xlabel("coefficient")
    left.set_ylabel(f"{suite.unit}, validation")
    left.legend(fontsize=7, ncols=2)
    keys = _rows(found)[::-1]
    groups = [_group(found, key, True) or _group(found, key, False) for key in keys]
    values = [_mean(suite, group) for group in groups]
    right.barh(
        [group[0].label for group in groups],
        [value for value, _ in values],
        xerr=[spread for _, spread in values],
        color=["#999999" if key in _REFERENCE_ROWS else "#3b75af" for key in keys],
    )
    low = min(value for value, _ in values)
    high = max(value for value, _ in values)
    right.set_xlim(low - 0.15 * (high - low), high + 0.05 * (high - low))
    right.tick_params(axis="y", labelsize=8)
    right.set_xlabel(f"{suite.unit}, test; bars: seeds")
    figure.suptitle(suite.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
