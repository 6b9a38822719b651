"""Is entropy related to the quality of a merged model? This tests AdaMerging's assumption directly.

There are three views, all on validation data: entropy and accuracy along one coefficient for all;
whether the gradient of the entropy with respect to the coefficients has the direction of that of
the loss; and the entropy and the loss of each example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import pymerge
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.methods import State
from benchmarks.quality.training import LOGIT_SCALE
from pymerge.adamerging import entropy_of_each

__all__ = ["LAMBDAS", "REVISION", "SCALES", "plot", "study"]

# Increase this when `study` measures something else.
REVISION = 1

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
SCALES = (LOGIT_SCALE, 50.0, 100.0)
_START = 0.3
_CHUNK = 40
# examples of a task in the gradients' comparison
_EXAMPLES = 80


def study(suite: Classifiers, tuned: Sequence[State]) -> dict[str, Any]:
    """Return the numbers of the three views, for `plot` and the results' JSON."""
    names = list(suite.tasks)
    with suite.log.steps("entropy along the coefficient", len(LAMBDAS)) as advance:
        line = []
        for value in LAMBDAS:
            line.append(_along(suite, tuned, value))
            advance()
    ada = suite.adamerging(suite.base(), tuned, granularity="layer", trimmed=False, init=_START)
    loaders = [
        [(split.validation[0][part], split.validation[1][part]) for part in _parts(split)]
        for split in suite.splits
    ]
    suite.log.say("entropy and loss of each example ...")
    pairs = ada.correlations(loaders, names=names)
    return {
        "lambdas": LAMBDAS,
        "scales": SCALES,
        "scale": suite.adaptation.scale,
        "classes": [split.classes for split in suite.splits],
        "line": line,
        "gradients": _gradients(suite, ada),
        "examples": [
            {
                "task": one.task,
                "spearman": one.spearman,
                "pearson": one.pearson,
                "accuracy": one.accuracy,
                "entropy": [round(value, 6) for value in one.entropies.tolist()],
                "loss": [round(value, 6) for value in one.losses.tolist()],
            }
            for one in pairs
        ],
    }


def _parts(split: Any) -> list[torch.Tensor]:
    return list(torch.arange(len(split.validation[1])).split(_CHUNK))


def _along(suite: Classifiers, tuned: Sequence[State], value: float) -> dict[str, Any]:
    state = suite.base()
    if value:
        state = pymerge.merge("task_arithmetic", suite.base(), tuned, scale=value)
    found: dict[str, Any] = {"accuracy": [], "loss": [], "entropy": []}
    for split, head in zip(suite.splits, suite.heads, strict=True):
        inputs, labels = split.validation
        logits = head(suite.features(state, inputs))
        found["accuracy"].append((logits.argmax(dim=1) == labels).float().mean().item())
        found["loss"].append(F.cross_entropy(logits, labels).item())
        found["entropy"].append(
            [entropy_of_each(logits * (s / LOGIT_SCALE)).mean().item() for s in SCALES]
        )
    return found


def _gradients(suite: Classifiers, ada: Any) -> dict[str, Any]:
    """Return cosines of the gradients of entropy and loss with respect to the coefficients."""
    own = suite.adaptation.scale
    aims: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "loss": lambda logits, labels: F.cross_entropy(logits * (LOGIT_SCALE / own), labels)
    }
    for scale in SCALES:
        aims[f"entropy at {scale:g}"] = lambda logits, labels, scale=scale: entropy_of_each(
            logits * (scale / own)
        ).mean()
    totals: dict[str, list[torch.Tensor]] = {aim: [] for aim in aims}
    merged = ada.merged_parameters()
    with suite.log.steps("gradients of entropy and loss", len(suite.tasks)) as advance:
        for task, split in enumerate(suite.splits):
            inputs, labels = split.validation
            sums = {aim: torch.zeros_like(ada.raw_coefficients) for aim in aims}
            for part in torch.arange(min(_EXAMPLES, len(labels))).split(_CHUNK):
                logits = ada.run(merged, (inputs[part],), {}, task).float()
                for aim, function in aims.items():
                    value = function(logits, labels[part])
                    (one,) = torch.autograd.grad(value, ada.raw_coefficients, retain_graph=True)
                    sums[aim] += one
            for aim, total in sums.items():
                totals[aim].append(total)
            advance()
    tasks = {
        aim: [_cosine(a, b) for a, b in zip(rows, totals["loss"], strict=True)]
        for aim, rows in totals.items()
    }
    classes = torch.tensor([math.log(split.classes) for split in suite.splits])[:, None, None]
    whole = {}
    for label, weight in (("sum", torch.ones_like(classes)), ("balanced", 1.0 / classes)):
        target = (torch.stack(totals["loss"]) * weight).sum(dim=0)
        for aim, rows in totals.items():
            ours = (torch.stack(rows) * weight).sum(dim=0)
            whole[f"{aim}, {label}"] = {
                "layers": _cosine(ours, target),
                "tasks": _cosine(ours.sum(dim=1), target.sum(dim=1)),
            }
    return {"tasks": tasks, "all": whole}


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return F.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def plot(found: Mapping[str, Any], tasks: Sequence[str], path: Path) -> None:
    """Draw entropy and accuracy along lambda, and the examples' entropies and losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(tasks)
    figure = Figure(figsize=(2.1 * count, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, count, squeeze=False)
    colours = ("#3b75af", "#59a14f", "#b07aa1")
    for task, name in enumerate(tasks):
        top, bottom = axes[0][task], axes[1][task]
        accuracy = [100 * row["accuracy"][task] for row in found["line"]]
        for number, scale in enumerate(found["scales"]):
            values = [row["entropy"][task][number] for row in found["line"]]
            shares = [value / values[0] for value in values]
            top.plot(found["lambdas"], shares, color=colours[number], label=f"entropy, {scale:g}")
        twin = top.twinx()
        twin.plot(found["lambdas"], accuracy, color="#333333", linestyle="--", label="accuracy")
        twin.tick_params(labelsize=6)
        top.tick_params(labelsize=6)
        top.set_title(name, fontsize=9)
        top.set_xlabel("lambda", fontsize=7)
        one = found["examples"][task]
        bottom.scatter(one["entropy"], one["loss"], s=4, alpha=0.5, color="#3b75af", linewidths=0)
        bottom.set_title(f"Spearman {one['spearman']:.2f}", fontsize=8)
        bottom.set_xlabel("entropy, nats", fontsize=7)
        bottom.tick_params(labelsize=6)
        if task == 0:
            top.set_ylabel("entropy / entropy at 0", fontsize=7)
            bottom.set_ylabel("loss, nats", fontsize=7)
            lines = [*top.get_lines(), *twin.get_lines()]
            top.legend(lines, [str(line.get_label()) for line in lines], fontsize=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
