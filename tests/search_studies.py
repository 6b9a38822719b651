"""Studies of toy models: requests and comparisons for the tests of searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge.search import SearchResult, Trial, run_search
from tests import models

METRIC = "tests.search_metrics:near"
WEIGHTS = {"models[*].parameters.weight": {"low": 0.0, "high": 2.0, "initial": 0.25}}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base of zeros, and models of 1, 2 and 3: the mean of a merge is w0 + 2 w1 + 3 w2."""
    root = tmp_path_factory.mktemp("family")
    names = ("layers.0.weight", "layers.1.weight", "head.weight")
    states = [{name: torch.full((4, 4), float(k)) for name in names} for k in range(4)]
    models.save_family(root, states[0], states[1:])
    return root


@pytest.fixture(autouse=True)
def there(no_waiting: None, family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)


def study(**changes: Any) -> dict[str, Any]:
    merge: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base"}
    merge["models"] = [{"model": f"m{k}"} for k in range(3)]
    made: dict[str, Any] = {
        "merge": merge,
        "metric": METRIC,
        "data": {"search": "validation"},
        "sampler": "random",
        "parameters": WEIGHTS,
        "budget": 12,
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def search(
    out: Path, plots: bool = False, merge: bool = False, merged: Any = None, **changes: Any
) -> SearchResult:
    """Search; `merged` is the merge's configuration, `merge` whether to write the best model."""
    config = study(**changes)
    return run_search({**config, "merge": merged or config["merge"]}, out, plots=plots, merge=merge)


def told(trials: list[Trial]) -> list[tuple[Any, ...]]:
    """Return the parts of trials that must not depend on workers or interruptions."""
    return [(t.number, t.values, t.value, t.state, t.error) for t in trials]
