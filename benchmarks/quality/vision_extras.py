"""Measurements of the vision suite only: damaged test images, and tasks that were not merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pymerge
from benchmarks.quality.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from benchmarks.quality.methods import State
from benchmarks.quality.suite import Merged

if TYPE_CHECKING:
    from benchmarks.quality.vision import Vision

__all__ = ["HELD_OUT", "ROBUST", "held_out", "robustness"]

# the rows of the two tables
ROBUST = ("pretrained", "individual", "task_arithmetic", "tsv_m", "ada_layer")
HELD_OUT = ("task_arithmetic", "ties", "tsv_m", "ada_layer")
_IMAGES = 100
# of AdaMerging, which is learned anew for each task that is left out
_STEPS = 100


def robustness(suite: Vision, merged: Merged) -> dict[str, Any]:
    """Return the accuracy of models on damaged images: {row: {corruption: [severity: share]}}.

    The values are means over tasks, on the first images of each task's test set. "clean" is that of
    the same images without damage. Coefficients are those of clean data, AdaMerging's too.
    """
    states = {key: merged.state(key) for key in ROBUST if key in _known(merged)}
    kinds = ["clean", *(f"{name} {level}" for name in CORRUPTIONS for level in SEVERITIES)]
    totals = {key: dict.fromkeys(kinds, 0.0) for key in states}
    tasks = range(len(suite.tasks))
    with suite.log.steps("damaged images", len(states) * len(suite.tasks)) as advance:
        for task in tasks:
            kept = suite.images(task)
            few, wanted = kept["test.images"][:_IMAGES], kept["test.labels"][:_IMAGES]
            damaged = {"clean": few}
            for level in SEVERITIES:
                found = corrupted(few, CORRUPTIONS, level)
                for name, one in zip(CORRUPTIONS, found, strict=True):
                    damaged[f"{name} {level}"] = one
            maps = {kind: suite.maps(one) for kind, one in damaged.items()}
            for key, models in states.items():
                for kind, one in maps.items():
                    features = suite.features(models[task], one)
                    right = suite.heads[task](features).argmax(dim=1) == wanted
                    totals[key][kind] += right.float().mean().item() / len(tasks)
                advance()
    return {
        key: {
            "clean": [row["clean"]],
            **{name: [row[f"{name} {level}"] for level in SEVERITIES] for name in CORRUPTIONS},
        }
        for key, row in totals.items()
    }


def _known(merged: Merged) -> set[str]:
    return {"pretrained", "individual", *merged.chosen}


def held_out(suite: Vision, merged: Merged) -> dict[str, Any]:
    """Return the accuracy on each task of merges of all others: {row: {left out: share}}.

    Coefficients are those that validation chose for all tasks; AdaMerging learns its own.
    """
    count = len(suite.tasks)
    rows = [key for key in HELD_OUT if key in merged.chosen]
    found: dict[str, Any] = {key: {} for key in ("pretrained", *rows)}
    with suite.log.steps("merges without one task", count * len(found)) as advance:
        for left, name in enumerate(suite.tasks):
            kept = [task for task in range(count) if task != left]
            models = [merged.tuned[task] for task in kept]
            for key, row in found.items():
                state = merged.base
                if key != "pretrained":
                    state = _without(suite, merged, key, kept, models)
                scores = suite.item_scores(state, left, "test")
                row[name] = sum(scores) / len(scores)
                advance()
    return found


def _without(
    suite: Vision, merged: Merged, key: str, kept: Sequence[int], models: Sequence[State]
) -> State:
    value = merged.chosen[key]
    if key.startswith("ada_"):
        return suite.adapt(
            merged.base,
            models,
            merged.seed,
            granularity=key.removeprefix("ada_"),
            trimmed=False,
            init=0.3,
            steps=_STEPS,
            tasks=kept,
        )
    fixed: dict[str, Any] = {"density": 0.2} if key == "ties" else {}
    return pymerge.merge(key, merged.base, models, scale=value, **fixed)
