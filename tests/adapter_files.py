"""Adapters in PEFT's format, written by safetensors and not by pymerge, and their deltas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
State = dict[str, torch.Tensor]


def factors(
    shapes: Mapping[str, tuple[int, int]], rank: int | Mapping[str, int] = 4, seed: int = 0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random (B, A) for modules of [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (rows, columns) in shapes.items():
        r = rank if isinstance(rank, int) else rank[name]
        b = 0.1 * torch.randn(rows, r, generator=generator)
        made[name] = b, 0.1 * torch.randn(r, columns, generator=generator)
    return made


def lora_tensors(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> State:
    """Return (B, A) under PEFT's names."""
    tensors: State = {}
    for name, (b, a) in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    return tensors


def save_adapter(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, pickled: bool = False, **config: Any
) -> Path:
    """Write an adapter; `config` updates that of a LoRA of rank 4 and alpha 8."""
    directory.mkdir(parents=True)
    whole: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": None,
        **config,
    }
    whole = {key: value for key, value in whole.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
    if pickled:
        torch.save(dict(tensors), directory / "adapter_model.bin")
    else:
        save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory


def save_lora(
    directory: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], **config: Any
) -> Path:
    return save_adapter(directory, lora_tensors(pairs), **config)


def delta(b: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return scaling * (b a) in float32, with the products added in the order of the rank."""
    total = torch.zeros(b.shape[0], a.shape[1])
    for j in range(b.shape[1]):
        total = total + b[:, j : j + 1].float() * a[j : j + 1].float()
    return total * torch.tensor(scaling, dtype=torch.float32)


def exact(b: torch.Tensor, a: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the same in float64, by a product."""
    return scaling * (b.double() @ a.double())


def projections(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return the modules of a Llama that LoRAs usually change, with the shapes of their weights."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in state.items()
        if "proj" in name
    }
