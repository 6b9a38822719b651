"""Adapters built from arrays: the results of computations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pymerge.checkpoint.peft.adapter import Adapter, Kind, Module, Saved
from pymerge.errors import RequestError
from pymerge.ops.array import Array

__all__ = ["ia3", "like", "lora", "stored_shape"]

Factors = tuple[np.ndarray, np.ndarray]

# The parts of a config that describe an adapter's training and not what it computes.
_KEPT = ("base_model_name_or_path", "task_type", "fan_in_fan_out")


def lora(
    factors: Mapping[str, Factors],
    *,
    patterns: Mapping[str, Module] | None = None,
    config: Mapping[str, Any] | None = None,
    saved: Mapping[str, tuple[Array, tuple[int, ...]]] | None = None,
    label: str = "adapter",
    target_modules: Sequence[str] | str | None = None,
    captured: Mapping[str, float] | None = None,
) -> Adapter:
    """Return a LoRA adapter whose delta is B A, with a scaling of 1.

    Args:
        factors: (B, A) by module: [out, r] and [r, in], any real dtype; kept as float32.
        patterns: modules of the same kind, shape and orientation; default linear ones.
        config: of an adapter whose base model and task are adopted.
        saved: whole tensors by the base's names, with their shapes.
        target_modules: for the config; default the names of all modules.
        captured: see `Adapter.captured`.
    """
    kept: dict[str, Array] = {}
    modules: dict[str, Module] = {}
    for name, (b, a) in factors.items():
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or a.shape[0] == 0:
            raise RequestError(
                f"lora: '{name}': expected B [out, r] and A [r, in], got {b.shape} and {a.shape}"
            )
        pattern = (patterns or {}).get(name)
        kind: Kind = "linear" if pattern is None else pattern.kind
        shape = (b.shape[0], a.shape[1]) if pattern is None else pattern.shape
        transposed = pattern is not None and pattern.transposed
        keys = (f"{name}.A", f"{name}.B")
        for key, values in zip(keys, (a, b), strict=True):
            kept[key] = Array.of(np.array(values, np.float32, order="C"), "F32")
        modules[name] = Module(name, kind, shape, a.shape[0], 1.0, transposed, keys=keys)
    made = {key: value for key, value in (config or {}).items() if key in _KEPT}
    transposed = {module.transposed for module in modules.values() if module.kind == "linear"}
    made["fan_in_fan_out"] = True in transposed
    made["peft_type"] = "LORA"
    made["target_modules"] = sorted(modules) if target_modules is None else target_modules
    adapter = like(made, modules, kept, saved, label)
    adapter.captured = dict(captured or {})
    return adapter


def ia3(vectors: Mapping[str, np.ndarray], like_this: Adapter, label: str = "adapter") -> Adapter:
    """Return an IA3 adapter with other vectors."""
    modules, kept = {}, {}
    for name, vector in vectors.items():
        modules[name] = replace(like_this.modules[name], keys=(name,))
        kept[name] = Array.of(np.array(vector, np.float32, order="C"), "F32")
    return like(like_this.config, modules, kept, None, label)


def like(
    config: Mapping[str, Any],
    modules: Mapping[str, Module],
    kept: Mapping[str, Array],
    saved: Mapping[str, tuple[Array, tuple[int, ...]]] | None = None,
    label: str = "adapter",
) -> Adapter:
    """Return an adapter of arrays that are in memory."""
    arrays = dict(kept)
    records: dict[str, Saved] = {}
    for name, (array, shape) in (saved or {}).items():
        arrays[f"saved.{name}"] = array
        records[name] = Saved(f"saved.{name}", array.code, shape)
    peft_type = "IA3" if config.get("peft_type") == "IA3" else "LORA"
    return Adapter(peft_type, config, modules, arrays.__getitem__, saved=records, label=label)


def stored_shape(module: Module, factor: str) -> tuple[int, ...]:
    """Return the shape in which PEFT's files store a factor, "A" or "B"."""
    rows, columns = module.features
    if module.kind == "conv":
        ones = (1,) * (len(module.shape) - 2)
        return (module.rank, *module.shape[1:]) if factor == "A" else (rows, module.rank, *ones)
    return (module.rank, columns) if factor == "A" else (rows, module.rank)
