"""Damaged test images: seven corruptions of Hendrycks and Dietterich (2019), five severities.

They are made by the package that robustness benchmarks use. It imports a module of old setuptools
only for pictures of frost, which are not needed here.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupted"]

CORRUPTIONS: tuple[str, ...] = (
    "motion_blur",
    "impulse_noise",
    "gaussian_noise",
    "pixelate",
    "spatter",
    "contrast",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
_IMPULSES = (0.03, 0.06, 0.09, 0.17, 0.27)


def corrupted(images: torch.Tensor, names: Sequence[str], severity: int) -> list[torch.Tensor]:
    """Return grey images [n, size, size] damaged in each way: [n, 3, size, size], uint8.

    The same images and severity give the same result, because they determine the seed.
    """
    damage = _package().corrupt
    grey = images.numpy()
    found = []
    for name in names:
        if name == "impulse_noise":
            found.append(_impulses(images, severity))
            continue
        random.seed(f"{name} {severity}")
        # the package draws from numpy's global generator
        np.random.seed(100 * CORRUPTIONS.index(name) + severity)  # noqa: NPY002
        rows = [
            damage(np.repeat(image[..., None], 3, axis=2), severity=severity, corruption_name=name)
            for image in grey
        ]
        found.append(torch.from_numpy(np.stack(rows).astype(np.uint8)).permute(0, 3, 1, 2))
    return found


def _impulses(images: torch.Tensor, severity: int) -> torch.Tensor:
    """Set a share of the values to 0 or 255; the package's version cannot be seeded."""
    generator = torch.Generator().manual_seed(severity)
    coloured = images[:, None].repeat(1, 3, 1, 1)
    drawn = torch.rand(coloured.shape, generator=generator)
    share = _IMPULSES[severity - 1]
    coloured[drawn < share] = 0
    coloured[drawn < share / 2] = 255
    return coloured


def _package() -> Any:
    if "pkg_resources" not in sys.modules:
        stand_in: Any = types.ModuleType("pkg_resources")
        stand_in.resource_filename = lambda package, name: name
        sys.modules["pkg_resources"] = stand_in
        added = True
    else:
        added = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a namespace of scipy
            return importlib.import_module("imagecorruptions")
    except ImportError as error:
        raise SystemExit(
            f"damaged images need imagecorruptions ({error}): pip install --no-deps"
            " imagecorruptions==1.1.2, and opencv-python-headless, scikit-image, scipy"
        ) from None
    finally:
        if added:
            del sys.modules["pkg_resources"]
