"""Tables, plot and record of the study of interference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import pymerge
from benchmarks.quality.correlation import Correlation
from benchmarks.quality.interference_study import GAIN, OUTCOMES, RULE, STATISTICS, Row, Study
from benchmarks.tables import Table
from pymerge.analysis.interference import ACROSS

__all__ = ["judge_rule", "plot", "record", "tables"]

_NAME = "quality-interference"
# The recipe whose correlations are shown in full.
_DETAIL = "task_arithmetic"


def tables(found: Study) -> dict[str, Table]:
    """Return the tables by the names of their markers in docs/analysis.md."""
    made = {
        f"{_NAME}-merges": _merges(found),
        f"{_NAME}-accuracy": _matrix(found, "accuracy"),
        f"{_NAME}-nats": _matrix(found, "log-probability"),
        f"{_NAME}-share": _matrix(found, "share of the gain"),
        f"{_NAME}-detail": _detail(found, "log-probability", _DETAIL),
        f"{_NAME}-rule": _rule(found),
    }
    return made


def _merges(found: Study) -> Table:
    table = Table(
        "What merges of two and of three fine-tunes lose on their own tasks",
        [
            "",
            "accuracy lost, points",
            "lowest to highest pair",
            "reliability",
            "nats lost",
            "lowest to highest pair",
            "reliability",
            "of the gain in nats",
            "triples: points",
            "triples: of the gain",
        ],
    )
    pairs = found.pairs
    rest = [n for n in range(len(found.sets)) if n not in pairs]
    for recipe in found.recipes:
        cells = [recipe.label]
        for name, digits in (("accuracy", 1), ("log-probability", 3)):
            values = [found.outcomes[name][recipe.key][n] for n in pairs]
            trust = found.reliability[name][recipe.key]
            cells += [
                f"{np.mean(values):.{digits}f}",
                f"{min(values):.{digits}f} to {max(values):.{digits}f}",
                "" if trust is None else f"{trust:.2f}",
            ]
        share = found.outcomes["share of the gain"][recipe.key]
        cells.append(f"{np.mean([share[n] for n in pairs]):.0f} %")
        if rest:
            points = found.outcomes["accuracy"][recipe.key]
            cells.append(f"{np.mean([points[n] for n in rest]):.1f}")
            cells.append(f"{np.mean([share[n] for n in rest]):.0f} %")
        else:
            cells += ["", ""]
        table.add(*cells)
    table.notes += [
        f"{len(pairs)} pairs and {len(rest)} triples of {len(found.tasks)} tasks; seeds:"
        f" {len(found.seeds)}. Each model against the fine-tune of the same task, on the test"
        " texts; means over the tasks merged, and over seeds. Coefficients are fixed.",
        "Reliability: of the pairs' values, from halves of the test texts. No statistic can be"
        " expected to correlate with a value above the root of its reliability.",
    ]
    if len(found.seeds) > 1:
        spread = [
            f"{recipe.label} {_signed(found.between_seeds['accuracy'][recipe.key])} /"
            f" {_signed(found.between_seeds['log-probability'][recipe.key])}"
            for recipe in found.recipes
        ]
        table.notes.append(
            "Spearman between the pairs' losses of two seeds, accuracy / nats: "
            + ", ".join(spread)
            + "."
        )
    return table


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _marked(one: Correlation, together: bool) -> str:
    if one.spearman is None:
        return ""
    mark = ""
    if one.p is not None and one.p < 0.05:
        mark = "*"
    if together and one.p_adjusted is not None and one.p_adjusted < 0.05:
        mark = "**"
    return f"{one.spearman:+.2f}{mark}"


def _names(found: Study, outcome: str) -> list[str]:
    names = [*STATISTICS, RULE]
    return [*names, GAIN] if outcome in found.gain else names


def _matrix(found: Study, outcome: str) -> Table:
    what = {
        "accuracy": "accuracy lost",
        "log-probability": "nats lost",
        "share of the gain": "share of the gain in nats that is lost",
    }[outcome]
    table = Table(
        f"Spearman's correlation over {len(found.pairs)} pairs with the {what}",
        ["statistic of the task vectors", *(recipe.label for recipe in found.recipes)],
    )
    for name in _names(found, outcome):
        each = [found.correlations[outcome][recipe.key].get(name) for recipe in found.recipes]
        table.add(name, *("" if one is None else _marked(one, name != GAIN) for one in each))
    table.notes.append(
        f"* p < 0.05 by itself, ** p < 0.05 for all {len(STATISTICS)} to {len(STATISTICS) + 1}"
        " statistics of a column together (permutations of the tasks, two-sided). Not adjusted for"
        f" the {len(found.recipes)} columns, nor for the {len(OUTCOMES)} tables."
    )
    if outcome in found.gain:
        table.notes.append(
            "The last row is no statistic of the weights and was tested by itself: what the"
            " fine-tunes had gained over the base."
        )
    return table


def _detail(found: Study, outcome: str, recipe: str) -> Table:
    label = next(r.label for r in found.recipes if r.key == recipe)
    table = Table(
        f"{label}: correlations with the nats lost, in full",
        ["", "Spearman", "95 %", "Pearson", "p", "p, all together", "Spearman, triples"],
    )
    for name in _names(found, outcome):
        one = found.correlations[outcome][recipe].get(name)
        if one is None or one.spearman is None:
            continue
        triple = found.triples[outcome][recipe].get(name)
        table.add(
            name,
            f"{one.spearman:+.2f}",
            f"{_signed(one.low)} to {_signed(one.high)}",
            _signed(one.pearson),
            _p(one.p),
            _p(one.p_adjusted) if name != GAIN else "",
            _signed(triple),
        )
    triples = len(found.sets) - len(found.pairs)
    table.notes.append(
        f"n = {len(found.pairs)} pairs. Interval: tasks drawn with replacement, 2,000 times; p: all"
        f" permutations of the tasks. The {triples} triples share tasks and have no p."
    )
    return table


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


Predict = Callable[[Row], float]


def judge_rule(
    rows: Sequence[Row], tasks: int, points: bool = False
) -> dict[str, dict[str, float]]:
    """Return mean absolute error and R^2 of predictions of what each model loses.

    Except the fixed rule, all learn one number, for each task from the merges without that task:
    `constant` the mean loss, `share` the mean share of the gain, `fitted` the curvature across.
    `steps` has a curvature of 0, `rule` of 0.1. R^2 is relative to the mean of the true losses.

    Args:
        rows: of a recipe.
        tasks: how many there are.
        points: predict accuracy instead of nats.
    """
    y = np.array([row.lost_points if points else row.lost for row in rows])
    gain = np.array([row.gain_points if points else row.gain for row in rows])
    along = np.array([(1 - (row.along or 0.0)) ** 2 for row in rows])
    across = np.array([row.across or 0.0 for row in rows])
    task = np.array([row.task for row in rows])
    made = {name: np.zeros(len(rows)) for name in ("constant", "share", "fitted")}
    made["steps"], made["rule"] = gain * along, gain * (along + ACROSS * across)
    for number in range(tasks):
        train = np.array([number not in row.tasks for row in rows])
        test = task == number
        if not train.any() or not test.any():
            continue
        made["constant"][test] = y[train].mean()
        made["share"][test] = gain[test] * y[train].sum() / gain[train].sum()
        x = gain[train] * across[train]
        fitted = max(0.0, float(x @ (y[train] - gain[train] * along[train]) / (x @ x)))
        made["fitted"][test] = gain[test] * (along[test] + fitted * across[test])
    variance = float(((y - y.mean()) ** 2).sum())
    return {
        name: {
            "error": float(np.abs(y - values).mean()),
            "r2": 1 - float(((y - values) ** 2).sum()) / variance,
            "predicted": float(values.mean()),
            "measured": float(y.mean()),
        }
        for name, values in made.items()
    }


_RULES = {
    "constant": "the mean loss of other tasks",
    "share": "the gain, times the share that other tasks lose",
    "steps": "the rule, without interference: gain (1 - c)²",
    "rule": f"the rule, as in pymerge.analysis: {ACROSS:g} across",
    "fitted": "the rule, curvature from other tasks",
}


def _rule(found: Study) -> Table:
    sums = [recipe for recipe in found.recipes if recipe.key in found.rows]
    columns = ["prediction of what a model loses"]
    for recipe in sums:
        columns += [f"{recipe.label}: nats", "error", "R²"]
    table = Table("The rule beside simpler predictions, for each model in each merge", columns)
    judged = [judge_rule(found.rows[recipe.key], len(found.tasks)) for recipe in sums]
    measured = ["measured"]
    for each in judged:
        measured += [f"{each['rule']['measured']:.3f}", "", ""]
    table.add(*measured)
    for key, label in _RULES.items():
        cells = [label]
        for each in judged:
            one = each[key]
            cells += [f"{one['predicted']:.3f}", f"{one['error']:.3f}", f"{one['r2']:.2f}"]
        table.add(*cells)
    count = len(found.rows[sums[0].key]) if sums else 0
    table.notes.append(
        f"{count} losses: each task in each pair and triple, each seed. Error: mean absolute. What"
        " is learned from other tasks comes from the merges without the task that is predicted."
        " All but the first know the fine-tune's own gain, which needs labelled data."
    )
    return table


def record(found: Study) -> dict[str, Any]:
    """Return everything for the JSON file."""
    return {
        "pymerge": pymerge.__version__,
        "tasks": list(found.tasks),
        "seeds": list(found.seeds),
        "recipes": {recipe.key: recipe.label for recipe in found.recipes},
        "sets": [list(tasks) for tasks in found.sets],
        "statistics": found.statistics,
        "rule": found.rule,
        "gain": found.gain,
        "outcomes": found.outcomes,
        "reliability": found.reliability,
        "between_seeds": found.between_seeds,
        "correlations": {
            outcome: {
                recipe: {name: asdict(one) for name, one in each.items()}
                for recipe, each in by_recipe.items()
            }
            for outcome, by_recipe in found.correlations.items()
        },
        "triples": found.triples,
        "judged": {
            key: {
                "nats": judge_rule(rows, len(found.tasks)),
                "points": judge_rule(rows, len(found.tasks), points=True),
            }
            for key, rows in found.rows.items()
        },
        "rows": {key: [asdict(row) for row in rows] for key, rows in found.rows.items()},
    }


def plot(found: Study, path: Path) -> None:
    """Draw losses against statistics: pairs as dots, triples as crosses.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"the plots need matplotlib ({error}): pip install matplotlib") from None
    shown = ["cosine", "sign conflict, top 20 %", "overlap, top 20 %", "singular task interference"]
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    rows = [("accuracy", "accuracy lost, points"), ("log-probability", "nats lost")]
    rows.append(("share of the gain", "share of the gain lost, %"))
    pairs = set(found.pairs)
    keys = ("task_arithmetic", "full_steps", "ties", "pcb_root")
    chosen = [recipe for recipe in found.recipes if recipe.key in keys]
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for line, (outcome, label) in enumerate(rows):
        columns = [*shown, GAIN if outcome in found.gain else RULE]
        for column, name in enumerate(columns):
            axes = figure.add_subplot(3, len(columns), line * len(columns) + column + 1)
            rho: list[str] = []
            for recipe, colour in zip(chosen, colours, strict=False):
                x = _x(found, outcome, name, recipe.key)
                if x is None:
                    continue
                y = found.outcomes[outcome][recipe.key]
                one = found.correlations[outcome][recipe.key].get(name)
                rho.append("" if one is None else _signed(one.spearman))
                for marker, members in (("o", True), ("x", False)):
                    at = [n for n in range(len(y)) if (n in pairs) == members]
                    axes.scatter(
                        [x[n] for n in at],
                        [y[n] for n in at],
                        s=11,
                        marker=marker,
                        color=colour,
                        linewidths=0.8,
                        label=recipe.label if members else None,
                    )
            axes.set_xlabel(name, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            axes.set_title(" / ".join(rho), fontsize=8)
            if (line, column) == (0, 0):
                figure.legend(
                    *axes.get_legend_handles_labels(), loc="outside lower center", ncols=4
                )
            if column == 0:
                axes.set_ylabel(label, fontsize=9)
    figure.suptitle(
        f"{len(pairs)} pairs (dots) and {len(found.sets) - len(pairs)} triples (crosses);"
        " above each: Spearman over the pairs, in the order of the legend",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _x(found: Study, outcome: str, name: str, recipe: str) -> list[float] | None:
    if name == GAIN:
        return found.gain[outcome]
    return found.rule.get(recipe) if name == RULE else found.statistics[name]
