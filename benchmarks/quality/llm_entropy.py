"""Is a language model's entropy related to the quality of a merge? AdaMerging's aim, by lambda."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from scipy import stats

import pymerge
from benchmarks.quality.methods import State
from benchmarks.tables import Table
from pymerge.adamerging import entropy_of_each

if TYPE_CHECKING:
    from benchmarks.quality.llm import Languages

__all__ = ["LAMBDAS", "REVISION", "study", "table"]

REVISION = 1
LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_AT = 0.3


def study(suite: Languages, tuned: Sequence[State]) -> dict[str, Any]:
    """Return the mean loss and entropy of each task along lambda of task arithmetic, the
    correlation of a position's two at 0.3, and the fine-tunes' own values, on validation data."""
    found: dict[str, Any] = {"lambdas": LAMBDAS, "line": [], "spearman": [], "pearson": []}
    with suite.log.steps("entropy along the coefficient", len(LAMBDAS) + 1) as advance:
        for value in LAMBDAS:
            state = suite.base()
            if value:
                state = pymerge.merge("task_arithmetic", suite.base(), tuned, scale=value)
            row = []
            for task in range(len(suite.tasks)):
                losses, entropies = _of_positions(suite, state, task)
                row.append([losses.mean().item(), entropies.mean().item()])
                if value == _AT:
                    pairs: Any = (entropies.numpy(), losses.numpy())
                    found["spearman"].append(_first(stats.spearmanr(*pairs)))
                    found["pearson"].append(_first(stats.pearsonr(*pairs)))
            found["line"].append(row)
            advance()
        own = [_of_positions(suite, state, task) for task, state in enumerate(tuned)]
        found["individual"] = [[kind.mean().item() for kind in pair] for pair in own]
        advance()
    return found


def _first(result: Any) -> float:
    """Return the correlation in a result of scipy, which comes with a p-value."""
    return float(result[0])


@torch.inference_mode()
def _of_positions(suite: Languages, state: State, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = suite.splits[task].validation
    hidden = suite.features(state, inputs)
    losses, entropies = [], []
    for states, following in zip(hidden, labels, strict=True):
        logits = suite.heads[task](states[None])[0]
        losses.append(F.cross_entropy(logits, following, reduction="none"))
        entropies.append(entropy_of_each(logits))
    return torch.cat(losses), torch.cat(entropies)


def table(suite: Any, found: Mapping[str, Any]) -> Table:
    """Return perplexity and entropy of each task along lambda."""
    made = Table(
        f"{suite.title}: perplexity, and entropy in nats, along lambda of task arithmetic, "
        "validation data",
        ["lambda", *suite.tasks, "mean"],
    )

    def cells(row: Sequence[Sequence[float]]) -> list[str]:
        count = len(row)
        every = [*row, [sum(pair[kind] for pair in row) / count for kind in (0, 1)]]
        return [f"{math.exp(loss):.1f} / {entropy:.2f}" for loss, entropy in every]

    for value, row in zip(found["lambdas"], found["line"], strict=True):
        made.add(f"{value:g}", *cells(row))
    made.add("fine-tunes", *cells(found["individual"]))
    each = [f"{value:.2f}" for value in found["spearman"]]
    mean = sum(found["spearman"]) / len(each)
    made.add("Spearman at 0.3", *each, f"{mean:.2f}")
    made.notes.append("Spearman: of the entropy and the loss of each position.")
    return made
