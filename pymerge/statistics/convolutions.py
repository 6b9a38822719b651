"""Convolutions as linear layers: the input patches under the kernel, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pymerge.errors import RequestError

__all__ = ["Convolutions", "Patches", "WatchConvolutions", "check_convolutions", "is_convolution"]

Tensor = torch.Tensor
Convolutions = bool | str

_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_AT_ONCE = 1 << 22  # elements of patches that are copied at once


def check_convolutions(value: Any, where: str) -> None:
    """Raise RequestError unless the value is False, True or "pointwise"."""
    if not isinstance(value, bool) and value != "pointwise":
        raise RequestError(
            f"{where}: convolutions: expected False, True or 'pointwise', got {value!r}"
        )


def is_convolution(module: nn.Module, convolutions: Convolutions) -> bool:
    """Return whether a module is a convolution of the requested kind.

    A convolution with groups is several linear layers side by side, each with its own inputs.
    """
    if not convolutions or not isinstance(module, _MODULES) or module.groups != 1:
        return False
    return convolutions is True or all(size == 1 for size in module.kernel_size)


@dataclass(frozen=True)
class Patches:
    """The patches of one call of a convolution.

    view: [examples, *positions, channels, *kernel]; it needs no memory except for padding.
    """

    view: Tensor
    dimensions: int

    @classmethod
    def of(
        cls,
        given: Tensor,
        kernel: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> Patches:
        """Take the arguments of `torch.nn.functional.conv2d` (or 1, 3), and the kernel's size.

        Args:
            given: [examples, channels, *sizes], or without examples.
        """
        dimensions = len(kernel)
        steps, holes = _each(stride, dimensions), _each(dilation, dimensions)
        reach = [hole * (size - 1) + 1 for hole, size in zip(holes, kernel, strict=True)]
        view = given if given.dim() == dimensions + 2 else given.unsqueeze(0)
        if padding == "same":
            # The odd element goes to the end, as in torch.
            edges = [((one - 1) // 2, one - 1 - (one - 1) // 2) for one in reach]
        elif isinstance(padding, str):
            edges = [(0, 0)] * dimensions
        else:
            edges = [(one, one) for one in _each(padding, dimensions)]
        if any(any(pair) for pair in edges):
            view = nn.functional.pad(view, [one for pair in reversed(edges) for one in pair])
        for axis in range(dimensions):
            view = view.unfold(2 + axis, reach[axis], steps[axis])[..., :: holes[axis]]
        order = (0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions))
        return cls(view.permute(order), dimensions)

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape [examples, *positions] of the convolution's output."""
        return tuple(self.view.shape[: 1 + self.dimensions])

    def rows(self, kept: Tensor | None = None) -> Iterator[Tensor]:
        """Yield matrices [rows, channels * prod(kernel)] of all patches, of bounded size.

        Args:
            kept: booleans of the shape `positions`: which of them count.
        """
        size = prod(self.view.shape[1 + self.dimensions :])
        for view, own in _blocks(self.view, kept, 0, 1 + self.dimensions):
            block = view.reshape(-1, size)
            yield block if own is None else block[own.reshape(-1)]


def _each(value: int | Sequence[int], dimensions: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dimensions
    return [int(one) for one in value] * (dimensions if len(value) == 1 else 1)


def _blocks(
    view: Tensor, kept: Tensor | None, axis: int, free: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield parts of a view, split along its first `free` axes; those before `axis` have length
    1."""
    if not view.numel():
        return
    length = view.shape[axis]
    each = view.numel() // length
    deeper = each > _AT_ONCE and axis + 1 < free
    step = 1 if deeper else max(1, _AT_ONCE // each)
    for start in range(0, length, step):
        count = min(step, length - start)
        part = view.narrow(axis, start, count)
        own = None if kept is None else kept.narrow(axis, start, count)
        if deeper:
            yield from _blocks(part, own, axis + 1, free)
        else:
            yield part, own


class WatchConvolutions(TorchFunctionMode):
    """Intercepts every convolution that torch computes.

    A module's attributes do not determine what it computes: subclasses pad the input themselves, or
    compute the kernel from the weight. So this looks at the calls of torch, with every padding
    mode.

    Args:
        hear: called with the weight and the patches.
        known: returns whether a weight is of interest.
    """

    def __init__(
        self, known: Callable[[Tensor], bool], hear: Callable[[Tensor, Patches], None]
    ) -> None:
        super().__init__()
        self._known = known
        self._hear = hear

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func in _FUNCTIONS:
            call = {**dict(zip(_ARGUMENTS, args, strict=False)), **named}
            weight = call["weight"]
            if self._known(weight) and call.get("groups", 1) == 1:
                how = {key: call[key] for key in ("stride", "padding", "dilation") if key in call}
                self._hear(weight, Patches.of(call["input"].detach(), weight.shape[2:], **how))
        return func(*args, **named)
