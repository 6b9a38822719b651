"""The text suite: MiniLM-L6 on eight classification tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.demo.cache import Cache, write_text
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_version
from benchmarks.quality import text_model, text_tasks
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.suite import Split
from benchmarks.quality.text_tasks import TASKS, TextTask
from benchmarks.quality.training import Training

__all__ = ["Text"]

# Increase this when the code produces something else from the same settings.
_REVISION = 2
# Maximum numbers of texts.
_SIZES = {"train": 2000, "validation": 120, "test": 1500}
_QUICK_SIZES = {"train": 80, "validation": 20, "test": 40}
_LENGTH = 32


class Text(Classifiers):
    """MiniLM-L6, eight tasks."""

    name = "text"
    title = "MiniLM-L6, eight text classification tasks"
    tasks = tuple(TASKS)
    about = tuple(about for about, _ in TASKS.values())
    training = Training(epochs=1, batch=20, rate=5e-4, warmup=10)
    evaluation_batch = 256
    join = staticmethod(text_model.join)

    def __init__(
        self, cache: Cache, log: Log, *, quick: bool = False, whole_tests: bool = False
    ) -> None:
        super().__init__(cache, log)
        self.sizes: dict[str, int | None] = {**(_QUICK_SIZES if quick else _SIZES)}
        if whole_tests:
            self.sizes["test"] = None
        drawn = "all texts" if whole_tests else f"a draw of at most {self.sizes['test']:,} texts"
        self.notes = (f"Test set of each task: {drawn}.",)

    def recipe(self) -> dict[str, Any]:
        packages = (*text_tasks.PACKAGES, *text_tasks.CODE_PACKAGES, text_model.PACKAGE)
        return {
            "revision": _REVISION,
            "packages": [package_version(name) for name in packages],
            "sizes": {part: size for part, size in self.sizes.items() if part != "test"},
            "length": _LENGTH,
            "fixed": text_model.FIXED_LAYERS,
            "compute": str(text_model.compute_dtype()),
        }

    def test_recipe(self) -> dict[str, Any]:
        return {"test": self.sizes["test"]}

    def settings(self) -> dict[str, Any]:
        return {
            **self.recipe(),
            "sizes": self.sizes,
            "training": self.training.recipe(),
            "adaptation": asdict(self.adaptation),
        }

    def load(self) -> nn.Module:
        return text_model.load()

    def mask(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch != 0).any(dim=2)

    def read(self) -> list[Split]:
        return [self._read(name) for name in self.tasks]

    def _read(self, name: str) -> Split:
        recipe = {"suite": self.recipe(), **self.test_recipe(), "task": name}
        target = self.cache.path(f"texts-{name}", recipe)
        if not target.is_dir():
            task = text_tasks.load_task(name, **cast(Any, self.sizes))
            self.cache.build(target, lambda folder: self._encode(task, folder))
        kept = json.loads((target / "task.json").read_text(encoding="utf-8"))
        states = load_file(target / "states.safetensors")
        parts = {
            part: (
                text_model.Texts(states[part], kept[part]["lengths"]),
                torch.tensor(kept[part]["labels"]),
            )
            for part in self.sizes
        }
        return Split(len(kept["classes"]), **parts)

    def _encode(self, task: TextTask, folder: Any) -> None:
        kept: dict[str, Any] = {"classes": task.classes}
        found = {}
        parts = {part: getattr(task, part) for part in self.sizes}
        total = sum(text_model.batches_of(pairs) for pairs in parts.values())
        with self.log.steps(f"lower layers on {task.name}", total) as advance:
            for part, pairs in parts.items():
                texts, labels = zip(*pairs, strict=True)
                found[part], lengths = text_model.lower_states(texts, _LENGTH, advance)
                kept[part] = {"lengths": lengths, "labels": list(labels)}
        save_file(found, folder / "states.safetensors")
        write_text(folder / "task.json", json.dumps(kept))
