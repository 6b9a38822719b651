"""Checkpoints in torch's pickle formats (.bin, .pt, .pth), read with weights_only."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint.header import TensorInfo, read_start
from pymerge.checkpoint.mapping import advise
from pymerge.checkpoint.problems import Problems
from pymerge.dtypes import DTYPES, dtype_code
from pymerge.errors import RequestError
from pymerge.ops.array import Array, as_array

if TYPE_CHECKING:
    import torch

__all__ = ["PickledFiles"]

_CONVERT = (
    "load it in the program that wrote it and save the plain weights as safetensors "
    "(safetensors.torch.save_file)"
)


class PickledFiles:
    """The tensors of a checkpoint's pickled files, loaded when the checkpoint is opened."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def load(
        self, path: Path, where: str, problems: Problems, notes: list[str]
    ) -> list[TensorInfo] | None:
        """Load one file and return its tensors, or None with the problems recorded.

        Notes for the user about a file that loads are added to `notes`.
        """
        start = read_start(path, where, 4, problems)
        if start is None:
            return None
        prefix, size = start
        mapped = prefix == b"PK\x03\x04" and zipfile.is_zipfile(path)
        if prefix == b"PK\x03\x04" and not mapped:
            text = f"is truncated or damaged: {size} bytes of a zip archive that lacks its end"
            problems.add(where, text)
            return None
        notes.append(
            f"{problems.label}: {where}: pickle, read with weights_only; safetensors is safer"
            + ("" if mapped else "; its old format cannot be mapped, so it is held in memory")
        )
        try:
            loaded = _torch_load(path, mapped)
        except Exception as error:  # a hostile or damaged pickle can raise anything
            problems.add(where, f"weights_only loading refused it: {_reason(error)}; {_CONVERT}")
            return None
        state = _state_dict(loaded, where, problems)
        if state is None:
            return None
        infos = []
        for name, tensor in state.items():
            info = _describe(name, tensor, path, where, problems)
            if info is not None:
                infos.append(info)
                self._tensors.setdefault(name, tensor.detach())
        return infos

    def array(self, info: TensorInfo) -> Array:
        """Return a tensor as an array; a copy only if it is not contiguous."""
        tensor = self._tensors[info.name].resolve_conj().resolve_neg()
        return as_array(tensor.contiguous().view(-1))

    def will_need(self, info: TensorInfo, start_byte: int, stop_byte: int) -> None:
        """Start reading bytes of a tensor into the page cache."""
        tensor = self._tensors[info.name]
        if tensor.is_contiguous():
            advise(tensor.data_ptr() + start_byte, stop_byte - start_byte, "MADV_WILLNEED")

    def release(self, info: TensorInfo, start_byte: int, stop_byte: int) -> None:
        """Do nothing: torch's private maps may hold data that is not in the file (byte-swapped)."""

    def close(self) -> None:
        """Release the tensors."""
        self._tensors.clear()


def _torch_load(path: Path, mapped: bool) -> Any:
    import torch

    with warnings.catch_warnings():
        # About pickle protocols and old storages; their consequences are reported elsewhere.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _reason(error: Exception) -> str:
    """Return the cause, without torch's advice to load the file unsafely."""
    text = str(error).strip()
    found = re.search(r"WeightsUnpickler error:\s*(\S.*)", text)
    if found:
        text = found.group(1).split(" Please use ")[0]
    elif text.startswith("Weights only load failed"):
        text = text.partition("\n")[2].strip() or text
    lines = text.splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def _state_dict(loaded: Any, where: str, problems: Problems) -> dict[str, Any] | None:
    """Return the flat dict of a file, which may be nested under the single key "state_dict"."""
    if isinstance(loaded, dict) and list(loaded) == ["state_dict"]:
        loaded = loaded["state_dict"]
    expected = 'expected a dict of tensors, or one under the single key "state_dict"'
    if not isinstance(loaded, dict):
        problems.add(where, f"{expected}, got {type(loaded).__name__}")
        return None
    import torch

    foreign = {k: v for k, v in loaded.items() if not isinstance(v, torch.Tensor)}
    if foreign or not all(isinstance(key, str) for key in loaded):
        shown = [f"{key!r}: {type(value).__name__}" for key, value in loaded.items()]
        more = f", and {len(shown) - 8} more" if len(shown) > 8 else ""
        problems.add(where, f"{expected}, found {', '.join(shown[:8])}{more}; {_CONVERT}")
        return None
    return loaded


def _describe(
    name: str, tensor: torch.Tensor, path: Path, where: str, problems: Problems
) -> TensorInfo | None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        problems.add(where, f"tensor {name!r}: expected a dense tensor, got {kind}", "dense")
        return None
    try:
        code = dtype_code(tensor.dtype)
    except RequestError as error:
        problems.add(where, f"tensor {name!r}: {error}", "dtype")
        return None
    shape = tuple(tensor.shape)
    return TensorInfo(name, code, shape, path, 0, tensor.numel() * DTYPES[code])
