"""The merges that the demos compare, made with the real command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.demo.cache import write_text
from benchmarks.demo.console import Log
from pymerge.merging.report import MergeReport

__all__ = ["RECIPES", "Merged", "Recipe", "merge", "merge_all"]


@dataclass(frozen=True)
class Recipe:
    """A merge to show.

    `name` names its files, `label` its row in the table; the parameters are those of the YAML, for
    each model and for the merge.
    """

    name: str
    label: str
    method: str
    needs_base: bool = True
    model_parameters: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def config(self, base: Path, models: Sequence[Path], dtype: str) -> dict[str, Any]:
        """Return the merge configuration, as the YAML file contains it."""
        config: dict[str, Any] = {"merge_method": self.method}
        if self.needs_base:
            config["base_model"] = str(base)
        entries: list[dict[str, Any]] = []
        for model in models:
            entry: dict[str, Any] = {"model": str(model)}
            if self.model_parameters:
                entry["parameters"] = dict(self.model_parameters)
            entries.append(entry)
        config["models"] = entries
        if self.parameters:
            config["parameters"] = dict(self.parameters)
        config["dtype"] = dtype
        return config


# One customary setting each, none of them found by a search. The first three are mergekit's format
# and mean the same there and here; `semantics` is pymerge's own key.
RECIPES = (
    Recipe("averaging", "averaging", "linear", False, {"weight": 1.0}),
    Recipe("task-arithmetic", "task arithmetic", "task_arithmetic", True, {"weight": 0.5}),
    Recipe("ties-tensor", "TIES, per tensor", "ties", True, {"weight": 1.0, "density": 0.2}),
    Recipe(
        "ties-model",
        "TIES, whole model",
        "ties",
        True,
        {},
        {"semantics": "official", "density": 0.2},
    ),
)


@dataclass(frozen=True)
class Merged:
    """A finished merge: where it is and how long it took."""

    recipe: Recipe
    path: Path
    seconds: float
    peak_bytes: int


def merge_all(
    base: Path, models: Sequence[Path], output: Path, dtype: str, log: Log
) -> list[Merged]:
    """Write the configurations, run every merge of RECIPES, and return the results.

    Args:
        base: the pretrained checkpoint.
        models: the fine-tuned checkpoints.
        output: a folder; gets `configs/NAME.yml`, `merged/NAME/` and `reports/NAME.json`.
        dtype: of the merged weights, as YAML names it.
        log: reports every merge.

    Raises:
        SystemExit: a merge failed; with pymerge's output.
    """
    log.say(f"merge, in {output}:")
    merged = []
    for recipe in RECIPES:
        config = output / "configs" / f"{recipe.name}.yml"
        text = yaml.safe_dump(recipe.config(base, models, dtype), sort_keys=False)
        write_text(config, f"# {recipe.label}\n{text}")
        target = output / "merged" / recipe.name
        report = merge(config, target, output / "reports" / f"{recipe.name}.json")
        log.say(
            f"  pymerge merge {config.relative_to(output)} {target.relative_to(output)}"
            f"  ({report.seconds:.2f} s)"
        )
        merged.append(Merged(recipe, target, report.seconds, report.peak_anonymous))
    return merged


def merge(config: Path, target: Path, report: Path) -> MergeReport:
    """Run `pymerge merge` in a separate process and return its report.

    Raises:
        SystemExit: it failed; the message is its output.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pymerge", "merge", str(config), str(target)]
    command += ["--report", str(report), "--force", "--quiet"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(
            f"pymerge merge {config} {target} failed with code {finished.returncode}:\n"
            f"{finished.stdout}{finished.stderr}"
        )
    return MergeReport.from_json(report.read_text(encoding="utf-8"))
