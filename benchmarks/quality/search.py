"""Searches PCB's coefficients on the text suite's validation data: CMA-ES, random, grid.

    python -m benchmarks.quality.search [--evaluations 200] [--longer 400] [--save]

The preset pcb_es (a coefficient for each task vector, and the ratio) starts at PCB's defaults;
random points in the same ranges, and a grid of one coefficient for all and the ratio, have the same
number of evaluations. Test data is used once for the choice of each search, and for the defaults.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from benchmarks.demo.cache import Cache, digest
from benchmarks.demo.console import Log
from benchmarks.quality.suite import Part, digest_state
from benchmarks.quality.text import Text
from benchmarks.tables import RESULTS, Table, save
from pymerge.search import Remerger, SearchResult, run_search

if TYPE_CHECKING:
    from pymerge.search import Split

__all__ = ["Accuracy", "main", "prepared"]

PLOTS = Path(__file__).resolve().parent.parent.parent / "docs" / "images"
_PLOTTED = {"history.png": "search-history.png", "coefficients.png": "search-coefficients.png"}
_PLOTTED |= {"parallel.png": "search-parallel.png"}
_MORE = ", longer"
_LONGER = f"CMA-ES{_MORE}"
_WEIGHTS = "models[*].parameters.weight"


@functools.cache
def prepared(quick: bool = False) -> Text:
    """Return the text suite with its data and heads."""
    suite = Text(Cache(Cache.default("text", "quality")), Log(), quick=quick)
    suite.prepare()
    return suite


class Accuracy:
    """Mean accuracy of the tasks, on the part of the data that the search names."""

    def __init__(self, quick: bool = False) -> None:
        self._suite = prepared(quick)

    def __call__(self, tensors: Mapping[str, torch.Tensor], data: Split) -> dict[str, float]:
        """Return {"accuracy": mean of the tasks, task: its accuracy, ...}, in per cent."""
        suite = self._suite
        if data.name not in ("validation", "test"):
            raise ValueError(f"expected the part validation or test, got {data.name}")
        part = cast(Part, data.name)
        found = {}
        state = dict(tensors)
        for number, task in enumerate(suite.tasks):
            items = self._items(state, number, part)
            found[task] = 100.0 * sum(items) / len(items)
        return {"accuracy": sum(found.values()) / len(found), **found}

    def test_items(self, tensors: Mapping[str, torch.Tensor]) -> list[list[float]]:
        """Return the scores on each test item, task by task."""
        tasks = range(len(self._suite.tasks))
        return [self._items(dict(tensors), task, "test") for task in tasks]

    def _items(self, state: dict[str, torch.Tensor], task: int, part: Part) -> list[float]:
        suite = self._suite
        if part == "validation":  # the study keeps these results
            return suite.item_scores(state, task, part)
        recipe = {"suite": suite.recipe(), "weights": digest_state(state)}
        recipe |= {"task": suite.tasks[task], "part": part, **suite.test_recipe()}
        path = suite.cache.root / "evaluations" / f"{digest(recipe)}.json"
        return suite.cache.load(path, lambda: suite.item_scores(state, task, part))


def _folder(suite: Text, task: int, seed: int) -> Path:
    """Return the folder of a fine-tune, which is created if it does not exist."""
    suite.fine_tune(task, seed)
    name = suite.tasks[task]
    recipe = {"suite": suite.recipe(), "task": name, "training": _training(suite, seed)}
    return suite.cache.path(f"{name}-{seed}", recipe)


def _training(suite: Text, seed: int) -> dict[str, Any]:
    return suite.training.with_seed(seed).recipe()


def _hash(suite: Text, part: Part) -> str:
    digest = hashlib.sha256()
    for split in suite.splits:
        inputs, labels = getattr(split, part)
        for position in range(len(inputs)):
            states = inputs[torch.tensor([position])].contiguous()
            digest.update(states.view(torch.uint8).numpy().data)
        digest.update(labels.numpy().data)
    return digest.hexdigest()


def merge_config(suite: Text, seed: int) -> dict[str, Any]:
    """Return the merge of the eight fine-tunes by PCB, the paper's formula, with its defaults."""
    suite.stage("base", {"base": True}, suite.base)
    base = suite.cache.path("base", {"suite": suite.recipe(), "base": True})
    models = [{"model": str(_folder(suite, task, seed))} for task in range(len(suite.tasks))]
    return {"merge_method": "pcb", "base_model": str(base), "models": models}


