"""Keeps the state of a fit in one safetensors file, so that it can go on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from pymerge.errors import RequestError
from pymerge.output.replace import replace_file

if TYPE_CHECKING:
    from pymerge.adamerging.fitting import Fitting
    from pymerge.adamerging.module import AdaMerging

__all__ = ["load_state", "save_state"]

_FORMAT = "pymerge.adamerging.fit/1"


def _settings(ada: AdaMerging, how: Fitting) -> dict[str, Any]:
    """Return what must be the same for a run to go on."""
    return {
        "preset": ada.preset_name,
        "clamp": ada.clamp,
        "trimmed": ada.trimmed,
        "density": ada.density if ada.trimmed else None,
        "models": list(ada.names),
        "groups": list(ada.grouping.names),
        "lr": how.lr,
        "batches_per_task": how.batches,
        "weights": list(how.weights),
        "entropy": how.entropy,
        "tokens": how.tokens,
        "seed": how.seed,
    }


def save_state(
    path: Path,
    ada: AdaMerging,
    optimizer: torch.optim.Optimizer | None,
    how: Fitting,
    history: list[dict[str, Any]],
) -> None:
    """Write coefficients, the state of Adam and the history; the file is replaced as a whole."""
    tensors = {"coefficients": ada.raw_coefficients.detach().cpu().contiguous()}
    if optimizer is not None:
        for name, value in optimizer.state[ada.raw_coefficients].items():
            tensors[f"adam.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(_settings(ada, how)),
        "history": json.dumps(history),
    }
    replace_file(path, to_bytes(tensors, metadata), "checkpoint: ")


def load_state(
    path: Path, ada: AdaMerging, optimizer: torch.optim.Optimizer, how: Fitting
) -> list[dict[str, Any]]:
    """Take the state of a run from a file; return its history.

    Raises:
        RequestError: it is not such a file, or of a run with other settings.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RequestError(f"checkpoint: {path}: cannot be read: {error}") from None
    if metadata.get("format") != _FORMAT or "coefficients" not in tensors:
        raise RequestError(f"checkpoint: {path}: expected the state of a fit, got another file")
    try:
        saved, history = json.loads(metadata["settings"]), json.loads(metadata["history"])
    except (KeyError, ValueError) as error:
        raise RequestError(f"checkpoint: {path}: cannot be read: {error}") from None
    own = _settings(ada, how)
    own = json.loads(json.dumps(own))
    for name, value in own.items():
        if saved.get(name) != value:
            raise RequestError(
                f"checkpoint: {path}: was made with {name} {_short(saved.get(name))}, now it is "
                f"{_short(value)}; give the same, another file, or resume=False"
            )
    with torch.no_grad():
        ada.raw_coefficients.copy_(tensors["coefficients"])
    state = {
        name.removeprefix("adam."): tensor
        for name, tensor in tensors.items()
        if name.startswith("adam.")
    }
    if state:
        device = ada.raw_coefficients.device
        optimizer.state[ada.raw_coefficients] = {
            name: tensor if name == "step" else tensor.to(device) for name, tensor in state.items()
        }
    return history


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
