"""Folds an adapter into its base: a checkpoint, written as it is read."""

from __future__ import annotations

import os
from typing import Any

from pymerge.config import ModelEntry
from pymerge.config.reader import plain_config
from pymerge.merging.files import merge_checkpoints
from pymerge.merging.report import MergeReport
from pymerge.methods.directions.record import PASSTHROUGH

__all__ = ["fold"]


def fold(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    **options: Any,
) -> MergeReport:
    """Write the model made of a base and an adapter, like the result of PEFT's merge_and_unload.

    W + scaling * (B A) for LoRA (Hu et al. 2021, section 4.1), W * l for IA3 (Liu et al. 2022,
    equation 3): computed in float32, the products of an element added up in the order of the rank,
    and rounded once to the dtype of the base. Streamed: memory holds a weight or two, never a
    model. It is `merge_checkpoints` with the method `passthrough` and the model `base+adapter`.

    Args:
        base: a checkpoint, as for `merge_checkpoints`.
        adapter: a PEFT directory: LoRA (also rsLoRA), or IA3.
        out: directory to write; must not exist unless `force`.
        dtype: of the output, e.g. "float32"; default that of each tensor of the base. A wider one
            does not recover what rounding to the base's dtype lost.
        options: those of `merge_checkpoints`: memory, threads, shard_size, force, quiet, ...

    Raises:
        RequestError: the adapter is damaged, not supported, or belongs to another base; lists every
            problem.
        MergeError: the output could not be written.

    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import load_file, save_file
    >>> from pymerge.checkpoint.peft.build import lora
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": np.ones((2, 2), np.float32)}, f"{folder}/base.safetensors")
    ...     lora({"fc": (np.ones((2, 1)), np.array([[1.0, 2.0]]))}).save(f"{folder}/lora")
    ...     report = fold(f"{folder}/base.safetensors", f"{folder}/lora", f"{folder}/out")
    ...     load_file(f"{folder}/out/model.safetensors")["fc.weight"]
    array([[2., 3.],
           [2., 3.]], dtype=float32)
    """
    model = ModelEntry(os.fspath(base), {}, "fold", "models[0]", os.fspath(adapter))
    config: Any = plain_config(PASSTHROUGH, [model], dtype, where="fold")
    return merge_checkpoints(config, out, **options)
