"""Adapters on disk, as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pymerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from pymerge.checkpoint.locate import read_json_file
from pymerge.checkpoint.peft.adapter import Adapter, Module, Saved
from pymerge.checkpoint.peft.build import stored_shape
from pymerge.checkpoint.peft.settings import CONFIG, Settings
from pymerge.checkpoint.problems import Problems
from pymerge.dtypes import DTYPES, FLOATS
from pymerge.errors import CheckpointError, MergeError, RequestError, nearest
from pymerge.ops.array import Array, widen
from pymerge.ops.native.low_rank import store
from pymerge.output import write_file
from pymerge.output.layout import OutputTensor, plan_layout

__all__ = ["CODES", "CONFIG", "WEIGHTS", "load", "save", "write"]

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Dtypes of the factors that are written.
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<which>[AB])(\.[^.]+)?")
_VECTOR = re.compile(r"(?P<module>.+)\.ia3_l(\.[^.]+)?")
_FOREIGN = re.compile(r"(^|\.)(lora|ia3|hada|lokr|oft|vera|adalora)_")
_WRAPPED = re.compile(r"\.(modules_to_save(\.[^.]+(?=\.))?|base_layer)(?=\.)")


def load(path: str | os.PathLike[str], label: str | None = None) -> Adapter:
    """Open a LoRA or IA3 adapter; its tensors are read when they are requested.

    Everything is checked against adapter_config.json: the rank of every module, its rank_pattern
    and alpha_pattern, that A and B belong together. Adapters that pymerge cannot compute exactly
    (DoRA, a bias in lora_B, PiSSA and the like) are refused by name.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors (or .bin, which is
            read with weights_only and a warning).
        label: its name in messages; default its path.

    Raises:
        CheckpointError: listing every problem that was found.

    >>> import tempfile
    >>> from pymerge.checkpoint.peft.build import lora
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora({"layer.fc": (np.ones((3, 2)), np.ones((2, 4)))}).save(f"{folder}/out")
    ...     load(f"{folder}/out").delta("layer.fc")[0]
    array([2., 2., 2., 2.], dtype=float32)
    """
    path = Path(path)
    label = str(path) if label is None else label
    problems = Problems(label)
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing"
        problems.add("", f"expected a directory with {CONFIG}, got {what} at {path}")
        raise CheckpointError(problems.messages())
    if not (path / CONFIG).exists():
        problems.add("", f"is no adapter of PEFT: it has no {CONFIG}")
        raise CheckpointError(problems.messages())
    config = read_json_file(path / CONFIG, CONFIG, problems, unique_keys=True, strict=True)
    found = [name for name in WEIGHTS if (path / name).exists()]
    if not found:
        problems.add("", f"has no weights; expected {' or '.join(WEIGHTS)}")
    checkpoint: Checkpoint | None = None
    if found:
        try:
            checkpoint = open_checkpoint(path / found[0], label)
        except CheckpointError as error:
            raise CheckpointError([*problems.messages(), *error.problems]) from None
    settings = None if config is None else Settings(config, problems)
    if problems or settings is None or config is None or checkpoint is None:
        if checkpoint is not None:
            checkpoint.close()
        raise CheckpointError(problems.messages())
    reader = _Reader(checkpoint, settings, problems)
    reader.read()
    if problems:
        checkpoint.close()
        raise CheckpointError(problems.messages())
    warnings = list(checkpoint.warnings)
    missing = settings.untouched([*reader.modules, *_owners(reader.saved)])
    if missing:
        names = ", ".join(repr(name) for name in missing)
        warnings.append(f"{label}: target_modules names {names}, of which {found[0]} has nothing")
    return Adapter(
        settings.peft_type,  # type: ignore[arg-type]  # Settings has checked it
        config,
        reader.modules,
        checkpoint.array,
        saved=reader.saved,
        label=label,
        path=path,
        checkpoint=checkpoint,
        warnings=warnings,
    )


def _owners(saved: dict[str, Saved]) -> list[str]:
    return [name.rpartition(".")[0] for name in saved]


class _Reader:
    """Sorts the tensors of a file into modules, and checks them against the config."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, problems: Problems) -> None:
        self.modules: dict[str, Module] = {}
        self.saved: dict[str, Saved] = {}
        self._checkpoint = checkpoint
        self._settings = settings
        self._problems = problems
        self._where = Path(checkpoint.path).name
        self._factors: dict[str, dict[str, TensorInfo]] = {}
        self._embeddings: set[str] = set()

    def read(self) -> None:
        for key, info in self._checkpoint.tensors.items():
            if info.dtype not in FLOATS and not self._is_saved(key):
                self._add(f"{key!r}: expected floats, got {info.dtype}", "dtype")
            elif not key.startswith(PREFIX):
                self._add(
                    f"{key!r}: expected a name that begins with {PREFIX!r}, as PEFT writes it",
                    "prefix",
                )
            else:
                self._sort(key.removeprefix(PREFIX), info)
        for name, factors in sorted(self._factors.items()):
            if self._settings.peft_type == "IA3":
                self._vector(name, factors["vector"])
            else:
                self._pair(name, factors)
        if not self._problems and not self.modules:
            self._add(f"holds no {self._settings.peft_type} modules")

    def _add(self, text: str, kind: str | None = None) -> None:
        self._problems.add(self._where, text, kind)

    def _is_saved(self, key: str) -> bool:
        return _FOREIGN.search(key) is None

    def _sort(self, key: str, info: TensorInfo) -> None:
        lora = self._settings.peft_type == "LORA"
        found = _FACTOR.fullmatch(key) or _EMBEDDING.fullmatch(key) if lora else None
        vector = None if lora else _VECTOR.fullmatch(key)
        if found is not None:
            name, which = found["module"], found["which"]
            if "lora_embedding_" in key:
                self._embeddings.add(name)
        elif vector is not None:
            name, which = vector["module"], "vector"
        elif "lora_magnitude_vector" in key:
            self._add(f"{key!r}: DoRA (weight-decomposed LoRA) is not supported", "dora")
            return
        elif not self._is_saved(key):
            self._add(
                f"{key!r}: is no tensor of {self._settings.peft_type} that pymerge knows", "unknown"
            )
            return
        else:
            name = _WRAPPED.sub("", key)
            if name in self.saved:
                self._add(f"'{name}' is there twice: {self.saved[name].key!r} and {info.name!r}")
            self.saved[name] = Saved(info.name, info.dtype, info.shape)
            return
        factors = self._factors.setdefault(name, {})
        if which in factors:
            text = f"module '{name}' has {which} twice: {factors[which].name!r} and {info.name!r}"
            self._add(text, "twice")
        factors[which] = info

    def _pair(self, name: str, factors: dict[str, TensorInfo]) -> None:
        for which, other in (("A", "B"), ("B", "A")):
            if which not in factors:
                self._add(f"module '{name}' has lora_{other} and lacks lora_{which}", "lacks")
                return
        a, b = factors["A"], factors["B"]
        if a.numel == 0 or b.numel == 0 or len(a.shape) < 2 or len(b.shape) != len(a.shape):
            self._add(
                f"module '{name}': expected A [r, in] and B [out, r], got {a.shape} and {b.shape} "
                "(training under ZeRO-3 or FSDP saves such without gathering)",
                "shape",
            )
            return
        embedding = name in self._embeddings
        rank, expected = a.shape[0], self._settings.rank(name)
        if rank != expected or b.shape[1] != rank:
            self._add(
                f"module '{name}' has A {a.shape} and B {b.shape}, expected rank {expected} like "
                f"{CONFIG}",
                "rank",
            )
            return
        if len(a.shape) > 2 and any(size != 1 for size in b.shape[2:]):
            self._add(
                f"module '{name}': expected B of a convolution to be [out, r, 1, ...], got "
                f"{b.shape}",
                "conv",
            )
            return
        transposed = embedding or (self._settings.transposed and len(a.shape) == 2)
        shape = (b.shape[0], *a.shape[1:])
        self.modules[name] = Module(
            name,
            "embedding" if embedding else "conv" if len(a.shape) > 2 else "linear",
            shape[::-1] if transposed else shape,
            rank,
            float(np.float32(self._settings.scaling(name, rank))),
            transposed,
            keys=(a.name, b.name),
        )

    def _vector(self, name: str, info: TensorInfo) -> None:
        feedforward = self._settings.is_feedforward(name)
        fits = len(info.shape) == 2 and info.shape[0 if feedforward else 1] == 1
        if not fits or info.numel == 0:
            wanted = "(1, in), because it is" if feedforward else "(out, 1), because it is not"
            self._add(
                f"module '{name}': expected an IA3 vector of shape {wanted} in "
                f"feedforward_modules of adapter_config.json, got {info.shape}",
                "vector",
            )
            return
        self.modules[name] = Module(
            name,
            "ia3",
            info.shape,
            transposed=self._settings.transposed,
            feedforward=feedforward,
            keys=(info.name,),
        )


