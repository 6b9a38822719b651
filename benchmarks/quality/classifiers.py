"""The common part of the classifier suites: an encoder under fixed heads, and its evaluations."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo.cache import Cache, digest
from benchmarks.demo.console import Log
from benchmarks.quality.adaptation import Adaptation, Drawn, Learned, learn
from benchmarks.quality.methods import Method, State, available
from benchmarks.quality.suite import Inputs, Merged, Part, Split, Suite, digest_state
from benchmarks.quality.training import CosineHead, Head, Training, class_means, fine_tune, steps

__all__ = ["Classifiers"]


class Classifiers(Suite):
    """An encoder under fixed heads, by default cosines with the classes' mean features under the
    base on the training set.

    Subclasses define `load` and `read`.
    """

    training = Training()
    evaluation_batch = 64
    statistics_batch = 32
    convolutions = False  # whether RegMean solves for them
    adaptation = Adaptation()
    join: str | Callable[[Sequence[Any]], Any] = "concatenate"  # AdaMerging's batches of all tasks
    statistics_samples = 256

    def __init__(self, cache: Cache, log: Log) -> None:
        super().__init__(cache, log)
        self.splits: list[Split] = []
        self.heads: list[Head] = []
        self._model: nn.Module | None = None
        self._adamerging: tuple[Any, Any] | None = None  # the last one, and its arguments

    @abstractmethod
    def load(self) -> nn.Module:
        """Return the pretrained encoder: batch -> unit features."""

    @abstractmethod
    def read(self) -> list[Split]:
        """Return the splits of all tasks."""

    def adjusted(self, method: Method) -> Method:
        if method.symbol != "steps":
            return method
        steps = self.adaptation.steps
        return replace(method, values=steps, default=steps[-1])

    def kept(self, model: nn.Module) -> State:
        """Return the weights of a model in the form in which a checkpoint stores them."""
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def adapting_head(self, task: int, scale: float | None = None) -> Head:
        """Return the function from features to the logits whose entropy AdaMerging lowers.

        Args:
            scale: factor of the cosines; default that of `adaptation`.
        """
        head = self.heads[task]
        assert isinstance(head, CosineHead)
        return CosineHead(head.means, self.adaptation.scale if scale is None else scale)

    def mask(self, batch: torch.Tensor) -> torch.Tensor | None:
        """Return the positions of a batch that are not padding, [inputs, positions], or None."""
        return None

    def prepare(self) -> None:
        """Read the data and create the heads."""
        self._model = self.load()
        self._base = self.kept(self._model)
        self.splits = self.read()
        for name, about, split in zip(self.tasks, self.about, self.splits, strict=True):

            def make(split: Split = split) -> State:
                features = self.features(self._base, split.train[0])
                return {"means": class_means(features, split.train[1], split.classes)}

            self.heads.append(CosineHead(self.stage(f"head-{name}", {"head": name}, make)["means"]))
            self.log.say(
                f"task [bold]{name}[/]: {about} ({split.classes} classes;"
                f" {len(split.train[1])} train, {len(split.validation[1])} validation,"
                f" {len(split.test[1])} test)"
            )

    def model(self, state: State) -> nn.Module:
        """Return the encoder with these weights; it is a single object, which is reused."""
        assert self._model is not None
        self._model.load_state_dict(state)
        return self._model

    def fresh(self) -> nn.Module:
        """Return a separate pretrained encoder."""
        return copy.deepcopy(self.model(self._base))

    @torch.inference_mode()
    def features(self, state: State, inputs: Inputs) -> torch.Tensor:
        """Return the features of inputs: [inputs, width]."""
        model = self.model(state)
        rows: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
        for positions in inputs.batches(self.evaluation_batch):
            for position, row in zip(positions.tolist(), model(inputs[positions]), strict=True):
                rows[position] = row
        return torch.stack(rows)

    def base(self) -> State:
        return self._base

    def fine_tune(self, task: int | None, seed: int) -> State:
        training = self.training.with_seed(seed)
        chosen = range(len(self.tasks)) if task is None else [task]
        parts = [(self.splits[n].train[0], self.splits[n].train[1], self.heads[n]) for n in chosen]
        label = "all tasks" if task is None else self.tasks[task]

        def make() -> State:
            model = self.fresh()
            total = steps([len(labels) for _, labels, _ in parts], training)
            with self.log.steps(f"fine-tune on {label}, seed {seed}", total) as advance:
                fine_tune(model, parts, training, advance)
            return self.kept(model)

        name = "multi-task" if task is None else self.tasks[task]
        return self.stage(f"{name}-{seed}", {"task": name, "training": training.recipe()}, make)

    def item_scores(self, state: State, task: int, part: Part) -> list[float]:
        inputs, labels = getattr(self.splits[task], part)
        chosen = self.heads[task](self.features(state, inputs)).argmax(dim=1)
        return (chosen == labels).float().tolist()

    def statistics(self, kind: str, states: Sequence[State]) -> list[Any]:
        found = []
        with self.log.steps(f"collect {kind}", len(states)) as advance:
            for task, state in enumerate(states):
                recipe = {
                    "task": self.tasks[task],
                    "weights": digest_state(state),
                    "samples": self.statistics_samples,
                }
                found.append(
                    self.stage(
                        f"{kind}-{self.tasks[task]}",
                        recipe,
                        lambda task=task, state=state: self._collect(kind, task, state),
                    )
                )
                advance()
        return found

    def _collect(self, kind: str, task: int, state: State) -> State:
        inputs, labels = self.splits[task].train
        size, step = min(self.statistics_samples, len(labels)), self.statistics_batch
        loader = [inputs[positions] for positions in torch.arange(size).split(step)]
        model, head = self.model(state), self.heads[task]
        if kind == "gram":
            collect = available("collect_gram")
            how = {"mask": self.mask, "convolutions": self.convolutions}
            return dict(collect(model, loader, samples=size, **how))
        # expected labels would need a backward pass for each of them
        return dict(
            available("collect_fisher")(
                model,
                loader,
                labels="sampled",
                samples=size,
                logits=lambda network, batch: head(network(batch)),
                vectorize=False,
            )
        )

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
        learned = self.learned(base, states, seed, steps=steps, tasks=tasks, **settings)
        ada = self.adamerging(base, states, tasks, **settings)
        with torch.no_grad():
            ada.raw_coefficients.copy_(learned.coefficients)
        return ada.merged_state_dict()

    def learned(
        self,
        base: State,
        states: Sequence[State],
        seed: int,
        *,
        steps: int,
        tasks: Sequence[int] | None = None,
        **settings: Any,
    ) -> Learned:
        """Return AdaMerging's coefficients after `steps`, of all tasks or of some; cached.

        It sees the inputs of the validation and of the test set, without their labels: it is a
        test-time method, and its authors' code adapts to the test set too.
        """
        how, numbers = self.adaptation, self._numbers(tasks)
        # the hashes identify the models
        recipe = {"adapt": digest([digest_state(s) for s in states]), "seed": seed, **settings}
        recipe |= {"suite": self.recipe(), **self.test_recipe(), "adaptation": how.recipe()}
        loaders = [
            Drawn(
                [self.splits[n].validation[0], self.splits[n].test[0]], how.batch, steps, seed + n
            )
            for n in numbers
        ]
        name = f"adamerging-{settings['granularity']}{'-pp' if settings['trimmed'] else ''}-{seed}"

        def folder_of(count: int, build: Callable[[Path], None]) -> Path:
            target = self.cache.path(f"{name}-{count}", {**recipe, "steps": count})
            if not target.is_dir():
                self.log.say(f"{name}, to step {count} ...")
                self.cache.build(target, build)
            return target

        classes = [self.splits[n].classes for n in numbers]
        return learn(
            folder_of,
            lambda: self.adamerging(base, states, tasks, **settings),
            loaders,
            how,
            steps,
            join=self.join,
            weights=[1.0 / math.log(count) for count in classes] if how.balanced else None,
            seed=seed,
        )

    def adamerging(
        self,
        base: State,
        states: Sequence[State],
        tasks: Sequence[int] | None = None,
        *,
        init: float,
        **settings: Any,
    ) -> Any:
        """Return the `AdaMerging` of models of all tasks, or of some, under the tasks' heads.

        The last one is kept, because creating it takes long: trimming goes over all models.
        """
        numbers = self._numbers(tasks)
        key = (digest_state(base), [digest_state(s) for s in states], list(numbers), settings)
        if self._adamerging is None or self._adamerging[0] != key:
            self._adamerging = None
            heads = [self.adapting_head(n) for n in numbers]
            made = available("AdaMerging")(self.fresh(), base, states, heads=heads, **settings)
            self._adamerging = key, made
        ada = self._adamerging[1]
        with torch.no_grad():
            ada.raw_coefficients.fill_(init)
        return ada

    def extras(self, merged: Merged) -> dict[str, Any]:
        """Return the study of entropies, and the coefficients that AdaMerging has learned."""
        if "ada_layer" not in merged.chosen:
            return {}
        from benchmarks.quality import entropy

        return {
            "entropy": self.study(
                "entropy",
                merged,
                lambda: entropy.study(self, merged.tuned),
                scale=self.adaptation.scale,
                revision=entropy.REVISION,
            ),
            "coefficients": self.coefficients(merged),
        }

    def coefficients(self, merged: Merged) -> dict[str, Any]:
        """Return the coefficients of AdaMerging by layers, for a picture."""
        steps = int(merged.chosen["ada_layer"])
        how: dict[str, Any] = {"granularity": "layer", "trimmed": False, "init": 0.3}
        learned = self.learned(merged.base, merged.tuned, merged.seed, steps=steps, **how)
        return {
            "groups": learned.groups,
            "values": learned.coefficients.clamp(0.0, 1.0).tolist(),
            "steps": steps,
        }

    def _numbers(self, tasks: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.tasks)) if tasks is None else tasks
