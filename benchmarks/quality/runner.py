"""Runs a suite: fine-tunes, merges, a search of coefficients on validation data, and the test.

Whatever takes time is stored in the suite's cache under the hash of everything it depends on, so a
run that was stopped continues at the model, or the task, where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.demo.cache import digest
from benchmarks.quality.methods import METHODS, Method, Models, NotAvailable, State
from benchmarks.quality.suite import Merged, Part, Suite, digest_state

__all__ = ["Outcome", "Run", "run"]


@dataclass(frozen=True)
class Outcome:
    """A model, or a set with one for each task, on the test set.

    `value` is the setting of the method's coefficient; `chosen` is True if validation chose it,
    False if the paper did. `items` are the scores on every item of each task.
    """

    method: str
    label: str
    seed: int
    chosen: bool
    value: float | None
    items: Sequence[Sequence[float]]

    @property
    def scores(self) -> list[float]:
        """Return the mean score of each task."""
        return [sum(values) / len(values) for values in self.items]


@dataclass
class Run:
    """All results of a suite.

    `searches` has, for each method and seed, the validation score of each task at each setting;
    `missing` names the methods that this version of pymerge does not have; `geometry` has, for each
    seed, the lengths of the task vectors as shares of the base's, and their pairwise cosines;
    `extras` has the suite's additional measurements, on the first seed.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    geometry: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)


def run(
    suite: Suite,
    seeds: Sequence[int],
    *,
    methods: Sequence[Method] = METHODS,
    settings: int | None = None,
    finished: Callable[[Run], None] | None = None,
) -> Run:
    """Run a suite and return all results.

    Args:
        suite: prepared.
        seeds: of the fine-tunes, and of everything that is random in a merge.
        methods: to compare.
        settings: fewer settings of each coefficient, for a trial.
        finished: called after each seed, and after the extras, with the results so far.
    """
    found = Run()
    count = len(suite.tasks)
    for seed in seeds:
        tuned = [suite.fine_tune(task, seed) for task in range(count)]
        found.geometry.append({"seed": seed, **geometry(suite.base(), tuned)})
        _test(suite, "pretrained", "pretrained", [suite.base()] * count, seed, found)
        _test(suite, "individual", "individual fine-tunes", tuned, seed, found)
        models = _models(suite, tuned, seed)
        for method in filter(suite.applies, methods):
            _try(suite, suite.adjusted(method), models, seed, found, settings)
        if suite.trained:
            joint = suite.fine_tune(None, seed)
            _test(suite, "multi_task", "multi-task training", [joint] * count, seed, found)
        if finished is not None:
            finished(found)
        if seed == seeds[0] and (extras := suite.extras(_merged(suite, models, found))):
            found.extras = extras
            if finished is not None:
                finished(found)
    return found


def _merged(suite: Suite, models: Models, found: Run) -> Merged:
    by_key = {method.key: method for method in METHODS}
    chosen = {
        outcome.method: outcome.value
        for outcome in found.outcomes
        if outcome.seed == models.seed and outcome.chosen
    }

    def state(key: str) -> list[State]:
        count = len(suite.tasks)
        if key == "pretrained":
            return [models.base] * count
        if key == "individual":
            return list(models.tuned)
        value = chosen[key]
        method = by_key[key]
        merged = method.make(models, method.default if value is None else value)
        return merged if isinstance(merged, list) else [merged] * count

    values = {key: value for key, value in chosen.items() if value is not None}
    return Merged(models.seed, models.base, models.tuned, values, state)


def geometry(base: State, tuned: Sequence[State]) -> dict[str, list[float]]:
    """Return the lengths of task vectors as shares of the base's, and the cosine of each pair."""
    count = len(tuned)
    products = torch.zeros(count, count, dtype=torch.float64)
    length = 0.0
    for name, start in base.items():
        if start.is_floating_point():
            deltas = torch.stack(
                [(state[name].float() - start.float()).flatten() for state in tuned]
            )
            products += (deltas @ deltas.T).double()
            length += float(start.float().square().sum())
    lengths = products.diagonal().sqrt()
    cosines = products / (lengths[:, None] * lengths).clamp_min(1e-30)
    pairs = torch.triu_indices(count, count, 1)
    return {
        "lengths": (lengths / length**0.5).tolist(),
        "cosines": cosines[pairs[0], pairs[1]].tolist(),
    }


