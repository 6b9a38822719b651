"""The interface of a suite for the runner: models, tasks, scores."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo.cache import Cache, digest
from benchmarks.demo.console import Log
from benchmarks.quality.methods import Method, NotAvailable, State

__all__ = ["Inputs", "Merged", "Part", "Split", "Suite", "digest_state", "load_state", "save_state"]

Part = Literal["validation", "test"]
_WEIGHTS = "model.safetensors"


class Inputs(Protocol):
    """Inputs of a model: `inputs[positions]` is a batch; `batches` groups all for evaluation."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: torch.Tensor) -> Any: ...
    def batches(self, size: int) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Split:
    """Inputs and labels of the three parts of a task, and the number of its classes."""

    classes: int
    train: tuple[Inputs, torch.Tensor]
    validation: tuple[Inputs, torch.Tensor]
    test: tuple[Inputs, torch.Tensor]


@dataclass(frozen=True)
class Merged:
    """The models of a seed, and the results of the methods.

    `state(key)` is the model that a method made with the coefficient chosen on validation data, or
    the list of them, one for each task; "pretrained" and "individual" are included.
    """

    seed: int
    base: State
    tuned: Sequence[State]
    chosen: Mapping[str, float]
    state: Callable[[str], list[State]]


class Suite(ABC):
    """A benchmark: a pretrained model, tasks, and how well a state dict does on each.

    Attributes:
        name: of the suite; of its folder in the cache.
        title: of its tables.
        tasks: names.
        about: a description of each task, in a sentence.
        better: which scores are good. Scores of items are better when higher in any case.
        unit: of the scores that are shown.
        notes: for the document.
        trained: whether there are fine-tunes, which differ between seeds.
        ridge: of RegMean.
    """

    name: str
    title: str
    tasks: Sequence[str]
    about: Sequence[str]
    better: Literal["higher", "lower"] = "higher"
    unit: str = "accuracy in per cent"
    notes: Sequence[str] = ()
    trained: bool = True
    ridge: float = 0.0

    def __init__(self, cache: Cache, log: Log) -> None:
        self.cache, self.log = cache, log

    @abstractmethod
    def prepare(self) -> None:
        """Read data and weights; called before everything else."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """Return the settings on which the tasks, heads and the base model depend."""

    def test_recipe(self) -> dict[str, Any]:
        """Return further settings, not in `recipe`, on which only the test sets depend."""
        return {}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return sizes and training, for the results."""

    @abstractmethod
    def base(self) -> State:
        """Return the pretrained model's state."""

    @abstractmethod
    def fine_tune(self, task: int | None, seed: int) -> State:
        """Return the state fine-tuned on a task, or on all (None); cached."""

    @abstractmethod
    def item_scores(self, state: State, task: int, part: Part) -> list[float]:
        """Return the score of a model on each item of a part of a task."""

    def statistics(self, kind: str, states: Sequence[State]) -> list[Any]:
        """Return Fisher information ("fisher") or Gram matrices ("gram") of each task's model."""
        raise NotAvailable("examples with classes")

    def adapt(
        self,
        base: State,
        states: Sequence[State],
        seed: int,
        *,
        steps: int,
        tasks: Sequence[int] | None = None,
        **settings: Any,
    ) -> State:
        """Return the state that AdaMerging learns from inputs without labels."""
        raise NotAvailable("a classifier, whose entropy AdaMerging lowers")

    def extras(self, merged: Merged) -> dict[str, Any]:
        """Return additional measurements on the first seed; the suite itself caches them."""
        return {}

    def applies(self, method: Method) -> bool:
        """Return whether the suite provides what a method needs."""
        return True

    def adjusted(self, method: Method) -> Method:
        """Return a method with the settings that this suite tries."""
        return method

    def shown(self, mean: float) -> float:
        """Return a mean of item scores in the unit that is shown."""
        return 100.0 * mean

    def stage(self, name: str, recipe: dict[str, Any], make: Callable[[], State]) -> State:
        """Return a state dict from the cache, made the first time."""
        target = self.cache.path(name, {"suite": self.recipe(), **recipe})
        if not target.is_dir():
            self.cache.build(target, lambda folder: save_state(make(), folder))
        return load_state(target)

    def study(self, name: str, merged: Merged, make: Callable[[], Any], **recipe: Any) -> Any:
        """Return measurements on the models of a seed, as JSON values, from the cache.

        Args:
            name: of the file.
            merged: the models.
            make: measures, the first time.
            recipe: anything else on which they depend.
        """
        tuned = digest([digest_state(state) for state in merged.tuned])
        recipe = {"suite": self.recipe(), **self.test_recipe(), "tuned": tuned, **recipe}
        return self.cache.load(self.cache.root / "studies" / f"{name}-{digest(recipe)}.json", make)


def digest_state(state: State) -> str:
    """Return a hash of a state dict: names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:20]


def save_state(state: State, folder: Path) -> None:
    """Write a state dict into a folder."""
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / _WEIGHTS
    )


def load_state(folder: Path) -> State:
    """Return the state dict that `save_state` wrote."""
    return load_file(folder / _WEIGHTS)
