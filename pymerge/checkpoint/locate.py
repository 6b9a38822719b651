"""Finds the weight files of a model: a directory in the layout of transformers, or one file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pymerge.checkpoint.header import read_start
from pymerge.checkpoint.problems import Problems
from pymerge.checkpoint.statistics import KINDS, filename_of
from pymerge.errors import nearest
from pymerge.strict_json import is_text, parse_json

__all__ = ["Weights", "find_weights", "read_json_file"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_LEFTOVERS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state")
# The files that save_statistics writes beside a model.
_STATISTICS = frozenset(filename_of(kind) for kind in KINDS)
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".h5": "TensorFlow/Keras",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".ckpt": "a training checkpoint",
    ".npz": "NumPy",
}


@dataclass(frozen=True)
class Weights:
    """The files of a model.

    `expected` lists which tensors the index assigns to each file, `listed` all tensors of the
    index; without an index they are None and empty.
    """

    files: tuple[Path, ...]
    pickled: bool
    directory: Path | None
    index: str = ""
    expected: dict[str, list[str]] | None = None
    listed: frozenset[str] = frozenset()


def find_weights(path: Path, problems: Problems, warnings: list[str]) -> Weights | None:
    """Return the weight files of a model, or None with the problems recorded."""
    try:
        is_directory = path.is_dir()
        exists = is_directory or path.exists()
    except OSError as error:
        problems.add("", f"cannot be read: {error.strerror}")
        return None
    except ValueError as error:  # an embedded null byte
        problems.add("", f"is no path: {error}")
        return None
    if not exists:
        problems.add("", _missing(path))
        return None
    if is_directory:
        return _in_directory(path, problems, warnings)
    if path.suffix == ".safetensors":
        return Weights((path,), False, None)
    if path.suffix in PICKLE_SUFFIXES:
        return Weights((path,), True, None)
    problems.add(
        "",
        "expected a model directory or a .safetensors, .bin, .pt or .pth file, "
        f"got a file {path.name!r}{_format_hint([path.name])}",
    )
    return None


def read_json_file(
    path: Path, where: str, problems: Problems, *, unique_keys: bool, strict: bool = False
) -> dict | None:
    """Return the JSON object in a file, or None with the problem recorded; see `parse_json`."""
    if read_start(path, where, 0, problems) is None:
        return None
    try:
        value = parse_json(path.read_bytes(), unique_keys=unique_keys, strict=strict, finite=strict)
    except OSError as error:
        problems.add(where, f"cannot be read: {error.strerror}")
        return None
    except ValueError as error:
        problems.add(where, str(error))
        return None
    if not isinstance(value, dict):
        problems.add(where, f"expected a JSON object, got {type(value).__name__}")
        return None
    return value


def _missing(path: Path) -> str:
    parts = str(path).split("/")
    hub_name = str(path) if len(parts) == 2 and not path.is_absolute() else "NAME"
    try:
        siblings = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        siblings = []
    return (
        f"no such file or directory{nearest(path.name, siblings)} "
        "(pymerge reads local checkpoints; "
        f"get one from the Hugging Face Hub with `hf download {hub_name} --local-dir DIR`)"
    )


def _in_directory(path: Path, problems: Problems, warnings: list[str]) -> Weights | None:
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        problems.add("", f"the directory cannot be read: {error.strerror}")
        return None
    for default, suffixes, pickled in (
        ("model.safetensors", (".safetensors",), False),
        ("pytorch_model.bin", PICKLE_SUFFIXES, True),
    ):
        indexes = [name for name in names if name.endswith(f"{suffixes[0]}.index.json")]
        if f"{default}.index.json" in indexes:
            indexes = [f"{default}.index.json"]
        if len(indexes) > 1:
            problems.add("", f"several indexes, cannot tell which one to read: {_listed(indexes)}")
            return None
        if indexes:
            if default in names:
                warnings.append(
                    f"{problems.label}: holds both {indexes[0]} and {default}; the index is read"
                )
            return _by_index(path, indexes[0], pickled, problems)
        weights = [
            name
            for name in names
            if name.endswith(suffixes)
            and not name.startswith(_LEFTOVERS)
            and not name.startswith("adapter_model.")
            and name not in _STATISTICS
        ]
        if default in weights:
            weights = [default]
        if len(weights) > 1:
            problems.add(
                "",
                f"several weight files without an index ({suffixes[0]}.index.json), cannot tell "
                f"whether they are one model: {_listed(weights)}",
            )
            return None
        if weights:
            return Weights((path / weights[0],), pickled, path)
    problems.add("", _no_weights(names))
    return None


def _no_weights(names: list[str]) -> str:
    if not names:
        return "the directory is empty"
    if any(name.startswith("adapter_model.") for name in names):
        return (
            "holds only a LoRA adapter (adapter_model): name it with its base model, as "
            "MODEL+ADAPTER, or merge adapters with `pymerge merge-adapters`"
        )
    expected = "expected *.safetensors, or pytorch_model.bin"
    return f"holds no weights ({expected}); it holds {_listed(names)}{_format_hint(names)}"


def _format_hint(names: list[str]) -> str:
    formats = sorted({_OTHER_FORMATS[s] for n in names if (s := Path(n).suffix) in _OTHER_FORMATS})
    return f"; {' and '.join(formats)} cannot be read: convert to safetensors" if formats else ""


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _by_index(directory: Path, index: str, pickled: bool, problems: Problems) -> Weights | None:
    content = read_json_file(directory / index, index, problems, unique_keys=True)
    if content is None:
        return None
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        got = "nothing" if weight_map is None else type(weight_map).__name__
        problems.add(
            index, f"weight_map: expected an object of tensor name -> file name, got {got}"
        )
        return None
    if not weight_map:
        problems.add(index, "weight_map is empty")
        return None
    expected: dict[str, list[str]] = {}
    for tensor, filename in weight_map.items():
        if not is_text(tensor) or not is_text(filename):
            shown = repr(filename)[:80]
            problems.add(
                index, f"weight_map[{tensor!r}]: expected a file name, got {shown}", "not a string"
            )
        else:
            expected.setdefault(filename, []).append(tensor)
    files: dict[str, list[str]] = {}
    for filename, tensors in sorted(expected.items()):
        reason = _unfit_name(directory, filename)
        if reason is None:
            files[filename] = tensors
        else:
            problems.add(index, f"names {filename!r}, {reason}", "file name")
    paths = tuple(directory / filename for filename in files)
    return Weights(paths, pickled, directory, index, files, frozenset(weight_map))


def _unfit_name(directory: Path, filename: str) -> str | None:
    """Return why a name in an index cannot be read; symbolic links to other places are fine.

    The cache of the Hugging Face Hub consists of such links.
    """
    name = PurePosixPath(filename)
    if name.is_absolute() or ".." in name.parts:
        return "which lies outside the model directory"
    if "\0" in filename or not name.parts:
        return "which is no file name"
    try:
        (directory / filename).lstat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return "which is missing" if missing else f"which cannot be read: {error.strerror}"
    if not (directory / filename).exists():
        return "which is a link to a file that is missing"
    return None
