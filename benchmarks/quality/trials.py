"""Why AdaMerging performs as it does: other aims, scales and directions, on validation data.

    python -m benchmarks.quality.trials [text|vision] [--steps 40] [--save]

Layer-wise coefficients of the first seed's models are learned in several ways, and the validation
accuracy is recorded along the way. The test labels are not used.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

import pymerge
from benchmarks.demo.cache import Cache, digest
from benchmarks.demo.console import Log
from benchmarks.quality.__main__ import SUITES
from benchmarks.quality.adaptation import Drawn
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.methods import State
from benchmarks.quality.suite import digest_state
from benchmarks.tables import RESULTS, Table, save
from pymerge.adamerging import entropy_of_each

__all__ = ["TRIALS", "Trial", "main", "run_trial", "singular_parts"]

_REVISION = 1
_RATE = 1e-2


@dataclass(frozen=True)
class Trial:
    """A way to learn coefficients.

    Attributes:
        label: of its row.
        scale: of the cosines.
        balanced: divide each task's aim by the logarithm of its classes.
        labelled: lower the cross-entropy on training data instead of the entropy on inputs without
            labels: what coefficients could achieve if entropy were not an approximation.
        singular: use TSV-M's parts, which add up to its merge at coefficients of 1, instead of task
            vectors at 0.3.
    """

    label: str
    scale: float
    balanced: bool = True
    labelled: bool = False
    singular: bool = False


TRIALS = (
    Trial("cross-entropy of training labels", 50.0, labelled=True),
    Trial("entropy at 50, balanced", 50.0),
    Trial("TSV-M's parts, entropy at 50, balanced", 50.0, singular=True),
    Trial("entropy at 20, summed", 20.0, balanced=False),
    Trial("entropy at 100, balanced", 100.0),
)


@dataclass(frozen=True)
class _Labelled:
    inputs: Any
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: torch.Tensor) -> tuple[Any, torch.Tensor]:
        return self.inputs[positions], self.labels[positions]


def singular_parts(base: State, models: Sequence[State]) -> list[State]:
    """Return models whose task vectors add up to TSV-M's: a task's share of the orthogonal factors.

    Gargiulo et al. 2025, algorithm 1. For a tensor that is not a matrix, a share is 1/K.
    """
    parts = [dict(base) for _ in models]
    for name, start in base.items():
        if not start.is_floating_point():
            continue
        deltas = [model[name] - start for model in models]
        if start.dim() != 2:
            shares = [delta / len(models) for delta in deltas]
        else:
            keep = max(1, min(start.shape) // len(models))
            found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
            left = _nearest_orthogonal(torch.cat([u[:, :keep] for u, _, _ in found], dim=1))
            right = _nearest_orthogonal(torch.cat([v[:keep] for _, _, v in found], dim=0))
            shares = [
                (u * s[:keep]) @ v
                for u, (_, s, _), v in zip(
                    left.split(keep, dim=1), found, right.split(keep, dim=0), strict=True
                )
            ]
        for part, share in zip(parts, shares, strict=True):
            part[name] = start + share
    return parts


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def run_trial(
    suite: Classifiers,
    tuned: Sequence[State],
    trial: Trial,
    steps: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Return {"step", "accuracy" (of each task, validation), "aim"} at the start and later."""
    models = singular_parts(suite.base(), tuned) if trial.singular else tuned
    heads = [suite.adapting_head(number, trial.scale) for number in range(len(suite.tasks))]
    how: dict[str, Any] = {"clamp": None, "init": 1.0} if trial.singular else {"init": 0.3}
    ada = pymerge.AdaMerging(suite.load(), suite.base(), models, heads=heads, **how)
    batch = suite.adaptation.batch
    loaders = []
    for number, split in enumerate(suite.splits):
        sets = [_Labelled(*split.validation), _Labelled(*split.test)]
        sets = [_Labelled(*split.train)] if trial.labelled else sets
        loaders.append(Drawn(sets, batch, steps, number))
    optimizer = torch.optim.Adam([ada.raw_coefficients], lr=_RATE)
    rows = [_row(suite, ada, 0, [])]
    for step in range(steps):
        optimizer.zero_grad()
        merged = ada.merged_parameters()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in merged.items()}
        aims = []
        for task, split in enumerate(suite.splits):
            inputs, labels = loaders[task][step]
            logits = ada.run(leaves, (inputs,), {}, task)
            aim = F.cross_entropy(logits, labels) if trial.labelled else None
            aim = entropy_of_each(logits).mean() if aim is None else aim
            (aim / math.log(split.classes) if trial.balanced else aim).backward()
            aims.append(aim.item())
        found = [(merged[n], leaf.grad) for n, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([t for t, _ in found], [g for _, g in found])
        optimizer.step()
        if (step + 1) % max(1, steps // 4) == 0:
            rows.append(_row(suite, ada, step + 1, aims))
        advance()
    return rows


def _row(suite: Classifiers, ada: Any, step: int, aims: list[float]) -> dict[str, Any]:
    state = ada.merged_state_dict()
    scores = [suite.item_scores(state, task, "validation") for task in range(len(suite.tasks))]
    return {"step": step, "accuracy": [sum(one) / len(one) for one in scores], "aim": aims}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials of a suite; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.trials", description=__doc__)
    parser.add_argument("suite", nargs="?", default="text", choices=("text", "vision"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", action="store_true", help=f"write into {RESULTS.name}/")
    options = parser.parse_args(arguments)
    log = Log()
    cache = Cache(Cache.default(options.suite, "quality"))
    suite = SUITES[options.suite](cache, log, False)
    assert isinstance(suite, Classifiers)
    suite.prepare()
    tuned = [suite.fine_tune(task, 0) for task in range(len(suite.tasks))]
    table = Table(f"{suite.title}: trials of AdaMerging, layers: accuracy, validation data", [])
    records = []
    for trial in TRIALS:
        recipe = {
            "suite": suite.recipe(),
            **suite.test_recipe(),
            "tuned": digest([digest_state(state) for state in tuned]),
            "trial": asdict(trial),
            "steps": options.steps,
            "batch": suite.adaptation.batch,
            "rate": _RATE,
            "revision": _REVISION,
        }

        def compute(trial: Trial = trial) -> list[dict[str, Any]]:
            with log.steps(trial.label, options.steps) as advance:
                return run_trial(suite, tuned, trial, options.steps, advance)

        path = cache.root / "studies" / f"trial-{digest(recipe)}.json"
        rows = cache.load(path, compute)
        records.append({**recipe, "rows": rows})
        means = [100 * sum(row["accuracy"]) / len(row["accuracy"]) for row in rows]
        if not table.columns:
            table.columns += ["", *(f"{row['step']} steps" for row in rows)]
        table.add(trial.label, *(f"{mean:.1f}" for mean in means))
        table.show()
        if options.save:
            save(
                f"quality-{suite.name}-trials",
                {f"quality-{suite.name}-trials": table},
                records,
                RESULTS,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
