"""The study of interference: its statistics, and a whole run on a toy."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.quality import interference_report as report
from benchmarks.quality.correlation import correlations, pearson, reliability, spearman
from benchmarks.quality.interference_study import GAIN, OUTCOMES, RULE, STATISTICS, Row, study
from benchmarks.quality.small_merges import RECIPES, sets_of
from benchmarks.quality.suite import Split
from tests.test_quality import Rows, Toy

PAIRS = list(itertools.combinations(range(5), 2))


def test_correlations_are_scipys() -> None:
    from scipy import stats

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=20), generator.integers(0, 5, 20)
    one, other = x.tolist(), y.tolist()
    assert spearman(one, other) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert pearson(one, other) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert spearman(one, [3.0] * 20) is None


def test_permutations_move_tasks() -> None:
    """p against a slow computation of its own: matrices whose rows and columns are permuted."""
    from scipy import stats

    generator = np.random.default_rng(1)
    first, second, outcome = generator.normal(size=(3, len(PAIRS)))
    found = correlations({"first": first, "second": second}, outcome, PAIRS)

    def permuted(values: np.ndarray, order: tuple[int, ...]) -> list[float]:
        matrix = np.zeros((5, 5))
        for (a, b), value in zip(PAIRS, values, strict=True):
            matrix[a, b] = matrix[b, a] = value
        return [matrix[order[a], order[b]] for a, b in PAIRS]

    def strength(values: np.ndarray, order: tuple[int, ...]) -> float:
        return abs(float(stats.spearmanr(permuted(values, order), outcome)[0]))

    orders = list(itertools.permutations(range(5)))
    each = np.array([[strength(x, order) for order in orders] for x in (first, second)])
    for number, name in enumerate(("first", "second")):
        seen = abs(found[name].spearman or 0.0)
        assert seen == pytest.approx(each[number, 0])
        assert found[name].p == pytest.approx(np.mean(each[number] >= seen - 1e-9))
        assert found[name].p_adjusted == pytest.approx(np.mean(each.max(axis=0) >= seen - 1e-9))
        assert (found[name].p_adjusted or 0) >= (found[name].p or 0)


def test_what_is_related_is_found_and_what_is_constant_is_not() -> None:
    outcome = [float(3 * a + b) for a, b in PAIRS]
    found = correlations({"same": outcome, "constant": [1.0] * len(PAIRS)}, outcome, PAIRS)
    assert found["same"].spearman == pytest.approx(1.0)
    assert found["same"].low == pytest.approx(1.0)
    assert (found["same"].p or 1.0) <= 2 / 120
    assert found["constant"].spearman is None
    assert found["constant"].p is None
    with pytest.raises(ValueError, match="expected all pairs of 5 tasks, got 9"):
        correlations({"same": outcome[:-1]}, outcome[:-1], PAIRS[:-1])


def test_reliability() -> None:
    generator = np.random.default_rng(2)
    level = generator.normal(size=28)
    noise = generator.normal(size=(28, 2, 400))
    known = reliability(list(level[:, None, None] + 0.1 * noise))
    assert known is not None
    assert known > 0.99
    nothing = reliability(list(noise))
    assert nothing is not None
    assert abs(nothing) < 0.5
    # tasks may have different numbers of texts
    short = [[one, two[:350]] for one, two in level[:, None, None] + 0.1 * noise]
    known = reliability(short)
    assert known is not None
    assert known > 0.99
    # variance 1 between pairs, 800 * sigma^2 / 800 within: half of what is seen is real
    half = reliability(list(level[:, None, None] + np.sqrt(800) * noise))
    assert half is not None
    assert 0.2 < half < 0.8


def test_sets_are_balanced() -> None:
    sets = sets_of(8, 12)
    assert sets[:28] == list(itertools.combinations(range(8), 2))
    triples = sets[28:]
    assert len(set(triples)) == 12
    counts = np.bincount([task for triple in triples for task in triple], minlength=8)
    assert counts.min() >= 4
    assert counts.max() <= 5
    assert sets_of(3, 9) == [(0, 1), (0, 2), (1, 2), (0, 1, 2)]


def test_rule_is_judged_on_tasks_it_has_not_seen() -> None:
    generator = np.random.default_rng(3)
    rows = []
    for pair in PAIRS:
        for task in pair:
            along, across = generator.uniform(0.3, 0.7), generator.uniform(0.1, 0.5)
            gain = 1.0 + task
            lost = gain * ((1 - along) ** 2 + 0.3 * across)
            rows.append(Row(pair, task, lost, gain, 10 * lost, 10 * gain, along, across))
    judged = report.judge_rule(rows, 5)
    assert judged["fitted"]["r2"] == pytest.approx(1.0)
    assert judged["fitted"]["error"] == pytest.approx(0.0, abs=1e-12)
    assert judged["steps"]["predicted"] < judged["rule"]["predicted"] < judged["rule"]["measured"]
    assert judged["constant"]["r2"] < 0 < judged["share"]["r2"] < 1
    assert report.judge_rule(rows, 5, points=True)["fitted"]["r2"] == pytest.approx(1.0)


class Uneven(Toy):
    """One task has fewer test texts than the others."""

    def read(self) -> list[Split]:
        first, *rest = super().read()
        inputs, labels = first.test
        assert isinstance(inputs, Rows)
        return [replace(first, test=(Rows(inputs.rows[:-5]), labels[:-5])), *rest]


def test_study(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        suite = Uneven(Cache(tmp_path), Log())
        suite.prepare()
        found = study(suite, [0, 1], 1, draws=20)
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "interference").iterdir()}
        again = study(suite, [0, 1], 1, draws=20)
    finally:
        torch.set_num_threads(before)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "interference").iterdir()} == kept
    assert again.outcomes == found.outcomes
    assert [len(tasks) for tasks in found.sets] == [2, 2, 2, 3]
    assert set(found.statistics) == set(STATISTICS)
    recipes = [recipe.key for recipe in RECIPES]
    assert all(list(found.outcomes[name]) == recipes for name in OUTCOMES)
    # averaging is task arithmetic with 1 / K, so it is the rule's business; TIES is not
    assert set(found.rule) == {"averaging", "task_arithmetic", "full_steps"}
    assert RULE in found.correlations["accuracy"]["averaging"]
    assert GAIN in found.correlations["log-probability"]["ties"]
    assert GAIN not in found.correlations["share of the gain"]["ties"]
    assert len(found.rows["averaging"]) == 2 * (3 * 2 + 3)
    tables = report.tables(found)
    assert all(name.startswith("quality-interference-") for name in tables)
    for table in tables.values():
        assert table.rows
        assert "nan" not in table.markdown()
    json.dumps(report.record(found), allow_nan=False)
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
