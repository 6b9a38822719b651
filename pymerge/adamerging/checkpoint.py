"""Keeps the state of a fit in one safetensors file, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
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

__all__ = ["fit_settings", "load_state", "save_state"]

Tensor = torch.Tensor

_FORMAT = "pymerge.adamerging.fit/2"
# Of each tensor, so many blocks of so many elements tell whether a checkpoint is the same.
_BLOCKS = 4
_BLOCK = 256
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
# How messages call settings that are not arguments.
_MEANING = {"contents": "base and models with the contents"}


def fit_settings(ada: AdaMerging, how: Fitting) -> dict[str, Any]:
    """Return what must be the same for a run to go on, as JSON has it.

    Some of every tensor is read: once a run is enough.
    """
    settings = {
        "preset": ada.preset_name,
        "clamp": ada.clamp,
        "trimmed": ada.trimmed,
        "density": ada.density if ada.trimmed else None,
        "models": list(ada.names),
        "groups": list(ada.grouping.names),
        "contents": _contents(ada),
        "init": _init(ada.init),
        "lr": how.lr,
        "batches_per_task": how.batches,
        "weights": list(how.weights),
        "entropy": how.entropy,
        "tokens": how.tokens,
        "seed": how.seed,
    }
    return json.loads(json.dumps(settings))


def _contents(ada: AdaMerging) -> str:
    """Return what tells other checkpoints of the same names: a digest of some of each tensor."""
    digest = hashlib.sha256()
    for label, name, tensor in ada.stored_tensors():
        digest.update(f"{label} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        for part in range(_BLOCKS):
            start = part * flat.numel() // _BLOCKS
            some = flat[start : start + _BLOCK].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _init(table: Tensor) -> float | str:
    """Return the one coefficient that a fit begins with, or a digest of its table."""
    values = table.unique()
    if len(values) == 1:
        return float(values)
    digest = hashlib.sha256(table.contiguous().view(torch.uint8).numpy().tobytes())
    return f"a table, sha256:{digest.hexdigest()[:16]}"


def save_state(
    path: Path,
    ada: AdaMerging,
    optimizer: torch.optim.Optimizer | None,
    settings: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Write coefficients, the state of Adam and the history; the file is replaced as a whole."""
    tensors = {"coefficients": ada.raw_coefficients.detach().cpu().contiguous()}
    if optimizer is not None:
        for name, value in optimizer.state[ada.raw_coefficients].items():
            tensors[f"adam.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(settings),
        "history": json.dumps(history),
    }
    replace_file(path, to_bytes(tensors, metadata), "checkpoint: ")


def load_state(
    path: Path, ada: AdaMerging, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
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
        raise RequestError(
            f"checkpoint: {path}: expected the state of a fit, got another file (or one of another "
            "version; resume=False replaces it)"
        )
    try:
        saved, history = json.loads(metadata["settings"]), json.loads(metadata["history"])
        if not isinstance(saved, dict) or not isinstance(history, list):
            raise ValueError("settings or history are of another kind")
    except (KeyError, ValueError) as error:
        raise RequestError(f"checkpoint: {path}: cannot be read: {error}") from None
    for name, value in settings.items():
        if saved.get(name) != value:
            raise RequestError(
                f"checkpoint: {path}: was made with {_MEANING.get(name, name)} "
                f"{_short(saved.get(name))}, now it is {_short(value)}; give the same, another "
                "file, or resume=False"
            )
    table = ada.raw_coefficients
    for name, tensor in tensors.items():
        if name != "adam.step" and tensor.shape != table.shape:
            raise RequestError(
                f"checkpoint: {path}: cannot be read: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(table.shape)}"
            )
    state = {
        name.removeprefix("adam."): tensor
        for name, tensor in tensors.items()
        if name.startswith("adam.")
    }
    if state and set(state) != _ADAM:
        raise RequestError(
            f"checkpoint: {path}: cannot be read: expected the state of Adam, "
            f"{', '.join(sorted(_ADAM))}; got {', '.join(sorted(state))}"
        )
    with torch.no_grad():
        table.copy_(tensors["coefficients"])
    if state:
        device = ada.raw_coefficients.device
        optimizer.state[ada.raw_coefficients] = {
            name: tensor if name == "step" else tensor.to(device) for name, tensor in state.items()
        }
    return history


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