def save(
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    force: bool = False,
) -> None:
    """Write an adapter: see `Adapter.save`."""
    from pymerge.output import OutputDirectory

    inputs = [] if adapter.path is None else [adapter.path]
    with OutputDirectory(Path(out), force=force, inputs=inputs) as directory:
        write(adapter, directory.path, dtype)
        directory.commit()


def write(adapter: Adapter, directory: Path, dtype: str | None) -> None:
    """Write the two files of an adapter into an existing directory."""
    if dtype is not None and dtype not in CODES:
        raise RequestError(
            f"dtype: expected one of {', '.join(CODES)}, got {dtype!r}{nearest(dtype, CODES)}"
        )
    tensors: dict[str, tuple[Array, tuple[int, ...], str]] = {}
    for name, module in adapter.modules.items():
        for key, which in zip(module.keys, ("A", "B"), strict=False):
            array = adapter.array(key)
            stored, shape = _stored(name, module, which)
            tensors[PREFIX + stored] = (array, shape, CODES[dtype] if dtype else array.code)
    for name, saved in adapter.saved.items():
        owner, _, kind = name.rpartition(".")
        # PEFT looks for the tensors of an adapted module in the layer that it wraps.
        stored = f"{owner}.base_layer.{kind}" if owner in adapter.modules else name
        tensors[PREFIX + stored] = (adapter.array(saved.key), saved.shape, saved.dtype)
    outputs = [OutputTensor(key, code, shape) for key, (_, shape, code) in tensors.items()]
    shard = plan_layout(outputs, sys.maxsize).shards[0]
    text = json.dumps(peft_config(adapter), indent=2, ensure_ascii=False) + "\n"
    write_file(directory / CONFIG, text)
    try:
        with open(directory / WEIGHTS[0], "wb") as file:
            file.write(shard.header)
            for placed in shard.tensors:
                array, _, code = tensors[placed.name]
                file.write(_as(array, code).bytes().numpy().data)
    except OSError as error:
        raise MergeError(f"{directory}: cannot be written: {error.strerror or error}") from error


