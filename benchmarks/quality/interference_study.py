"""The study of interference: compares merges of pairs and triples with a prior analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import pymerge
from benchmarks.demo.cache import digest
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.correlation import Correlation, correlations, reliability, spearman
from benchmarks.quality.methods import State
from benchmarks.quality.small_merges import (
    FOLDER,
    RECIPES,
    Measured,
    Recipe,
    Scores,
    measure,
    sets_of,
)
from benchmarks.quality.suite import digest_state
from pymerge.analysis import Analysis
from pymerge.analysis.interference import ACROSS, predict_interference
from pymerge.analysis.page_data import mean_of, off_diagonal

__all__ = ["GAIN", "OUTCOMES", "RULE", "STATISTICS", "Row", "Study", "study"]

DENSITIES = (0.1, 0.2, 0.5)
_TRIMMED = 1  # of the densities: what TIES keeps
# Increase this when analysis returns other numbers for the same weights.
_REVISION = 1


def _pairs(name: str) -> Callable[[Analysis], float | None]:
    return lambda analysis: mean_of(off_diagonal(getattr(analysis.whole, name)))


def _trimmed(name: str, place: int = _TRIMMED) -> Callable[[Analysis], float | None]:
    return lambda a: mean_of(off_diagonal(getattr(a.whole.trimmed[place], name)))


def _ratio(analysis: Analysis) -> float | None:
    lengths = [x for x in analysis.whole.l2 if x]
    return min(lengths) / max(lengths) if lengths else None


def _layers(get: Callable[[list[float]], float]) -> Callable[[Analysis], float | None]:
    def over(analysis: Analysis) -> float | None:
        found = [mean_of(off_diagonal(group.cosine)) for group in analysis.layers]
        return get([x for x in found if x is not None])

    return over


# Statistics of a set of models, known in advance; means over its pairs, or over its models.
STATISTICS: Mapping[str, Callable[[Analysis], float | None]] = {
    "cosine": _pairs("cosine"),
    "cosine, highest layer": _layers(max),
    "dot product": _pairs("dot"),
    "L1 distance": _pairs("l1_distance"),
    "L2 distance": _pairs("l2_distance"),
    "length of the task vectors": lambda a: mean_of(a.whole.l2),
    "shorter / longer": _ratio,
    "equal weights": _pairs("equal"),
    "sign conflict": _pairs("sign_conflict"),
    "sign conflict, top 20 %": _trimmed("sign_conflict"),
    "sign agreement": lambda a: a.whole.sign_agreement,
    "overlap, top 10 %": _trimmed("overlap", 0),
    "overlap, top 20 %": _trimmed("overlap"),
    "squared norm in the top 20 %": lambda a: mean_of(a.whole.trimmed[_TRIMMED].kept_norm),
    "effective rank": lambda a: mean_of(mean_of(s.effective_rank) for s in a.spectra),
    "left subspace overlap": lambda a: mean_of(
        mean_of(off_diagonal(s.left_overlap)) for s in a.spectra
    ),
    "right subspace overlap": lambda a: mean_of(
        mean_of(off_diagonal(s.right_overlap)) for s in a.spectra
    ),
    "singular task interference": lambda a: mean_of(s.interference for s in a.spectra),
}
# The yardstick: unlike all statistics, it needs labelled data of the tasks.
GAIN = "gain of the fine-tunes (needs labels)"
RULE = "the rule's loss"


@dataclass(frozen=True)
class Row:
    """One model in one merge: its loss, and its earlier gain, in nats and in points."""

    tasks: tuple[int, ...]
    task: int
    lost: float
    gain: float
    lost_points: float
    gain_points: float
    along: float | None
    across: float | None


@dataclass
class Study:
    """The results. `outcomes[name][recipe]` and `statistics[name]` have a value for each of `sets`,
    means over seeds; so have `rule[recipe]` and `gain[name]`."""

    tasks: Sequence[str]
    seeds: Sequence[int]
    recipes: Sequence[Recipe]
    sets: Sequence[tuple[int, ...]]
    statistics: dict[str, list[float]]
    rule: dict[str, list[float]]
    gain: dict[str, list[float]]
    outcomes: dict[str, dict[str, list[float]]]
    reliability: dict[str, dict[str, float | None]]
    between_seeds: dict[str, dict[str, float | None]]
    correlations: dict[str, dict[str, dict[str, Correlation]]]
    triples: dict[str, dict[str, dict[str, float | None]]]
    rows: dict[str, list[Row]]

    @property
    def pairs(self) -> list[int]:
        """Return the positions of the pairs in `sets`."""
        return [n for n, tasks in enumerate(self.sets) if len(tasks) == 2]


# In accuracy, the natural question; in log-probability, which the same texts measure far better;
# and as a share of what the fine-tunes had gained, which removes the effect of different gains.
OUTCOMES = ("accuracy", "log-probability", "share of the gain")


def study(
    suite: Classifiers,
    seeds: Sequence[int],
    triples: int,
    recipes: Sequence[Recipe] = RECIPES,
    draws: int = 2000,
) -> Study:
    """Merge, test, analyse, and compare; `draws` of tasks are for the intervals."""
    sets = sets_of(len(suite.tasks), triples)
    measured = [measure(suite, seed, sets, recipes) for seed in seeds]
    known = [_known(suite, seed, sets, recipes) for seed in seeds]
    statistics = {
        name: _mean([[one["statistics"][name] for one in found] for found in known])
        for name in STATISTICS
    }
    sums = [recipe for recipe in recipes if recipe.scale is not None]
    rule = {
        recipe.key: _mean([[one["rule"][recipe.key]["lost"] for one in found] for found in known])
        for recipe in sums
    }
    outcomes: dict[str, dict[str, list[float]]] = {name: {} for name in OUTCOMES}
    trust: dict[str, dict[str, float | None]] = {name: {} for name in OUTCOMES[:2]}
    repeated: dict[str, dict[str, float | None]] = {name: {} for name in OUTCOMES}
    pairs = [n for n, tasks in enumerate(sets) if len(tasks) == 2]
    for recipe in recipes:
        for name in OUTCOMES:
            each = [[_outcome(name, m, recipe.key, tasks) for tasks in sets] for m in measured]
            outcomes[name][recipe.key] = _mean(each)
            if len(seeds) > 1:
                one, other = ([values[n] for n in pairs] for values in each[:2])
                repeated[name][recipe.key] = spearman(one, other)
        for name in trust:
            items = [
                [row for m in measured for row in _items(name, m, recipe.key, sets[n])]
                for n in pairs
            ]
            trust[name][recipe.key] = reliability(items)
    gain = {
        name: _mean([[_gain(name, m, tasks) for tasks in sets] for m in measured])
        for name in OUTCOMES[:2]
    }
    found = Study(
        suite.tasks,
        seeds,
        recipes,
        sets,
        statistics,
        rule,
        gain,
        outcomes,
        trust,
        repeated,
        {},
        {},
        {
            recipe.key: [
                row
                for m, each in zip(measured, known, strict=True)
                for tasks, one in zip(sets, each, strict=True)
                for row in _rows(m, recipe, tasks, one["rule"][recipe.key])
            ]
            for recipe in sums
        },
    )
    for name in OUTCOMES:
        found.correlations[name], found.triples[name] = {}, {}
        for recipe in recipes:
            _compare(found, name, recipe.key, draws)
    return found


def _compare(found: Study, outcome: str, recipe: str, draws: int) -> None:
    """Correlate one outcome of one recipe with everything that is known beforehand."""
    values = dict(found.statistics)
    if recipe in found.rule:
        values[RULE] = found.rule[recipe]
    y = found.outcomes[outcome][recipe]
    places = found.pairs
    members = [(found.sets[n][0], found.sets[n][1]) for n in places]
    chosen = {name: [x[n] for n in places] for name, x in values.items()}
    drop = [y[n] for n in places]
    each = correlations(chosen, drop, members, draws=draws)
    if outcome in found.gain:
        gain = {GAIN: [found.gain[outcome][n] for n in places]}
        each |= correlations(
            gain, drop, members, draws=draws
        )  # separately: it is not a statistic of the vectors
    found.correlations[outcome][recipe] = each
    rest = [n for n in range(len(found.sets)) if n not in places]
    found.triples[outcome][recipe] = {
        name: spearman([x[n] for n in rest], [y[n] for n in rest]) if len(rest) > 2 else None
        for name, x in values.items()
    }


def _known(
    suite: Classifiers, seed: int, sets: Sequence[tuple[int, ...]], recipes: Sequence[Recipe]
) -> list[dict[str, Any]]:
    """Return what is known of each set before it is merged: statistics, and the rule; cached."""
    tuned = [suite.fine_tune(task, seed) for task in range(len(suite.tasks))]
    weights = [digest_state(state) for state in (suite.base(), *tuned)]
    scales = {recipe.key: recipe.scale for recipe in recipes if recipe.scale is not None}
    found = []
    with suite.log.steps(f"analyse, seed {seed}", len(sets)) as advance:
        for tasks in sets:
            key = {
                "revision": _REVISION,
                "weights": [weights[0], *(weights[task + 1] for task in tasks)],
                "statistics": list(STATISTICS),
                "rule": ACROSS,
                "scales": {name: scale(len(tasks)) for name, scale in scales.items()},
            }
            path = suite.cache.root / FOLDER / f"{digest(key)}.json"
            models = [tuned[task] for task in tasks]
            found.append(
                suite.cache.load(
                    path,
                    lambda models=models, key=key: _analysed(suite.base(), models, key["scales"]),
                )
            )
            advance()
    return found


def _analysed(base: State, models: Sequence[State], scales: Mapping[str, float]) -> dict[str, Any]:
    analysis = pymerge.analyze(base, models, densities=DENSITIES, spectra=True)
    statistics = {}
    for name, get in STATISTICS.items():
        statistics[name] = get(analysis)
        if statistics[name] is None:
            raise ValueError(f"{name} is not defined: a task vector is zero")
    rule = {}
    for name, scale in scales.items():
        predicted = predict_interference(analysis, scale)
        rule[name] = {
            "along": predicted.along,
            "across": predicted.across,
            "lost": predicted.mean,
        }
    return {"statistics": statistics, "rule": rule}


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return np.mean(np.asarray(rows, float), axis=0).tolist()


def _values(outcome: str, scores: Scores) -> np.ndarray:
    if outcome == "accuracy":
        return 100.0 * np.asarray(scores.right)
    return np.asarray(scores.log_probability)


def _items(outcome: str, m: Measured, recipe: str, tasks: tuple[int, ...]) -> list[np.ndarray]:
    """Return the loss of each test text, for each task, which may have fewer texts than another."""
    return [
        _values(outcome, m.alone[task]) - _values(outcome, scores)
        for task, scores in zip(tasks, m.merged[recipe][tasks], strict=True)
    ]


def _means(rows: Sequence[np.ndarray]) -> list[float]:
    return [float(row.mean()) for row in rows]


def _gain(outcome: str, m: Measured, tasks: tuple[int, ...]) -> float:
    gains = [_values(outcome, m.alone[t]) - _values(outcome, m.base[t]) for t in tasks]
    return float(np.mean(_means(gains)))


def _outcome(name: str, m: Measured, recipe: str, tasks: tuple[int, ...]) -> float:
    """Return a mean over tasks, all with the same weight."""
    if name == "share of the gain":
        lost = float(np.mean(_means(_items("log-probability", m, recipe, tasks))))
        return 100.0 * lost / _gain("log-probability", m, tasks)
    return float(np.mean(_means(_items(name, m, recipe, tasks))))


def _rows(
    m: Measured, recipe: Recipe, tasks: tuple[int, ...], predicted: Mapping[str, Any]
) -> list[Row]:
    nats = _means(_items("log-probability", m, recipe.key, tasks))
    points = _means(_items("accuracy", m, recipe.key, tasks))
    return [
        Row(
            tasks,
            task,
            float(nats[n]),
            _gain("log-probability", m, (task,)),
            float(points[n]),
            _gain("accuracy", m, (task,)),
            predicted["along"][n],
            predicted["across"][n],
        )
        for n, task in enumerate(tasks)
    ]