def _searches(evaluations: int) -> dict[str, dict[str, Any]]:
    across = 5
    return {
        "CMA-ES": {},
        "random": {"sampler": "random"},
        "grid": {
            "sampler": "grid",
            "parameters": {
                _WEIGHTS: {"shared": True, "points": max(1, evaluations // across)},
                "parameters.ratio": {"points": min(across, evaluations)},
            },
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Search three times, show and store the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=200, help="of each search")
    parser.add_argument(
        "--longer", type=int, default=0, help="let CMA-ES go on to so many (default: it does not)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of fine-tunes and searches")
    parser.add_argument("--quick", action="store_true", help="toy sizes: a trial of the program")
    parser.add_argument("--save", action="store_true", help="keep results and plots")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    suite = prepared(options.quick)
    common = {
        "merge": merge_config(suite, options.seed),
        "preset": "pcb_es",
        "arguments": {"quick": options.quick},
        "data": {
            part: {"name": name, "hash": _hash(suite, cast(Part, name))}
            for part, name in (("search", "validation"), ("report", "test"))
        },
        "budget": options.evaluations,
        "seed": options.seed,
    }
    root = suite.cache.root / ("search-quick" if options.quick else "search")
    found: dict[str, SearchResult] = {}
    searches = _searches(options.evaluations)
    if options.longer > options.evaluations:
        searches[_LONGER] = {"budget": options.longer}
    for name, own in searches.items():
        suite.log.say(f"search by {name}")
        found[name] = run_search(
            {**common, **own},
            root / f"{name.removesuffix(_MORE).lower()}-{options.seed}",
            metric="benchmarks.quality.search:Accuracy",
            quiet=False,
        )
    apart = _against_first(found, Accuracy(options.quick))
    table, records = _table(found, options.seed, apart), _records(found)
    table.show()
    directory = RESULTS if options.save else root
    seconds = time.perf_counter() - started
    save("quality-search", {"quality-search": table}, [*records, {"seconds": seconds}], directory)
    if options.save:
        for name, target in _PLOTTED.items():
            shutil.copyfile(root / f"cma-es-{options.seed}" / name, PLOTS / target)


def _against_first(
    found: Mapping[str, SearchResult], metric: Accuracy
) -> dict[str, tuple[float, float]]:
    """Return, on test data, the accuracy of each best point minus that of the defaults, and half
    the width of its 95 % interval, paired over the items; in per cent."""
    start = found["CMA-ES"]
    with Remerger(start.config.merge) as remerger:
        merged = remerger.merge(start.space.config(start.space.initial))
        defaults = metric.test_items(merged.tensors)
        differences = {}
        for name, result in found.items():
            remerger.merge(result.best_config(), merged)
            means, variance = [], 0.0
            pairs = zip(metric.test_items(merged.tensors), defaults, strict=True)
            for ours, others in pairs:
                change = 100.0 * (torch.tensor(ours) - torch.tensor(others)).double()
                means.append(float(change.mean()))
                variance += float(change.var()) / len(change)
            spread = 1.96 * variance**0.5 / len(means)
            differences[name] = (sum(means) / len(means), spread)
    return differences


def _table(
    found: Mapping[str, SearchResult], seed: int, apart: Mapping[str, tuple[float, float]]
) -> Table:
    table = Table(
        "PCB on the text suite: accuracy in per cent, coefficients searched on validation data",
        [
            *("", "validation", "test", "against the defaults, test (95 %)", "variables"),
            *("evaluations", "merging, s", "evaluating, s"),
        ],
    )
    cma = found["CMA-ES"]
    report = cma.report or {}
    first = cma.first
    assert first is not None
    table.add(
        "as recommended (all coefficients 1, ratio 0.1)",
        f"{first.value:.2f}",
        f"{report['first']['value']:.2f}",
        *("", "", "1"),
        f"{first.seconds_merging:.1f}",
        f"{first.seconds_evaluating:.1f}",
    )
    for name, result in found.items():
        assert result.best is not None
        assert result.report is not None
        change, spread = apart[name]
        table.add(
            name,
            f"{result.best.value:.2f}",
            f"{result.report['best']['value']:.2f}",
            f"{change:+.1f} ({change - spread:+.1f} to {change + spread:+.1f})",
            str(len(result.space.variables)),
            str(len(result.trials)),
            f"{result.seconds_merging:.0f}",
            f"{result.seconds_evaluating:.0f}",
        )
    items = 120 * 8
    table.notes.append(
        f"Seed {seed} of fine-tunes and searches. {items} validation items: the standard error of "
        "an accuracy of 70 % is 1.5 points, and the best of many looks better than it is. "
        "Intervals are paired over test items; that the fine-tunes are of one seed is not in them."
    )
    table.notes.append(
        "Seconds are those of the trials, whatever else the machine was doing; searches that were "
        "made at different times cannot be compared by them."
    )
    return table


def _records(found: Mapping[str, SearchResult]) -> list[dict[str, Any]]:
    records = []
    for name, result in found.items():
        assert result.best is not None
        records.append(
            {
                "search": name,
                "best": {"values": result.best.values, "named": result.best.named},
                "first": None if result.first is None else result.first.named,
                "report": result.report,
                "trials": [
                    [t.number, t.value, *t.values.values(), t.seconds_merging, t.seconds_evaluating]
                    for t in result.trials
                ],
                "variables": result.space.names,
                "failures": result.failures,
            }
        )
    return json.loads(json.dumps(records))


if __name__ == "__main__":
    main()
