"""The tasks of the vit suite: the vision suite's four, letters, typefaces, game units, emoji."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality import image_tasks, vit_pictures
from benchmarks.quality.image_tasks import ImageSet
from benchmarks.quality.vit_pictures import SIDE

__all__ = ["DEBIAN", "TASKS", "resized", "units"]

DEBIAN = (
    *image_tasks.DEBIAN,
    "fonts-aenigma",
    "fonts-noto-color-emoji",
    "unicode-data",
    "wesnoth-1.16-data",
)
_SEED = 0
_TYPEFACES = 20
_GROUND = 96
_LETTERS = "ABCDEFGHIJ"
_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_FEWEST_ANIMATIONS = 10
_FEWEST_FRAMES = 20

Folders = Mapping[str, Path]


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return images [n, h, w] or [n, 3, h, w] with sides of `size`, uint8."""
    if images.shape[-1] == size:
        return images
    four = images if images.dim() == 4 else images[:, None]
    small = F.interpolate(four.float(), size=(size, size), mode="bilinear", antialias=True)
    small = small.round().clamp(0, 255).to(torch.uint8)
    return small if images.dim() == 4 else small[:, 0]


def _letters(folders: Folders) -> ImageSet:
    return _characters(folders, _LETTERS)


def _numerals(folders: Folders) -> ImageSet:
    return _characters(folders, "0123456789")


def _characters(folders: Folders, characters: str) -> ImageSet:
    """Characters in the typefaces that the pre-training has not seen, letters in both cases."""
    chosen = random.Random(_SEED)
    images, labels, groups = [], [], []
    for path in vit_pictures.typefaces(folders)["letters"]:
        for label, letter in enumerate(characters):
            # digits have one form, and are drawn twice
            for text in (letter, letter.lower()):
                ink = vit_pictures.drawn(path, text)
                if ink is not None:
                    images.append(_moved(ink, chosen))
                    labels.append(label)
                    groups.append(path.name[:5].lower())
    return _set(images, labels, groups)


def _digits(folders: Folders) -> ImageSet:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.from_numpy(found.images * (255.0 / 16.0)).round().to(torch.uint8)
    labels = torch.from_numpy(found.target.astype(np.int64))
    return ImageSet(resized(images, SIDE), labels, tuple(map(str, range(len(labels)))))


def _typefaces(folders: Folders) -> ImageSet:
    """Which typeface a character is in. The same character, small or large, is one group."""
    chosen = random.Random(_SEED)
    images, labels, groups = [], [], []
    families: dict[str, Path] = {}
    for path in vit_pictures.typefaces(folders)["typefaces"]:
        if all(vit_pictures.drawn(path, one) is not None for one in _CHARACTERS):
            families.setdefault(path.name[:5].lower(), path)
    for label, (_, path) in enumerate(sorted(families.items())[:_TYPEFACES]):
        for character in _CHARACTERS:
            ink = vit_pictures.drawn(path, character)
            assert ink is not None
            for _ in range(3):
                images.append(_moved(ink, chosen))
                labels.append(label)
                groups.append(character.lower())
    return _set(images, labels, groups)


def units(folders: Folders) -> ImageSet:
    """Which unit of a game a frame shows. The frames of one animation are one group."""
    top = next((folders["wesnoth-1.16-data"] / "usr/share/games/wesnoth").iterdir())
    frames: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    folder = top / "data/core/images/units"
    for path in sorted(folder.rglob("*.png")):
        name = str(path.relative_to(folder).with_suffix(""))
        unit = re.sub(r"-[^/]*$", "", name)
        unit = "/".join(unit.split("/")[::2]) if unit.count("/") == 2 else unit
        frames[unit].append((re.sub(r"-?\d+$", "", name), path))
    chosen = random.Random(_SEED)
    images, labels, groups = [], [], []
    label = 0
    for _, found in sorted(frames.items()):
        animations = {animation for animation, _ in found}
        if len(animations) < _FEWEST_ANIMATIONS or len(found) < _FEWEST_FRAMES:
            continue
        for animation, path in found:
            with Image.open(path) as opened:
                images.append(_placed(opened.convert("RGBA"), chosen))
            labels.append(label)
            groups.append(animation)
        label += 1
    return _set(images, labels, groups)


