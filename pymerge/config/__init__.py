"""Merge configurations in mergekit's YAML language."""

from __future__ import annotations

from pymerge.config.reader import load_config
from pymerge.config.records import MergeConfig, ModelEntry, TensorParameters
from pymerge.config.settings import Clause, Setting

__all__ = ["Clause", "MergeConfig", "ModelEntry", "Setting", "TensorParameters", "load_config"]
