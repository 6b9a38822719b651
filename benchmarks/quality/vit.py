"""The vit suite: a small Vision Transformer, pre-trained here, on eight image tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Advance, Log
from benchmarks.demo.packages import package_version
from benchmarks.quality import image_tasks, vit_pictures, vit_tasks, vit_training
from benchmarks.quality.adaptation import Adaptation
from benchmarks.quality.debian import unpacked
from benchmarks.quality.methods import State
from benchmarks.quality.suite import Classifiers, Split
from benchmarks.quality.training import CosineHead, Training
from benchmarks.quality.vit_model import Lower, Shape, Upper
from benchmarks.quality.vit_pictures import Pictures
from benchmarks.quality.vit_tasks import TASKS
from benchmarks.quality.vit_training import PreTraining

__all__ = ["Tokens", "Vit"]

_REVISION = 1
_SIZES = {"train": 1500, "validation": 200, "test": 600}
# a task that has no more
_FEWER = {"digits": {"train": 1000, "validation": 170, "test": 530}}
_QUICK_SIZES = {"train": 60, "validation": 10, "test": 20}
_PRE_TRAINING = PreTraining()
_QUICK_PRE_TRAINING = PreTraining(steps=20, batch=32, warmup=5)
_BATCH = 100


class Tokens:
    """What the lower part makes of images, [n, tokens, width]; batches of it in float32."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        return self.tokens[positions].float()

    def batches(self, size: int) -> list[torch.Tensor]:
        """Return the positions of all images in batches."""
        return list(torch.arange(len(self)).split(size))


class Vit(Classifiers):
    """A Vision Transformer, eight tasks."""

    name = "vit"
    title = "a small ViT pre-trained here, eight image tasks"
    tasks = tuple(TASKS)
    about = tuple(about for about, _ in TASKS.values())
    training = Training(epochs=6, batch=50, rate=7e-4, warmup=10)
    adaptation = Adaptation(batch=16)
    evaluation_batch = 100
    shape = Shape()
    centred = True

    def __init__(self, cache: Cache, log: Log, *, quick: bool = False) -> None:
        super().__init__(cache, log)
        self.sizes = _QUICK_SIZES if quick else _SIZES
        self.pre_training = _QUICK_PRE_TRAINING if quick else _PRE_TRAINING
        self._weights: dict[str, dict[str, torch.Tensor]] | None = None

    def recipe(self) -> dict[str, Any]:
        return {
            "revision": _REVISION,
            "packages": [package_version(name) for name in ("mlxtend", "pillow")],
            "sizes": self.sizes,
            "head": "centred at each model's mean",
            "shape": asdict(self.shape),
            "pre-training": self.pre_training.recipe(),
        }

    def settings(self) -> dict[str, Any]:
        return {
            **self.recipe(),
            "training": self.training.recipe(),
            "adaptation": asdict(self.adaptation),
        }

    def load(self) -> nn.Module:
        model = Upper(self.shape)
        model.load_state_dict(self._pre_trained()["upper"])
        return model.eval()

    def head_of(self, task: int, state: State) -> CosineHead:
        """Return the head centred at the model's mean feature of the validation inputs.

        No label takes part. A merge moves all features of a task together, by as much as they
        differ, which would hide all else that it does to them.
        """
        return self.heads[task].at(
            self.features(state, self.splits[task].validation[0]).mean(dim=0)
        )

    def read(self) -> list[Split]:
        return [self._read(name) for name in self.tasks]

    def _pre_trained(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        if self._weights is None:
            of_tasks = ("sizes", "head")
            recipe = {key: value for key, value in self.recipe().items() if key not in of_tasks}
            target = self.cache.path("base", recipe)
            if not target.is_dir():
                # beside the folder, and not inside, as that is removed when a run is stopped
                unfinished = target.with_name(f"{target.name}.unfinished.pt")
                lower, upper = vit_training.pre_train(
                    self._pictures(), self.shape, self.pre_training, unfinished, self.log
                )

                def write(folder: Path) -> None:
                    save_file(lower, folder / "lower.safetensors")
                    save_file(upper, folder / "upper.safetensors")

                self.cache.build(target, write)
                unfinished.unlink(missing_ok=True)
            self._weights = {
                half: load_file(target / f"{half}.safetensors") for half in ("lower", "upper")
            }
        return self._weights

    def _pictures(self) -> Pictures:
        recipe = {"revision": _REVISION, "pillow": package_version("pillow")}
        target = self.cache.path("pictures", recipe)
        if not target.is_dir():
            folders = self._folders(vit_pictures.DEBIAN)
            self.log.say("draw the pictures for the pre-training ...")

            def write(folder: Path) -> None:
                found = vit_pictures.pictures(folders)
                save_file(asdict(found), folder / "pictures.safetensors")

            self.cache.build(target, write)
        return Pictures(**load_file(target / "pictures.safetensors"))

    def _folders(self, packages: Sequence[str]) -> dict[str, Path]:
        return {package: unpacked(package, self.cache, self.log) for package in packages}

    def _read(self, name: str) -> Split:
        target = self.cache.path(f"tokens-{name}", {"suite": self.recipe(), "task": name})
        if not target.is_dir():
            self.cache.build(target, lambda folder: self._encode(name, folder))
        kept = load_file(target / "tokens.safetensors")
        parts = {
            part: (Tokens(kept[f"{part}.tokens"]), kept[f"{part}.labels"]) for part in self.sizes
        }
        classes = 1 + max(int(labels.max()) for _, labels in parts.values())
        return Split(classes, **parts)

    def _encode(self, name: str, folder: Path) -> None:
        found = TASKS[name][1](self._folders(vit_tasks.DEBIAN))
        sizes = {
            part: min(size, _FEWER.get(name, self.sizes)[part]) for part, size in self.sizes.items()
        }
        drawn = image_tasks.split_by_group(found, sizes, 0)
        kept: dict[str, torch.Tensor] = {}
        total = sum(-(-len(labels) // _BATCH) for _, labels in drawn.values())
        with self.log.steps(f"lower part on {name}", total) as advance:
            for part, (images, labels) in drawn.items():
                kept[f"{part}.tokens"] = self._tokens(images, advance)
                kept[f"{part}.labels"] = labels
        # a head needs an example of each class
        if drawn["train"][1].unique().numel() != int(found.labels.max()) + 1:
            raise SystemExit(f"task {name}: a class has no image for training")
        save_file(kept, folder / "tokens.safetensors")

    @torch.inference_mode()
    def _tokens(self, images: torch.Tensor, advance: Advance) -> torch.Tensor:
        """Return what the lower part makes of images: [n, tokens, width], bfloat16."""
        lower = Lower(self.shape).eval()
        lower.load_state_dict(self._pre_trained()["lower"])
        found = []
        for batch in images.split(_BATCH):
            pixels = vit_tasks.resized(batch, self.shape.image).float() / 127.5 - 1.0
            pixels = pixels if pixels.dim() == 4 else pixels[:, None].expand(-1, 3, -1, -1)
            found.append(lower(pixels).to(torch.bfloat16))
            advance()
        return torch.cat(found)