def _emoji(folders: Folders) -> ImageSet:
    """Which group of Unicode's an emoji is in. Those of the same thing are one group."""
    font = next((folders["fonts-noto-color-emoji"] / "usr/share/fonts").rglob("*.ttf"))
    face = ImageFont.truetype(font, 109, layout_engine=ImageFont.Layout.BASIC)
    listed = folders["unicode-data"] / "usr/share/unicode/emoji/emoji-test.txt"
    chosen = random.Random(_SEED)
    images, labels, groups = [], [], []
    names: list[str] = []
    group = ""
    for line in listed.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        found = re.match(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.*)", line)
        if found is None or group in ("Component", "Flags"):
            continue
        codes = [int(code, 16) for code in found[1].split() if code != "FE0F"]
        if len(codes) != 1:  # others are drawn by joining glyphs, which not every Pillow can do
            continue
        if group not in names:
            names.append(group)
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), chr(codes[0]), font=face, embedded_color=True)
        if image.getbbox() is None:
            continue
        for _ in range(2):
            images.append(_placed(image, chosen))
            labels.append(names.index(group))
            groups.append(found[2])
    return _set(images, labels, groups)


def _set(images: list[torch.Tensor], labels: list[int], groups: list[str]) -> ImageSet:
    return ImageSet(torch.stack(images), torch.tensor(labels), tuple(groups))


def _moved(ink: np.ndarray, chosen: random.Random) -> torch.Tensor:
    """Return grey ink turned, shrunk and moved a bit: [SIDE, SIDE]."""
    image = Image.fromarray(ink).rotate(chosen.uniform(-15, 15), Image.Resampling.BILINEAR)
    side = round(SIDE * chosen.uniform(0.7, 1.0))
    full = Image.new("L", (SIDE, SIDE), 0)
    small = image.resize((side, side), Image.Resampling.BILINEAR)
    full.paste(small, (chosen.randint(0, SIDE - side), chosen.randint(0, SIDE - side)))
    return torch.from_numpy(np.array(full))


def _placed(image: Image.Image, chosen: random.Random) -> torch.Tensor:
    """Return a picture on grey, sized and moved a bit: [3, SIDE, SIDE]."""
    box = image.getbbox()
    image = image.crop(box) if box is not None else image
    scale = SIDE * chosen.uniform(0.75, 1.0) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BILINEAR)
    full = Image.new("RGB", (SIDE, SIDE), (_GROUND,) * 3)
    place = (chosen.randint(0, SIDE - size[0]), chosen.randint(0, SIDE - size[1]))
    full.paste(small, place, small)
    return torch.from_numpy(np.array(full)).permute(2, 0, 1).contiguous()


_FOUR = {name: (about, make) for name, (about, _, make) in image_tasks.TASKS.items()}
TASKS: dict[str, tuple[str, Callable[[Folders], ImageSet]]] = {
    "mnist": _FOUR["mnist"],
    "digits": ("handwritten digits of 8 x 8 pixels (scikit-learn)", _digits),
    "fashion": _FOUR["fashion"],
    "speech": _FOUR["speech"],
    "letters": ("letters A to J; split by typeface", _letters),
    "numerals": ("printed digits; split by typeface", _numerals),
    "typefaces": ("20 typefaces; split by character", _typefaces),
    "emoji": ("8 groups of emoji; split by emoji", _emoji),
}
# Tried, and left out: fine-tunes for them learn little that holds for what they have not seen, and
# disturb all other tasks when merged.
LEFT_OUT: dict[str, tuple[str, Callable[[Folders], ImageSet]]] = {
    "scripts": _FOUR["scripts"],
    "units": ("units of a game (Battle for Wesnoth); split by animation", units),
}
