"""Generates Llama-shaped checkpoints to merge: sharded, seeded, in bounded memory, quickly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from safetensors.torch import save_file

from benchmarks.measure import in_threads

__all__ = [
    "LLAMA_057B",
    "LLAMA_114B",
    "LLAMA_SMALL",
    "LLAMA_SMALL_TWICE",
    "LLAMA_TINY",
    "CheckpointSet",
    "LlamaShape",
    "link_checkpoint",
    "make_checkpoints",
    "make_distinct_checkpoints",
    "warm",
    "workspace",
]

BASE_DEVIATION = 0.02
DELTA_DEVIATION = 1e-3
_POOL = 1 << 24  # random numbers drawn per model; tensors use stretches of them


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama model."""

    hidden: int
    mlp: int
    layers: int
    vocabulary: int
    heads: int
    key_value_heads: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes as in transformers."""
        key_value = self.hidden // self.heads * self.key_value_heads
        layer = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for number in range(self.layers):
            for name, shape in layer.items():
                shapes[f"model.layers.{number}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors().values())

    def config(self, dtype: torch.dtype) -> str:
        """Return a config.json that transformers accepts."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        return json.dumps(config, indent=2) + "\n"


# TinyLlama's sizes with 10 layers: 0.57 B parameters; with 23, twice as many.
LLAMA_057B = LlamaShape(2048, 5632, 10, 32000, 32, 4)
LLAMA_114B = LlamaShape(2048, 5632, 23, 32000, 32, 4)
LLAMA_SMALL = LlamaShape(512, 1408, 4, 8000, 8, 2)
LLAMA_SMALL_TWICE = LlamaShape(512, 1408, 11, 8000, 8, 2)
LLAMA_TINY = LlamaShape(128, 352, 2, 1000, 4, 2)


@dataclass(frozen=True)
class CheckpointSet:
    """A base and its fine-tuned models; `nbytes` is the tensor data of one of them."""

    base: Path
    models: tuple[Path, ...]
    shape: LlamaShape
    nbytes: int


Values = Callable[[str, int], torch.Tensor]


def _write(
    directory: Path, shape: LlamaShape, dtype: torch.dtype, shards: float, values: Values
) -> None:
    """Write a checkpoint in about `shards` shards, holding one at a time in memory."""
    shapes = shape.tensors()
    limit = shape.parameters * dtype.itemsize / shards
    groups: list[list[str]] = [[]]
    size = 0
    for name, dimensions in shapes.items():
        nbytes = prod(dimensions) * dtype.itemsize
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    directory.mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        filename = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: values(name, prod(shapes[name])).view(shapes[name]) for name in names}
        save_file(tensors, directory / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, filename))
    total = shape.parameters * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(shape.config(dtype))


def _pool(number: int, elements: int) -> torch.Tensor:
    # Pools have different lengths: if a tensor is longer than a pool and wraps around it, the
    # combinations of base and deltas still do not repeat.
    length = min(_POOL, elements + 101) - 2 * number
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(length, generator=generator)


def _stretches(pool: torch.Tensor, name: str, numel: int) -> Iterator[tuple[slice, torch.Tensor]]:
    position = zlib.crc32(name.encode()) % pool.numel()
    done = 0
    while done < numel:
        count = min(numel - done, pool.numel() - position, 1 << 18)
        yield slice(done, done + count), pool[position : position + count]
        done += count
        position = (position + count) % pool.numel()


