"""Writes a merged model, and the coefficients that made it."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes

from pymerge.errors import RequestError
from pymerge.methods.adamerging.coefficients import FORMAT
from pymerge.output.replace import replace_file

if TYPE_CHECKING:
    from pymerge.adamerging.module import AdaMerging
    from pymerge.merging.report import MergeReport

__all__ = ["save", "save_coefficients"]


def save_coefficients(ada: AdaMerging, path: str | os.PathLike[str]) -> None:
    """Write the effective coefficients to a safetensors file, which is replaced atomically.

    `merge_method: adamerging` reads it.
    """
    table = ada.raw_coefficients.detach().cpu()
    if ada.clamp is not None:
        table = table.clamp(*ada.clamp)
    layers = dict(zip(ada.layers, ada.grouping.index, strict=True))
    metadata = {
        "format": FORMAT,
        "models": json.dumps(list(ada.names)),
        "groups": json.dumps(list(ada.grouping.names)),
        "layers": json.dumps(layers),
        "fixed": json.dumps([name for name in ada.tensor_names if name not in layers]),
        "trimmed": json.dumps(ada.trimmed),
        "density": json.dumps(ada.density),
    }
    data = to_bytes({"coefficients": table.contiguous()}, metadata)
    replace_file(Path(path), data, "coefficients: ")


def save(
    ada: AdaMerging,
    out: str | os.PathLike[str],
    *,
    coefficients: str | os.PathLike[str] | None = None,
    device: str = "auto",
    backend: str | None = "auto",
    memory: int | str = "2GiB",
    device_memory: int | str | None = None,
    threads: int | None = None,
    shard_size: int | str = "5GB",
    seed: int = 0,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    quiet: bool = True,
    checksums: bool = False,
    search: Mapping[str, Any] | None = None,
) -> MergeReport | None:
    """Write the merged model to the directory `out`, which appears complete or not at all.

    If the base and all models are checkpoints, they are merged as `pymerge merge` merges files:
    streamed, in bounded memory, with config and tokenizer files. The coefficients are first written
    to `coefficients`, and the report contains the config with which `pymerge merge` repeats the
    merge. Otherwise the merged tensors are written as `model.safetensors`, layer by layer.

    Args:
        coefficients: the file for the coefficients; default: OUT.coefficients.safetensors.
        device and the others: as in `merge_checkpoints`. Without checkpoints only `force` and
            `shard_size` have an effect; others are refused.

    Returns:
        The report of `merge_checkpoints`; None without checkpoints.

    Raises:
        RequestError, MergeError: as in `merge_checkpoints`.
    """
    base, models = ada.inputs
    out = Path(out)
    files: dict[str, Any] = {
        "device": device,
        "backend": backend,
        "memory": memory,
        "device_memory": device_memory,
        "threads": threads,
        "seed": seed,
        "report": report,
        "quiet": quiet,
        "checksums": checksums,
        "search": search,
    }
    if all(isinstance(one, (str, os.PathLike)) for one in (base, *models)):
        from pymerge.merging.files import merge_checkpoints

        table = coefficients or out.with_name(f"{out.name}.coefficients.safetensors")
        save_coefficients(ada, table)
        config = {
            "merge_method": "adamerging",
            "base_model": os.fspath(base),
            "models": [{"model": os.fspath(one)} for one in models],
            "parameters": {"coefficients": os.fspath(table)},
        }
        return merge_checkpoints(config, out, shard_size=shard_size, force=force, **files)
    defaults = inspect.signature(save).parameters
    files["coefficients"] = coefficients
    given = sorted(name for name, value in files.items() if value != defaults[name].default)
    if given:
        raise RequestError(
            f"save: {given[0]}: has no effect unless base and models are all paths of checkpoints"
        )
    _save_tensors(ada, out, force=force, shard_size=shard_size)
    return None


@torch.no_grad()
def _save_tensors(ada: AdaMerging, out: Path, *, force: bool, shard_size: int | str) -> None:
    from pymerge.byte_sizes import parse_size
    from pymerge.checkpoint import torch_dtype
    from pymerge.dtypes import DTYPES
    from pymerge.merging.publish import Publication
    from pymerge.output import OutputTensor, plan_layout

    codes = {torch_dtype(code): code for code in DTYPES}
    fixed = ada.fixed_tensors()
    kinds = {name: (dtype, shape) for name, dtype, shape in ada.merged_kinds()}
    kinds |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in fixed.items()}
    outputs = [OutputTensor(name, codes[kind], shape) for name, (kind, shape) in kinds.items()]
    layout = plan_layout(outputs, parse_size(shard_size, "shard_size"))
    with Publication(out, [], force=force) as output:
        output.begin()
        with output.shards(layout) as writer:
            for name in layout.order:
                tensor = fixed[name] if name in fixed else ada.merged_tensor(name)
                flat = tensor.detach().cpu().contiguous().view(-1)
                for start, piece in writer.pieces(name):
                    piece.tensor().copy_(flat[start : start + piece.numel()])
        output.commit()
