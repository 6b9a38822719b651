"""Merge configurations in mergekit's YAML language."""

from __future__ import annotations

from pymerge.config.reader import load_config
from pymerge.config.records import MergeConfig, ModelEntry, TensorParameters
from pymerge.config.settings import Clause, Gradient, Setting, layer_depths

__all__ = [
    "Clause",
    "Gradient",
    "MergeConfig",
    "ModelEntry",
    "Setting",
    "TensorParameters",
    "layer_depths",
    "load_config",
]
