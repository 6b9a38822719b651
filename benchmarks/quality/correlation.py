"""Correlation of a statistic of pairs with an outcome of pairs, where pairs share their members.

28 pairs of eight tasks are not 28 independent observations: each task is in seven of them. So a
p-value comes from permuting the tasks, not the pairs (the quadratic assignment procedure:
Krackhardt 1988, "Predicting with networks"), and an interval from drawing tasks, not pairs, with
replacement (the vertex bootstrap: Snijders and Borgatti 1999). With eight tasks, all 40,320
permutations are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Correlation", "correlations", "pearson", "reliability", "spearman"]

_PERMUTATIONS = 40_320


@dataclass(frozen=True)
class Correlation:
    """The correlation of a statistic with an outcome, over `count` pairs.

    `spearman` and `pearson`: None if one of the two is constant. `low`, `high`: 95 % of the vertex
    bootstrap's Spearman coefficients. `p`: share of the permutations of the tasks whose |Spearman|
    is at least as large. `p_adjusted`: the same for the largest |Spearman| of all statistics that
    were tried together (Westfall and Young 1993), which holds for all of them at once.
    """

    count: int
    spearman: float | None
    pearson: float | None
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None


def pearson(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None if one of them is constant."""
    x, y = _standardised(np.asarray(one, float)), _standardised(np.asarray(other, float))
    return None if x is None or y is None else float(x @ y)


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's correlation, with mean ranks for equal values."""
    return pearson(
        _ranks(np.asarray(one, float)).tolist(), _ranks(np.asarray(other, float)).tolist()
    )


def correlations(
    statistics: Mapping[str, Sequence[float]],
    outcome: Sequence[float],
    pairs: Sequence[tuple[int, int]],
    seed: int = 0,
    draws: int = 2000,
) -> dict[str, Correlation]:
    """Return the correlation of each statistic with the outcome.

    Args:
        statistics: name to a value for each pair.
        outcome: a value for each pair.
        pairs: all pairs of tasks, each as (smaller, larger).
        seed: of the draws.
        draws: of tasks, for the intervals.
    """
    tasks = 1 + max(task for pair in pairs for task in pair)
    if sorted(pairs) != list(itertools.combinations(range(tasks), 2)):
        raise ValueError(f"pairs: expected all pairs of {tasks} tasks, got {len(pairs)}")
    moved = _permuted(tasks, pairs, seed)
    y = np.asarray(outcome, float)
    y_ranks = _standardised(_ranks(y))
    largest = np.zeros(len(moved))
    each: dict[str, np.ndarray] = {}
    for name, values in statistics.items():
        x_ranks = _standardised(_ranks(np.asarray(values, float)))
        if x_ranks is not None and y_ranks is not None:
            each[name] = np.abs(x_ranks[moved] @ y_ranks)
            np.maximum(largest, each[name], out=largest)
    intervals = _intervals({name: statistics[name] for name in each}, y, pairs, tasks, seed, draws)
    found = {}
    for name, values in statistics.items():
        rho = spearman(values, outcome)
        if name not in each or rho is None:
            found[name] = Correlation(len(pairs), None, None, None, None, None, None)
            continue
        bound = abs(rho) - 1e-9
        found[name] = Correlation(
            len(pairs),
            rho,
            pearson(values, outcome),
            *intervals[name],
            float(np.mean(each[name] >= bound)),
            float(np.mean(largest >= bound)),
        )
    return found


def reliability(
    items: Sequence[Sequence[np.ndarray]], seed: int = 0, splits: int = 200
) -> float | None:
    """Return the split-half reliability of an outcome that is a mean over items.

    The items of each task are divided into two halves at random; the outcome, the mean of the
    tasks' means, is computed from each. If the two have correlation r over the pairs, the
    reliability of the whole is 2r / (1 + r) (Spearman 1910, Brown 1910). The result is the mean
    over splits. No statistic can be expected to correlate with the outcome above its root.

    Args:
        items: for each pair and each of its tasks, an array [items]: what each item contributes.
        seed: of the splits; rows of equal length are divided in the same way in all pairs.
        splits: how many.
    """
    generator = np.random.default_rng(seed)
    lengths = sorted({len(row) for rows in items for row in rows})
    found = []
    for _ in range(splits):
        orders = {count: generator.permutation(count) for count in lengths}
        halves: list[list[float]] = [[], []]
        for rows in items:
            for part, half in enumerate(halves):
                means = [row[_half(orders[len(row)], part)].mean() for row in rows]
                half.append(float(np.mean(means)))
        r = pearson(*halves)
        if r is None:
            return None
        found.append(2 * r / (1 + r))
    return float(np.mean(found))


def _half(order: np.ndarray, part: int) -> np.ndarray:
    middle = len(order) // 2
    return order[middle:] if part else order[:middle]


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1), float)


def _standardised(values: np.ndarray) -> np.ndarray | None:
    """Return values with mean 0 and sum of squares 1; None if they are constant."""
    centred = values - values.mean()
    length = math.sqrt(float(centred @ centred))
    return None if length <= 1e-12 * max(1.0, float(np.abs(values).max())) else centred / length


def _permuted(tasks: int, pairs: Sequence[tuple[int, int]], seed: int) -> np.ndarray:
    """Return, for each permutation of the tasks, which pair takes each pair's place."""
    if math.factorial(tasks) <= _PERMUTATIONS:
        orders = np.array(list(itertools.permutations(range(tasks))))
    else:
        generator = np.random.default_rng(seed)
        orders = np.array([generator.permutation(tasks) for _ in range(_PERMUTATIONS)])
        orders[0] = np.arange(tasks)
    places = np.zeros((tasks, tasks), int)
    for number, (a, b) in enumerate(pairs):
        places[a, b] = places[b, a] = number
    first, second = np.array(pairs).T
    return places[orders[:, first], orders[:, second]]


def _intervals(
    statistics: Mapping[str, Sequence[float]],
    outcome: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    tasks: int,
    seed: int,
    draws: int,
) -> dict[str, tuple[float | None, float | None]]:
    """Return 95 % of the Spearman coefficients of each statistic when tasks are drawn again."""
    generator = np.random.default_rng(seed)
    first, second = np.array(pairs).T
    rows = np.array([*statistics.values(), outcome], float)
    found: list[np.ndarray] = []
    for _ in range(draws):
        times = np.bincount(generator.integers(tasks, size=tasks), minlength=tasks)
        # a task paired with itself is not a pair
        chosen = np.repeat(np.arange(len(pairs)), times[first] * times[second])
        if len(chosen) < 3:
            continue
        ranks = _ranks(rows[:, chosen])
        ranks -= ranks.mean(axis=1, keepdims=True)
        length = np.sqrt((ranks**2).sum(axis=1))
        products = ranks[:-1] @ ranks[-1]
        scale = length[:-1] * length[-1]
        found.append(np.where(scale > 0, products / np.where(scale > 0, scale, 1.0), np.nan))
    intervals: dict[str, tuple[float | None, float | None]] = {}
    for name, column in zip(statistics, np.array(found).T, strict=False):
        known = column[np.isfinite(column)]
        if len(known):
            low, high = np.quantile(known, [0.025, 0.975])
            intervals[name] = (float(low), float(high))
    return {name: intervals.get(name, (None, None)) for name in statistics}
