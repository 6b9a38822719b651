"""Saves the state of a fit in one safetensors file, so that an interrupted fit can be resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes

from pymerge.checkpoint.open import open_file
from pymerge.dtypes import is_float
from pymerge.errors import RequestError
from pymerge.output.replace import replace_file
from pymerge.strict_json import decode, load_json

if TYPE_CHECKING:
    from pymerge.adamerging.fitting import Fitting
    from pymerge.adamerging.module import AdaMerging

__all__ = ["fit_settings", "load_state", "save_state"]

Tensor = torch.Tensor

_FORMAT = "pymerge.adamerging.fit/2"
# The fingerprint of a checkpoint hashes this many blocks of this many elements of each tensor.
_BLOCKS = 4
_BLOCK = 256
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
# The wording in messages of settings that are not arguments.
_MEANING = {"contents": "base and models with the contents"}


@dataclass
class _Row:
    """One step of a history; see `FitResult`."""

    step: int
    entropy: float
    tasks: list[float]
    seconds: float


@dataclass
class _Metadata:
    """The metadata of a state file."""

    settings: dict[str, Any]
    history: list[_Row]


def fit_settings(ada: AdaMerging, how: Fitting) -> dict[str, Any]:
    """Return the settings that must match for a run to be resumed, as JSON values.

    This reads a sample of every tensor, so call it once per run.
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
    """Return a fingerprint that distinguishes checkpoints with the same tensor names.

    It hashes a sample of each tensor.
    """
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
    """Return the initial coefficient if all are equal, otherwise a digest of the table."""
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
    """Write the coefficients, Adam's state and the history; the file is replaced atomically."""
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
    """Restore the state of a run from a file; return its history.

    Raises:
        RequestError: the file is not a state file, or belongs to a run with other settings.
    """
    where, table = f"checkpoint: {path}", ada.raw_coefficients
    with open_file(path, where) as file:
        metadata = file.metadata
        tensors = {
            name: file.flat(name).reshape(info.shape).clone() for name, info in file.tensors.items()
        }
    if metadata.get("format") != _FORMAT or "coefficients" not in tensors:
        raise RequestError(
            f"{where}: expected the state of a fit, got another file (or one of another "
            "version; resume=False replaces it)"
        )
    values = {
        key: load_json(metadata[key], f"{where}: metadata {key!r}")
        for key in ("settings", "history")
        if key in metadata
    }
    read: _Metadata = decode(_Metadata, values, f"{where}: metadata")
    for name, value in settings.items():
        if read.settings.get(name) != value:
            raise RequestError(
                f"{where}: was made with {_MEANING.get(name, name)} "
                f"{_short(read.settings.get(name))}, now it is {_short(value)}; give the same, "
                "another file, or resume=False"
            )
    for step, row in enumerate(read.history):
        if row.step != step + 1 or len(row.tasks) != len(ada.names):
            raise RequestError(
                f"{where}: metadata: history[{step}]: expected step {step + 1} of "
                f"{len(ada.names)} tasks, got step {row.step} of {len(row.tasks)}"
            )
    for name, tensor in tensors.items():
        shape = torch.Size() if name == "adam.step" else table.shape
        if tensor.shape != shape:
            raise RequestError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if tensor.dtype != table.dtype and not (name == "adam.step" and is_float(tensor.dtype)):
            raise RequestError(f"{where}: {name} has dtype {tensor.dtype}, expected {table.dtype}")
        if not bool(tensor.isfinite().all()):
            raise RequestError(f"{where}: {name} holds NaN or infinity")
    state = {name.removeprefix("adam."): t for name, t in tensors.items() if name != "coefficients"}
    if state and set(state) != _ADAM:
        raise RequestError(
            f"{where}: expected the state of Adam, {', '.join(sorted(_ADAM))}; got "
            f"{', '.join(sorted(state))}"
        )
    with torch.no_grad():
        table.copy_(tensors["coefficients"])
    if state:
        device = ada.raw_coefficients.device
        optimizer.state[ada.raw_coefficients] = {
            name: tensor if name == "step" else tensor.to(device) for name, tensor in state.items()
        }
    return [vars(row) for row in read.history]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
