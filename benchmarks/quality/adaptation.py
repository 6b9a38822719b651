"""How the suites learn AdaMerging's coefficients: from inputs without labels, in cached stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

__all__ = ["Adaptation", "Drawn", "Learned", "learn"]

_STATE = "fit.safetensors"


@dataclass(frozen=True)
class Adaptation:
    """How coefficients are learned.

    Attributes:
        steps: the coefficients after each of these numbers of steps are stored; validation chooses.
        batch: inputs of each task in a step.
        rate: of Adam.
        scale: factor of the cosines before the entropy of their softmax is computed.
        balanced: divide each task's entropy by its largest value, the logarithm of its classes.
    """

    steps: tuple[int, ...] = (10, 20, 40, 70, 100)
    batch: int = 8
    rate: float = 5e-3
    scale: float = 50.0
    balanced: bool = True

    def recipe(self) -> dict[str, Any]:
        """Return what the learned coefficients depend on, without the number of steps."""
        found = asdict(self)
        del found["steps"]
        return found


class Drawn(Sequence[Any]):
    """Batches of inputs without labels, drawn from several sets as if they were one.

    A batch comes from a single set, as each has its own form; every input is drawn once before any
    is drawn again.

    Args:
        sets: inputs; `one[positions]` is a batch.
        batch: inputs in a batch.
        count: batches.
        seed: of the order.
    """

    def __init__(self, sets: Sequence[Any], batch: int, count: int, seed: int) -> None:
        self.sets = sets
        generator = torch.Generator().manual_seed(seed)
        self._batches: list[tuple[int, torch.Tensor]] = []
        while len(self._batches) < count:
            rounds = []
            for number, one in enumerate(sets):
                size = min(batch, len(one))
                order = torch.randperm(len(one), generator=generator)
                whole = len(one) // size * size
                rounds += [(number, chosen) for chosen in order[:whole].split(size)]
            mixed = torch.randperm(len(rounds), generator=generator).tolist()
            self._batches += [rounds[position] for position in mixed]
        del self._batches[count:]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: Any) -> Any:
        chosen, positions = self._batches[number]
        return self.sets[chosen][positions]


@dataclass(frozen=True)
class Learned:
    """The result of a run after some steps.

    coefficients: [models, groups], as in Adam. entropies: [steps, tasks], of each batch.
    """

    groups: tuple[str, ...]
    coefficients: torch.Tensor
    entropies: torch.Tensor


def learn(
    folder_of: Callable[[int, Callable[[Path], None]], Path],
    make: Callable[[], Any],
    loaders: Sequence[Sequence[Any]],
    how: Adaptation,
    steps: int,
    **fit: Any,
) -> Learned:
    """Return the coefficients after `steps`; the intervals between stored steps are stages.

    Args:
        folder_of: (steps, builder of a folder) -> the stage's folder, built the first time.
        make: returns the `AdaMerging` with its initial coefficients.
        loaders: of each task; the same on every call.
        how: the settings.
        steps: one of `how.steps`.
        fit: more arguments of `AdaMerging.fit`.
    """
    before: Path | None = None
    for count in how.steps[: how.steps.index(steps) + 1]:

        def build(folder: Path, count: int = count, before: Path | None = before) -> None:
            if before is not None:
                shutil.copyfile(before / _STATE, folder / _STATE)
            make().fit(
                loaders,
                steps=count,
                lr=how.rate,
                batches_per_task=1,
                checkpoint=folder / _STATE,
                progress=False,
                **fit,
            )

        before = folder_of(count, build)
    assert before is not None
    with safe_open(before / _STATE, "pt") as file:
        coefficients = file.get_tensor("coefficients")
        kept = file.metadata()
    history = json.loads(kept["history"])
    groups = tuple(json.loads(kept["settings"])["groups"])
    return Learned(groups, coefficients, torch.tensor([row["tasks"] for row in history]))
