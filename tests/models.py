"""Small checkpoints with the structure of Llama, in every form of checkpoint, for tests."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymerge.checkpoint import dtype_code

State = dict[str, torch.Tensor]

# Methods that need files in addition to the models; they have tests of their own.
NEED_FILES = {"adamerging"}

INDEX = "model.safetensors.index.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MERGED_BUFFERS = ("model.temperature", "model.none.weight")
COPIED_BUFFERS = ("model.layers.0.position_ids", "model.layers.0.mask")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip waiting for the disk, which would take minutes with hundreds of merges on a busy
    machine."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None, raising=False)


def shapes(
    hidden: int = 64, mlp: int = 160, layers: int = 2, vocabulary: int = 256
) -> dict[str, Any]:
    """Return the names and shapes of a Llama; about 126000 parameters by default."""
    found: dict[str, Any] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{at}.self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (mlp, hidden),
            f"{at}.mlp.up_proj.weight": (mlp, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, mlp),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def llama(
    count: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    coarse: bool = False,
    buffers: bool = True,
    **sizes: int,
) -> tuple[State, list[State]]:
    """Return a base and `count` fine-tuned models.

    coarse: all values are multiples of 1/8, so that magnitudes tie across tensors and votes cancel.
    buffers: add a 0-dim and a zero-size float tensor, integers and booleans.
    """
    generator = torch.Generator().manual_seed(seed)
    names = shapes(**sizes)
    if buffers:
        names |= {MERGED_BUFFERS[0]: (), MERGED_BUFFERS[1]: (0, 8)}

    def draw(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * 4).round() / 8 if coarse else values * scale

    base = {name: draw(shape, 0.02).to(dtype) for name, shape in names.items()}
    models = [
        {name: (base[name].float() + draw(shape, 1e-3)).to(dtype) for name, shape in names.items()}
        for _ in range(count)
    ]
    if buffers:
        for state in (base, *models):
            state[COPIED_BUFFERS[0]] = torch.arange(64).reshape(1, 64)
            state[COPIED_BUFFERS[1]] = torch.arange(33) % 3 == 0
    return base, models


def save(
    directory: Path,
    state: Mapping[str, torch.Tensor],
    *,
    files: int = 1,
    seed: int = 0,
    config: dict[str, Any] | None = CONFIG,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a checkpoint; with several files, tensors are assigned to them at random."""
    directory.mkdir(parents=True)
    names = sorted(state)
    if files == 1:
        save_file(dict(state), directory / "model.safetensors", metadata=metadata)
    else:
        random.Random(seed).shuffle(names)
        weight_map = {}
        for number in range(files):
            filename = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            mine = names[number::files]
            save_file({name: state[name] for name in mine}, directory / filename)
            weight_map |= dict.fromkeys(mine, filename)
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def save_misaligned(directory: Path, state: Mapping[str, torch.Tensor], odd: int = 1) -> Path:
    """Write one file whose header has an odd length, so that no element is aligned."""
    directory.mkdir(parents=True)
    header, data = {}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": dtype_code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * ((odd - len(text)) % 8)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


def save_family(
    root: Path, base: State, models: Sequence[State], *, files: int | Sequence[int] = 1
) -> None:
    """Write `base`, `m0`, `m1`...; `files` is one number for all, or one for each, base first."""
    states = {"base": base} | {f"m{k}": model for k, model in enumerate(models)}
    for k, (name, state) in enumerate(states.items()):
        save(root / name, state, files=files if isinstance(files, int) else files[k], seed=k)


def config(
    root: Path,
    method: str,
    count: int,
    *,
    weights: Sequence[float] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Return the configuration for merging the output of `save_family`."""
    entries: list[dict[str, Any]] = [{"model": str(root / f"m{k}")} for k in range(count)]
    for entry, weight in zip(entries, weights or [], strict=False):
        entry["parameters"] = {"weight": weight}
    made: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": parameters}
    if method != "linear":
        made["base_model"] = str(root / "base")
    return made


def load(directory: Path) -> State:
    """Return the tensors of a safetensors checkpoint, read by the library and not by pymerge."""
    loaded: State = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in loaded
            loaded[name] = tensor
    return loaded


def weight_bytes(directory: Path) -> dict[str, bytes]:
    """Return the content of the weight files and of their index."""
    found = [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]
    return {path.name: path.read_bytes() for path in sorted(found)}


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check for the same names, shapes, dtypes and bits, except that 0 equals -0."""
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), name


def elementwise(
    base: State, models: Sequence[State], rule: Callable[..., torch.Tensor], dtype: torch.dtype
) -> State:
    """Return the base with each floating tensor replaced by rule(base, models) in float32."""
    return {
        name: rule(tensor.float(), [model[name].float() for model in models]).to(dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in base.items()
    }


def load_one(directory: Path) -> State:
    """Return the tensors of the model in a directory that also contains other safetensors files."""
    weights = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for path in weights for name, tensor in load_file(path).items()}
