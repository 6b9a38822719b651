"""What the Vision Transformer is pre-trained on: clip art, letters in many typefaces, and glyphs.

Nothing of it is in one of the tasks: letters and typefaces are others (`typefaces` says which), and
so are the writing systems of the glyphs.
"""

from __future__ import annotations

import random
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality.image_tasks import SCRIPTS

__all__ = ["DEBIAN", "SIDE", "Pictures", "clip_art", "drawn", "pictures", "typefaces"]

SIDE = 64
DEBIAN = ("openclipart-png", "fonts-aenigma", "fonts-noto-core")
# letters A to J are a task; what is below is learned in typefaces of its own
_LETTERS = "KLMNOPQRSTUVWXYZ0123456789"
_SHARES = {"pre-training": 0.45, "letters": 0.4, "typefaces": 0.15}
_PER_CATEGORY = 150
_FEWEST = 12
_MOST_PIXELS = 3_000_000
_PER_SCRIPT = 6
_LEAST_INK = 60
_SEED = 0

Folders = Mapping[str, Path]


@dataclass(frozen=True)
class Pictures:
    """Images [n, 4, SIDE, SIDE], uint8, red, green, blue, alpha; the class and the source of each.

    The classes are numbered through all sources.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sources: torch.Tensor


def typefaces(folders: Folders) -> dict[str, list[Path]]:
    """Return which fonts of fonts-aenigma are for what; names that begin alike stay together."""
    families: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((folders["fonts-aenigma"] / "usr/share/fonts").rglob("*.ttf")):
        families[path.name[:5].lower()].append(path)
    names = sorted(families)
    random.Random(_SEED).shuffle(names)
    found: dict[str, list[Path]] = {}
    start = 0.0
    for purpose, share in _SHARES.items():
        end = start + share
        chosen = names[round(start * len(names)) : round(end * len(names))]
        found[purpose] = [path for name in chosen for path in families[name]]
        start = end
    return found


def drawn(path: Path, text: str, height: int = 46) -> np.ndarray | None:
    """Return a text in a typeface in the middle of [SIDE, SIDE], or None where it has no ink.

    Args:
        path: of the font.
        text: a character.
        height: or width, the larger of them, in pixels.
    """
    # the other engine is not everywhere, and knows no way with some of the scripts
    font = ImageFont.truetype(path, 72, layout_engine=ImageFont.Layout.BASIC)
    large = Image.new("L", (288, 288), 0)
    ImageDraw.Draw(large).text((96, 96), text, 255, font)
    box = large.getbbox()
    if box is None or (box[2] - box[0]) * (box[3] - box[1]) < _LEAST_INK:
        return None
    ink = large.crop(box)
    scale = height / max(ink.size)
    small = ink.resize(
        (max(1, round(ink.width * scale)), max(1, round(ink.height * scale))),
        Image.Resampling.BILINEAR,
    )
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return np.array(image)


def pictures(folders: Folders) -> Pictures:
    """Return all of it, in the order of the files' names."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    sources: list[int] = []
    for source, groups in enumerate((clip_art(folders), _letters(folders), _glyphs(folders))):
        for group in groups:
            number = labels[-1] + 1 if labels else 0
            images += group
            labels += [number] * len(group)
            sources += [source] * len(group)
    stacked = torch.from_numpy(np.stack(images))
    return Pictures(stacked, torch.tensor(labels), torch.tensor(sources))


def clip_art(folders: Folders) -> Iterator[Sequence[np.ndarray]]:
    """Return the pictures of each category of openclipart-png."""
    top = folders["openclipart-png"] / "usr/share/openclipart/png"
    categories: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(top.rglob("*.png")):
        if path.is_symlink():  # the same picture under another name
            continue
        categories["/".join(path.relative_to(top).parts[:-1][:2])].append(path)
    for name, paths in sorted(categories.items()):
        if len(paths) < _FEWEST or name == "unsorted":
            continue
        random.Random(f"{_SEED} {name}").shuffle(paths)
        found = (thumbnail(path) for path in paths[:_PER_CATEGORY])
        yield [one for one in found if one is not None]


def thumbnail(path: Path) -> np.ndarray | None:
    """Return a picture as [4, SIDE, SIDE], as large as it fits, or None: a poster takes seconds."""
    with path.open("rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    if width * height > _MOST_PIXELS:
        return None
    with Image.open(path) as opened:
        small = opened.convert("RGBA")
        small.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    full = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    full.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return np.array(full).transpose(2, 0, 1)


def _letters(folders: Folders) -> Iterator[Sequence[np.ndarray]]:
    fonts = typefaces(folders)["pre-training"]
    for letter in _LETTERS:
        texts = [drawn(path, letter) for path in fonts]
        texts += [drawn(path, letter.lower()) for path in fonts] if letter.isalpha() else []
        yield [_white(one) for one in texts if one is not None]


def _glyphs(folders: Folders) -> Iterator[Sequence[np.ndarray]]:
    """Each glyph is a class of its own, in the regular and, where there are any, other styles."""
    folder = folders["fonts-noto-core"] / "usr/share/fonts/truetype/noto"
    others = {font.removeprefix("NotoSans") for font, _, _ in SCRIPTS.values()}
    for path in sorted(folder.glob("Noto*-Regular.ttf")):
        family = path.name.removesuffix("-Regular.ttf")
        script = family.removeprefix("NotoSans")
        if not family.startswith("NotoSans") or any(
            other and script.startswith(other) for other in others
        ):
            continue
        # its own letters lie past Latin, Greek and Cyrillic, of which Latin is in most fonts
        known = sorted(code for code in TTFont(path).getBestCmap() or {} if code > 0x530)
        random.Random(f"{_SEED} {family}").shuffle(known)
        styles = [path, *_styles(folder, script)]
        count = 0
        for code in known:
            found = [drawn(style, chr(code)) for style in styles]
            inked = [_white(one) for one in found if one is not None]
            if inked:
                yield inked
                count += 1
            if count == _PER_SCRIPT:
                break


def _styles(folder: Path, script: str) -> list[Path]:
    names = (f"NotoSans{script}-Bold", f"NotoSerif{script}-Regular", f"NotoSerif{script}-Bold")
    return [path for name in names if (path := folder / f"{name}.ttf").exists()]


def _white(ink: np.ndarray) -> np.ndarray:
    return np.stack([np.full_like(ink, 255)] * 3 + [ink])
