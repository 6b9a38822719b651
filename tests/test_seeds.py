"""Which seed random masks are drawn by: a configuration's own, 0 too, before the command's."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pymerge.adapters import load
from pymerge.commands.main import main
from pymerge.methods import METHODS
from pymerge.search.config import load_search
from tests import models
from tests.adapter_files import factors, save_lora

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

DRAWN = [name for name, spec in METHODS.items() if any(p.name == "seed" for p in spec.parameters)]
# (in the configuration, on the command line) -> the seed that counts
SEEDS: list[tuple[int | None, int | None, int]] = [
    (0, 5, 0),
    (5, 0, 5),
    (5, 3, 5),
    (None, 5, 5),
    (0, None, 0),
    (None, None, 0),
]


def run(
    command: str, config: dict[str, Any], out: Path, own: int | None, given: int | None
) -> None:
    """Run a command with seeds in its configuration and in its options."""
    config = deepcopy(config)
    if own is not None:
        config["parameters"]["seed"] = own
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    options = [] if given is None else ["--seed", str(given)]
    assert main([command, str(file), str(out), "--quiet", *options]) == 0


def test_which_methods_draw() -> None:
    assert sorted(DRAWN) == ["dare_linear", "dare_ties", "della", "della_linear"]


@pytest.mark.parametrize("method", DRAWN)
def test_a_merge(method: str, tmp_path: Path) -> None:
    base = {"w": torch.zeros(40, 50)}
    tuned = {"w": torch.arange(1.0, 2001.0).reshape(40, 50)}
    models.save_family(tmp_path, base, [tuned])
    config = models.config(tmp_path, method, 1, density=0.5, rescale="none")
    drawn = {}
    for seed in (0, 3, 5):
        run("merge", config, tmp_path / f"seed{seed}", seed, seed)
        drawn[seed] = models.weight_bytes(tmp_path / f"seed{seed}")
    assert drawn[0] != drawn[5] != drawn[3]
    for number, (own, given, seed) in enumerate(SEEDS):
        run("merge", config, tmp_path / f"out{number}", own, given)
        assert models.weight_bytes(tmp_path / f"out{number}") == drawn[seed], (own, given)


@pytest.mark.parametrize(
    ("method", "onto"),
    [
        ("dare_linear", False),
        ("dare_linear", True),
        ("della", False),
        ("della", True),
        ("peft_dare_linear", False),
    ],
)
def test_a_merge_of_adapters(method: str, onto: bool, tmp_path: Path) -> None:
    save_lora(tmp_path / "m0", factors({"q": (12, 20)}))
    models.save(tmp_path / "base", {"q.weight": torch.zeros(12, 20)}, config=None)
    config = models.config(tmp_path, method, 1, density=0.5)
    if not onto:
        del config["base_model"]

    def delta(out: Path) -> torch.Tensor:
        return models.load(out)["q.weight"] if onto else load(out).delta_weight("q")

    drawn = {}
    for seed in (0, 3, 5):
        run("merge-adapters", config, tmp_path / f"seed{seed}", seed, seed)
        drawn[seed] = delta(tmp_path / f"seed{seed}")
    assert not torch.equal(drawn[0], drawn[5])
    for number, (own, given, seed) in enumerate(SEEDS):
        run("merge-adapters", config, tmp_path / f"out{number}", own, given)
        assert torch.equal(delta(tmp_path / f"out{number}"), drawn[seed]), (own, given)


@pytest.mark.parametrize(
    ("own", "given", "expected"), [(3, 0, 0), (0, 3, 3), (3, None, 3), (None, None, 0), (0, 0, 0)]
)
def test_a_search_takes_the_seed_it_is_given(
    own: int | None, given: int | None, expected: int
) -> None:
    """Of a search --seed is instead of the configuration's."""
    config: dict[str, Any] = {
        "merge": {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]},
        "metric": "somewhere:metric",
        "data": {"search": "validation"},
        "sampler": "random",
        "budget": 3,
        "parameters": {"models[*].parameters.weight": {"low": 0, "high": 1}},
    }
    if own is not None:
        config["seed"] = own
    assert load_search(config, seed=given).seed == expected
