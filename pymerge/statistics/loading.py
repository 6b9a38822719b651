"""Loads a checkpoint into an architecture, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pymerge.checkpoint import Checkpoint
from pymerge.dtypes import FLOATS
from pymerge.errors import RequestError, nearest
from pymerge.plan.inputs import header

__all__ = ["Architecture"]

Tensor = torch.Tensor
_SHOWN = 5  # names in a message


class Architecture:
    """A module into which checkpoints are loaded one after another.

    Names are the module's own. Every parameter, and every buffer that is in a state dict, comes
    from the checkpoint, so that nothing of one model remains in the next; other buffers are the
    module's own.

    Attributes:
        module: the module; its parameters are overwritten.
        names: {name of a tensor: all of its names}.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._tensors: dict[str, Tensor] = {}
        self._own: set[str] = set()  # buffers that are in no state dict
        self.names: dict[str, list[str]] = {}
        first: dict[int, str] = {}
        for prefix, inner in module.named_modules(remove_duplicate=False):
            for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
                whole = f"{prefix}.{name}" if prefix else name
                if tensor is None:
                    continue
                if name in inner._non_persistent_buffers_set:
                    self._own.add(whole)
                    continue
                key = first.setdefault(id(tensor), whole)
                self._tensors.setdefault(key, tensor)
                self.names.setdefault(key, []).append(whole)

    def unfit(self) -> str | None:
        """Return why no checkpoint can be loaded into it, or None."""
        if not any(True for _ in self.module.parameters()):
            return "expected a module with parameters, got none"
        if any(tensor.is_meta for tensor in self._tensors.values()):
            return "expected a module in memory (with values of any kind), got one on meta"
        return None

    def misfits(self, checkpoint: Checkpoint) -> list[str]:
        """Return what does not fit in a checkpoint, judging by its header."""
        label = checkpoint.label
        every = {name: key for key, names in self.names.items() for name in names}
        there = [*checkpoint.tensors, *checkpoint.tied]
        extra = [n for n in checkpoint.tensors if n not in every and n not in self._own]
        missing = [key for key, names in self.names.items() if not _held(names, checkpoint)]
        found: list[str] = []
        if missing:
            hint = nearest(missing[0], extra or there)
            found.append(
                f"{label}: does not fit the architecture: lacks {_few(missing)} of its "
                f"{len(self._tensors)} tensors{hint}"
            )
        if extra:
            found.append(
                f"{label}: does not fit the architecture, which has no {_few(extra)} "
                f"({len(extra)} of {len(checkpoint.tensors)} tensors)"
            )
        for name, key in every.items():
            if name in checkpoint.tensors:
                found += self._misfit(checkpoint, name, self._tensors[key])
        return found

    def _misfit(self, checkpoint: Checkpoint, name: str, own: Tensor) -> list[str]:
        info, where = checkpoint.tensors[name], f"{checkpoint.label}: {name!r}"
        if tuple(info.shape) != tuple(own.shape):
            return [
                f"{where}: expected shape {tuple(own.shape)} like the architecture, got "
                f"{tuple(info.shape)}"
            ]
        if own.is_floating_point() != (info.dtype in FLOATS):
            what = "a floating-point tensor" if own.is_floating_point() else f"{own.dtype}"
            return [f"{where}: expected {what} like the architecture, got {info.dtype}"]
        return []

    def load(self, checkpoint: Checkpoint) -> None:
        """Copy all tensors of a checkpoint that fits, each in the architecture's dtype.

        Raises:
            RequestError: names that share one tensor here have different values there.
        """
        with torch.no_grad():
            for key, names in self.names.items():
                source, *others = _held(names, checkpoint)
                values = _values(checkpoint, source)
                for other in others:
                    if other in checkpoint.tensors and not _same(
                        values, _values(checkpoint, other)
                    ):
                        raise RequestError(
                            f"{checkpoint.label}: {source!r} and {other!r} differ, but are one "
                            "tensor of the architecture"
                        )
                self._tensors[key].copy_(values)
                for name in (source, *others):
                    checkpoint.release(name)


def _held(names: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    return [name for name in names if name in checkpoint.tensors or name in checkpoint.tied]


def _values(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.flat(name).view(header(checkpoint, name).shape)


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare bits, as NaN is the same as itself here."""
    bits = [tensor.flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
