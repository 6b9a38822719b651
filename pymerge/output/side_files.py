"""Copies the files that accompany a model's weights: configuration, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pymerge.dtypes import torch_name
from pymerge.errors import CheckpointError, MergeError
from pymerge.strict_json import parse_json

__all__ = ["copy_side_files"]

_WANTED = (
    "*.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
    "license*",
    "notice*",
)
_UNWANTED = (
    "*.index.json",
    "pymerge_report.json",
    "adapter_config.json",  # transformers would take the merged model for an adapter
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state*",
    "training_args*",
    ".*",
)
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5"),
    *(".msgpack", ".npz", ".npy", ".pkl", ".pickle", ".tar", ".zip"),
)
# chat templates beyond the first, since transformers 4.52
_TEMPLATES = "additional_chat_templates"
_DTYPE_KEYS = ("torch_dtype", "dtype")


def copy_side_files(source: Path, target: Path, *, dtype: str | None) -> list[str]:
    """Copy the files that accompany a model's weights.

    Weights, indexes and leftovers of training are not copied; neither are directories, except
    `additional_chat_templates`.

    Args:
        source: the model directory; a single weight file has no accompanying files.
        target: an existing directory.
        dtype: safetensors code of the output, which replaces the dtype in config.json if it names
            one; None leaves config.json as it is.

    Returns:
        The names of the copied files, sorted.

    Raises:
        CheckpointError: config.json is not JSON.
        MergeError: a file cannot be copied.
    """
    if not source.is_dir():
        return []
    copied: list[str] = []
    for name in _names(source):
        try:
            if name == "config.json" and dtype is not None:
                content = _with_dtype((source / name).read_bytes(), source / name, dtype)
                (target / name).write_bytes(content)
            else:
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, target / name)
        except OSError as error:
            raise MergeError(
                f"{source / name}: cannot be copied to {target}: {error.strerror or error}"
            ) from error
        copied.append(name)
    return copied


def _names(source: Path) -> list[str]:
    try:
        names = [path.name for path in source.iterdir() if path.is_file() and _is_wanted(path.name)]
        names += [f"{_TEMPLATES}/{path.name}" for path in (source / _TEMPLATES).glob("*.jinja")]
    except OSError as error:
        raise MergeError(f"{source}: cannot be listed: {error.strerror or error}") from error
    return sorted(names)


def _is_wanted(name: str) -> bool:
    lower = name.lower()
    return (
        not lower.endswith(_WEIGHT_SUFFIXES)
        and any(fnmatchcase(lower, pattern) for pattern in _WANTED)
        and not any(fnmatchcase(lower, pattern) for pattern in _UNWANTED)
    )


def _with_dtype(content: bytes, path: Path, dtype: str) -> bytes:
    """Return config.json with the dtype it names replaced; unchanged bytes if it names none."""
    try:
        config = parse_json(content, unique_keys=False)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    name = torch_name(dtype)
    if not isinstance(config, dict) or not _set_dtype(config, name):
        return content
    return (json.dumps(config, indent=2) + "\n").encode()


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    changed = False
    for key in _DTYPE_KEYS:
        if key in config and config[key] != name:
            config[key] = name
            changed = True
    for key, value in config.items():
        # Parts of a multimodal model name their own; a quantization's dtype is something else.
        if isinstance(value, dict) and key.endswith("_config") and "quantiz" not in key:
            changed |= _set_dtype(value, name)
    return changed