def _models(suite: Suite, tuned: list[State], seed: int) -> Models:
    kept: dict[str, Sequence[Any]] = {}

    def statistics(kind: str) -> Sequence[Any]:
        if kind not in kept:
            kept[kind] = suite.statistics(kind, tuned)
        return kept[kind]

    def adapt(**settings: Any) -> State:
        return suite.adapt(suite.base(), tuned, seed, **settings)

    return Models(suite.base(), tuned, statistics, adapt, seed, suite.ridge)


def _test(
    suite: Suite, key: str, label: str, states: Sequence[State], seed: int, found: Run
) -> None:
    with suite.log.steps(f"test {label}", len(states)) as advance:
        items = _items(suite, states, "test", advance)
    found.outcomes.append(Outcome(key, label, seed, False, None, items))


def _try(
    suite: Suite, method: Method, models: Models, seed: int, found: Run, settings: int | None
) -> None:
    try:
        _compare(suite, method, models, seed, found, settings)
    except NotAvailable as missing:
        found.missing[method.key] = str(missing)
        suite.log.say(f"{method.label}: not available yet ({missing})")


def _compare(
    suite: Suite, method: Method, models: Models, seed: int, found: Run, settings: int | None
) -> None:
    """Search a method's coefficient on validation data, then test the default and the best one."""
    values = _values(method, settings)
    count = len(suite.tasks)
    made: dict[float, list[State]] = {}

    def states(value: float) -> list[State]:
        if value not in made:
            made.clear()  # hold only one model, or one for each task, at a time
            merged = method.make(models, value)
            made[value] = merged if isinstance(merged, list) else [merged] * count
        return made[value]

    default = method.default if method.default in values else values[-1]
    best = default
    searched = len(values) > 1
    total = count * ((len(values) if searched else 0) + 1)
    with suite.log.steps(f"{method.label}, seed {seed}", total) as advance:
        if searched:
            means = []
            for value in values:
                items = _items(suite, states(value), "validation", advance)
                means.append([sum(task) / len(task) for task in items])
            # the first of equal ones
            best = values[max(range(len(values)), key=lambda n: (sum(means[n]), -n))]
            found.searches.append(
                {
                    "method": method.key,
                    "symbol": method.symbol,
                    "seed": seed,
                    "values": list(values),
                    "validation": means,
                    "chosen": best,
                }
            )
        for chosen, value in ((False, default), (True, best)):
            if chosen and value == default:
                items = found.outcomes[-1].items
            else:
                items = _items(suite, states(value), "test", advance)
            found.outcomes.append(
                Outcome(
                    method.key, method.label, seed, chosen, value if method.symbol else None, items
                )
            )


def _values(method: Method, settings: int | None) -> tuple[float, ...]:
    if settings is None or len(method.values) <= settings:
        return method.values
    if method.symbol == "steps":  # a trial should be short
        return method.values[:settings]
    others = [value for value in method.values if value != method.default]
    return tuple(sorted([method.default, *others[: settings - 1]]))


def _items(
    suite: Suite, states: Sequence[State], part: Part, advance: Callable[[], None]
) -> list[list[float]]:
    """Return the scores of a model, or of one for each task, on every item; cached."""
    hashes: dict[int, str] = {}
    found = []
    for task, state in enumerate(states):
        if id(state) not in hashes:
            hashes[id(state)] = digest_state(state)
        recipe = {
            "suite": suite.recipe(),
            "weights": hashes[id(state)],
            "task": suite.tasks[task],
            "part": part,
        }
        if part == "test":
            recipe |= suite.test_recipe()
        path = suite.cache.root / "evaluations" / f"{digest(recipe)}.json"
        found.append(
            suite.cache.load(
                path, lambda state=state, task=task: suite.item_scores(state, task, part)
            )
        )
        advance()
    return found