def _stored(name: str, module: Module, which: str) -> tuple[str, tuple[int, ...]]:
    """Return the key and shape with which PEFT's files store a tensor of a module."""
    if module.kind == "ia3":
        return f"{name}.ia3_l", module.shape
    shape = stored_shape(module, which)
    if module.kind == "embedding":
        return f"{name}.lora_embedding_{which}", shape
    return f"{name}.lora_{which}.weight", shape


def _as(array: Array, code: str) -> Array:
    if array.code == code:
        return array
    values = np.empty(array.numel() * DTYPES[code], np.uint8)
    out = Array.of(values, code)
    store(out, widen(array, False))
    return out


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    config = {"inference_mode": True, **adapter.config}
    if adapter.path is not None:  # its own config describes it
        return config
    owners = {name.rpartition(".")[0] for name in adapter.saved}
    config["modules_to_save"] = sorted(owners - adapter.modules.keys()) or None
    if adapter.peft_type == "IA3":
        return config
    ranks = {name: module.rank for name, module in adapter.modules.items()}
    # The config's rank is the one that most modules have; of equally frequent ones the largest.
    counts = Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], rank))
    own = {name: rank for name, rank in sorted(ranks.items()) if rank != common}
    config.update(
        r=common,
        lora_alpha=common,
        use_rslora=False,
        rank_pattern=own,
        # PEFT divides by the rank: equal numbers give a scaling of 1.
        alpha_pattern=dict(own),
        lora_dropout=0.0,
        bias="all" if any(name.endswith(".bias") for name in adapter.saved) else "none",
        init_lora_weights=True,
    )
    return config