def make_checkpoints(
    root: Path, shape: LlamaShape, *, models: int = 4, distinct: int | None = None
) -> CheckpointSet:
    """Write a bf16 base and its models, each sharded differently.

    Weights have standard deviation 0.02 (norms are near 1), deltas 0.001, before rounding to bf16.

    Args:
        root: directory for `base`, `model-1`...
        shape: sizes of the models.
        models: how many models.
        distinct: how many of them have their own data; the others are hard links to those.
    """
    dtype = torch.bfloat16
    longest = max(prod(dimensions) for dimensions in shape.tensors().values())
    base_pool = _pool(0, longest) * BASE_DEVIATION

    def base_values(name: str, numel: int) -> torch.Tensor:
        out = torch.empty(numel, dtype=dtype)
        for part, noise in _stretches(base_pool, name, numel):
            out[part] = noise + (1.0 if "norm" in name else 0.0)
        return out

    def write(number: int) -> None:
        if number == 0:
            return _write(base, shape, dtype, 2.3, base_values)
        pool = _pool(number, longest) * DELTA_DEVIATION

        def values(name: str, numel: int) -> torch.Tensor:
            out = base_values(name, numel)
            for part, noise in _stretches(pool, name, numel):
                out[part] = out[part].float().add_(noise)
            return out

        return _write(paths[number - 1], shape, dtype, 2.3 + 0.7 * number, values)

    base = root / "base"
    paths = [root / f"model-{number}" for number in range(1, models + 1)]
    own = models if distinct is None else min(distinct, models)
    in_threads(write, range(own + 1))
    for number in range(own, models):
        link_checkpoint(paths[number % own], paths[number])
    return CheckpointSet(base, tuple(paths), shape, shape.parameters * dtype.itemsize)


def make_distinct_checkpoints(root: Path, shape: LlamaShape, *, models: int = 4) -> CheckpointSet:
    """Write float32 checkpoints whose deltas are exact and, within a tensor, distinct in magnitude.

    Then the elements that a trim keeps do not depend on choices that differ between programs.
    """
    dtype = torch.float32

    def generator(name: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))

    def base_values(name: str, numel: int) -> torch.Tensor:
        # Multiples of 2^-10 below 2^-4; deltas are multiples of 2^-28 below 2^-10: their sum fits
        # into the 24 bits of a float32, and a subtraction recovers the delta.
        grid = torch.randint(-60, 61, (numel,), generator=generator(name, 0))
        return grid.to(dtype) * 2.0**-10

    def model_values(number: int) -> Values:
        def values(name: str, numel: int) -> torch.Tensor:
            if numel >= 1 << 18:
                raise ValueError(f"{name}: {numel} elements have no distinct exact deltas")
            drawn = generator(name, number)
            magnitude = (torch.randperm(numel, generator=drawn) + 1).to(dtype) * 2.0**-28
            sign = torch.randint(0, 2, (numel,), generator=drawn) * 2 - 1
            return base_values(name, numel) + magnitude * sign

        return values

    _write(root / "base", shape, dtype, 2.3, base_values)
    paths = []
    for number in range(1, models + 1):
        paths.append(root / f"model-{number}")
        _write(paths[-1], shape, dtype, 2.3 + 0.7 * number, model_values(number))
    nbytes = shape.parameters * dtype.itemsize
    return CheckpointSet(root / "base", tuple(paths), shape, nbytes)


def link_checkpoint(source: Path, target: Path) -> Path:
    """Create a directory of hard links to the files of a checkpoint, and return it."""
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)
    return target


def warm(paths: CheckpointSet) -> None:
    """Read all files once, so that they are in the page cache."""
    block = bytearray(16 << 20)
    for directory in (paths.base, *paths.models):
        for file in sorted(directory.iterdir()):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass


@contextmanager
def workspace(need: int, *, keep: bool = False) -> Iterator[Path]:
    """Yield a directory outside the repository; it is removed afterwards unless kept.

    It is created inside PYMERGE_BENCH_DIR, or in the directory of temporary files.

    Raises:
        RuntimeError: less than `need` bytes are free there.
    """
    parent = os.environ.get("PYMERGE_BENCH_DIR") or tempfile.gettempdir()
    free = shutil.disk_usage(parent).free
    if free < need:
        raise RuntimeError(
            f"the benchmark needs {need / 1e9:.1f} GB in {parent}, where {free / 1e9:.1f} GB are "
            "free; PYMERGE_BENCH_DIR names another place"
        )

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)  # so that the directory is removed

    before = signal.signal(signal.SIGTERM, terminate)
    root = Path(tempfile.mkdtemp(prefix="pymerge-bench-", dir=parent))
    try:
        yield root
    finally:
        signal.signal(signal.SIGTERM, before)
        if not keep:
            shutil.rmtree(root, ignore_errors=True)
