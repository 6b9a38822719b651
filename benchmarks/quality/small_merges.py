"""Merges of two and three fine-tunes, and the loss of each of them on its own task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import pymerge
from benchmarks.demo.cache import digest
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.methods import State
from benchmarks.quality.suite import digest_state

__all__ = ["FOLDER", "RECIPES", "Measured", "Recipe", "Scores", "measure", "sets_of"]

FOLDER = "interference"  # in the suite's cache
# Increase this when the same recipe produces another model.
_REVISION = 1


@dataclass(frozen=True)
class Recipe:
    """A studied way of merging, with its coefficient; nothing is searched.

    `scale` is that of task arithmetic; None for methods that are not weighted sums of task vectors.
    """

    key: str
    label: str
    make: Callable[[State, Sequence[State]], State]
    scale: Callable[[int], float] | None = None


def _method(name: str, **settings: Any) -> Callable[[State, Sequence[State]], State]:
    def make(base: State, models: Sequence[State]) -> State:
        return pymerge.merge(name, base, list(models), **settings)

    return make


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "averaging",
        "averaging",
        lambda _, models: pymerge.merge("linear", None, list(models)),
        lambda count: 1 / count,
    ),
    Recipe(
        "task_arithmetic",
        "task arithmetic, 0.4",
        _method("task_arithmetic", scale=0.4),
        lambda count: 0.4,
    ),
    # each task vector in full: steps that are too short cause no loss
    Recipe(
        "full_steps",
        "task arithmetic, 1",
        _method("task_arithmetic", scale=1.0),
        lambda count: 1.0,
    ),
    Recipe("ties", "TIES", _method("ties", density=0.2, scale=1.0)),
    Recipe("pcb_root", "PCB (root)", _method("pcb", variant="root", scale=1.0)),
)


@dataclass(frozen=True)
class Scores:
    """A model on one task's test texts: whether each is right, and the log-probability of its
    label (nats)."""

    right: Sequence[float]
    log_probability: Sequence[float]


@dataclass(frozen=True)
class Measured:
    """A seed's merges. `sets` are the tasks merged; `merged[recipe][set]` and `alone[task]` have
    `Scores` of each task of the set, or of the task; `base[task]` those of the pretrained model."""

    seed: int
    sets: Sequence[tuple[int, ...]]
    base: Sequence[Scores]
    alone: Sequence[Scores]
    merged: Mapping[str, Mapping[tuple[int, ...], Sequence[Scores]]]


def sets_of(tasks: int, triples: int) -> list[tuple[int, ...]]:
    """Return all pairs of tasks, and some triples in which each task occurs about equally often.

    Greedy: the next triple is the one whose tasks, and then pairs, have been used least; of equal
    ones the first in order.
    """
    pairs = list(itertools.combinations(range(tasks), 2))
    used = [0] * tasks
    together = dict.fromkeys(pairs, 0)
    left, chosen = list(itertools.combinations(range(tasks), 3)), []
    for _ in range(min(triples, len(left))):
        best = min(
            left,
            key=lambda triple: (
                sum(used[task] for task in triple),
                sum(together[pair] for pair in itertools.combinations(triple, 2)),
            ),
        )
        left.remove(best)
        chosen.append(best)
        for task in best:
            used[task] += 1
        for pair in itertools.combinations(best, 2):
            together[pair] += 1
    return [*pairs, *sorted(chosen)]


def measure(
    suite: Classifiers,
    seed: int,
    sets: Sequence[tuple[int, ...]],
    recipes: Sequence[Recipe] = RECIPES,
) -> Measured:
    """Merge every set by every recipe, and test it on the tasks merged; kept in the cache."""
    count = len(suite.tasks)
    tuned = [suite.fine_tune(task, seed) for task in range(count)]
    with suite.log.steps(f"single models, seed {seed}", 2 * count) as advance:
        base, alone = [], []
        for task in range(count):
            base.append(_single(suite, suite.base(), task))
            advance()
            alone.append(_single(suite, tuned[task], task))
            advance()
    weights = [digest_state(state) for state in (suite.base(), *tuned)]
    merged: dict[str, dict[tuple[int, ...], list[Scores]]] = {}
    for recipe in recipes:
        merged[recipe.key] = {}
        with suite.log.steps(f"{recipe.label}, seed {seed}", len(sets)) as advance:
            for tasks in sets:
                key = {
                    "suite": suite.recipe(),
                    "revision": _REVISION,
                    "recipe": recipe.key,
                    "weights": [weights[0], *(weights[task + 1] for task in tasks)],
                    "tasks": [suite.tasks[task] for task in tasks],
                }

                def test(recipe: Recipe = recipe, tasks: tuple[int, ...] = tasks) -> list[Any]:
                    state = recipe.make(suite.base(), [tuned[task] for task in tasks])
                    return [_test(suite, state, task) for task in tasks]

                merged[recipe.key][tasks] = _kept(suite, key, test)
                advance()
    return Measured(seed, list(sets), base, alone, merged)


def _single(suite: Classifiers, state: State, task: int) -> Scores:
    key = {"suite": suite.recipe(), "weights": digest_state(state), "task": suite.tasks[task]}
    return _kept(suite, key, lambda: [_test(suite, state, task)])[0]


def _kept(suite: Classifiers, key: Any, test: Callable[[], list[Any]]) -> list[Scores]:
    path = suite.cache.root / FOLDER / f"{digest({**key, **suite.test_recipe()})}.json"
    return [Scores(**one) for one in suite.cache.load(path, test)]


@torch.inference_mode()
def _test(suite: Classifiers, state: State, task: int) -> dict[str, list[float]]:
    inputs, labels = suite.splits[task].test
    logits = suite.heads[task](suite.features(state, inputs)).float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(dim=1) == labels).float()
    return {"right": right.tolist(), "log_probability": [round(-x, 6) for x in losses.tolist()]}
