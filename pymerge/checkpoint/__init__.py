"""Local checkpoints: strict headers, model directories, zero-copy tensors over memory maps."""

from __future__ import annotations

from pymerge.checkpoint.header import TensorInfo
from pymerge.checkpoint.open import Checkpoint, open_checkpoint
from pymerge.dtypes import DTYPES, dtype_code, torch_dtype

__all__ = [
    "DTYPES",
    "Checkpoint",
    "TensorInfo",
    "dtype_code",
    "open_checkpoint",
    "torch_dtype",
]
