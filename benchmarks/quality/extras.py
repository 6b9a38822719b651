"""Tables and plots of the suites' additional measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import entropy, llm_entropy
from benchmarks.quality.methods import METHODS
from benchmarks.quality.suite import Suite
from benchmarks.tables import Table
from pymerge.adamerging import Coefficients

__all__ = ["extra_plots", "extra_tables"]

_LABELS = {
    "pretrained": "pretrained",
    "individual": "individual fine-tunes",
    **{method.key: method.label for method in METHODS},
}


def extra_tables(suite: Suite, extras: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of the extras, by the names of their markers in docs/quality.md."""
    makers: dict[str, Callable[[Suite, Any], Table]] = {
        "entropy": _entropy,
        "entropy-line": llm_entropy.table,
        "robustness": _robustness,
        "held-out": _held_out,
    }
    return {
        f"quality-{suite.name}-{name}": make(suite, extras[name])
        for name, make in makers.items()
        if name in extras
    }


def _entropy(suite: Suite, found: Mapping[str, Any]) -> Table:
    scales = [f"{scale:g}" for scale in found["scales"]]
    table = Table(
        f"{suite.title}: entropy and what it stands for, validation data",
        [
            "",
            "Spearman, entropy and loss",
            "lambda of the best accuracy",
            f"of the least entropy at {' / '.join(scales)}",
            f"cosine of gradients at {' / '.join(scales)}",
        ],
    )
    lambdas, line = found["lambdas"], found["line"]
    cosines = found["gradients"]
    for task, name in enumerate(suite.tasks):
        accuracy = [row["accuracy"][task] for row in line]
        least = []
        for number in range(len(scales)):
            values = [row["entropy"][task][number] for row in line]
            least.append(f"{lambdas[values.index(min(values))]:g}")
        along = [f"{cosines['tasks'][f'entropy at {s}'][task]:.2f}" for s in scales]
        table.add(
            name,
            f"{found['examples'][task]['spearman']:.2f}",
            f"{lambdas[accuracy.index(max(accuracy))]:g}",
            " / ".join(least),
            " / ".join(along),
        )
    accuracy = [sum(row["accuracy"]) for row in line]
    least = []
    for number in range(len(scales)):
        values = [sum(task[number] for task in row["entropy"]) for row in line]
        least.append(f"{lambdas[values.index(min(values))]:g}")
    whole = [f"{cosines['all'][f'entropy at {s}, sum']['layers']:.2f}" for s in scales]
    spearman = [one["spearman"] for one in found["examples"]]
    table.add(
        "all",
        f"{sum(spearman) / len(spearman):.2f}",
        f"{lambdas[accuracy.index(max(accuracy))]:g}",
        " / ".join(least),
        " / ".join(whole),
    )
    table.notes.append(
        f"Task arithmetic; Spearman at lambda 0.3 and scale {found['scale']:g}. Cosine: of the"
        " gradients of entropy and of cross-entropy (at the scale of training) with respect to"
        " layer-wise coefficients, at 0.3. All: of the sums over tasks."
    )
    return table


def _robustness(suite: Suite, found: Mapping[str, Any]) -> Table:
    kinds = [kind for kind in next(iter(found.values())) if kind != "clean"]
    table = Table(
        f"{suite.title}: accuracy in per cent on damaged test images, mean of tasks and severities",
        ["", "clean", *(kind.replace("_", " ") for kind in kinds), "mean, damaged"],
    )
    for key, row in found.items():
        means = [sum(row[kind]) / len(row[kind]) for kind in kinds]
        cells = [row["clean"][0], *means, sum(means) / len(means)]
        table.add(_LABELS[key], *(f"{100 * value:.1f}" for value in cells))
    return table


def _held_out(suite: Suite, found: Mapping[str, Any]) -> Table:
    table = Table(
        f"{suite.title}: accuracy in per cent on a task that was not merged",
        ["", *suite.tasks, "mean"],
    )
    for key, row in found.items():
        values = [row[name] for name in suite.tasks]
        cells = [*values, sum(values) / len(values)]
        table.add(_LABELS[key], *(f"{100 * value:.1f}" for value in cells))
    return table


def extra_plots(suite: Suite, extras: Mapping[str, Any], folder: Path) -> None:
    """Draw entropies and the learned coefficients."""
    if "entropy" in extras:
        path = folder / f"quality-{suite.name}-entropy.png"
        entropy.plot(extras["entropy"], suite.tasks, path)
        _fewer_colours(path)
    if "coefficients" in extras:
        found = extras["coefficients"]
        table = Coefficients(
            torch.tensor(found["values"]),
            tuple(suite.tasks),
            tuple(found["groups"]),
            {name: name for name in found["groups"]},
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"quality-{suite.name}-coefficients.png"
        table.save_png(path)
        _fewer_colours(path)


def _fewer_colours(path: Path) -> None:
    """Reduce a picture to a third of its size: a palette is enough for it."""
    from PIL import Image

    with Image.open(path) as image:
        few = image.convert("RGB").quantize(128)
    few.save(path, optimize=True)
