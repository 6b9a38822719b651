"""`Call`: the arguments of a kernel call, converted to addresses. `HostCall` and `DeviceCall` share
it.

The functions of this package marshal each op once for both kinds of call. They open a call with the
first of the op's tensors, which determines the length of the others, and ask it for addresses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

from pymerge.ops.arguments import padded
from pymerge.ops.array import Flat

__all__ = ["NOTHING", "Call", "Operand"]

Operand: TypeAlias = tuple[int, int]  # address, dtype code
NOTHING: Operand = (0, 0)


class Call(ABC):
    """A call, opened with its first tensor.

    Attributes:
        native: `pymerge._C`.
        numel: number of elements of the call's tensors.
    """

    NAME: ClassVar[str]
    __slots__ = ("native", "numel")
    native: Any
    numel: int

    @abstractmethod
    def __init__(self, first: Flat) -> None: ...

    @abstractmethod
    def operand(self, flat: Flat | None, elements: int | None = None) -> Operand:
        """Return the address and the dtype code of a tensor; NOTHING for None.

        elements: its expected length, if that differs from the length of the call's first tensor.
        """

    @abstractmethod
    def counters(self, values: Any, dtype: str = "int64", least: int = 0) -> int:
        """Return the address of an array of numbers; check that it has `least` or more."""

    @abstractmethod
    def strided(self, values: Any, dtype: str) -> tuple[int, int]:
        """Return the address of a matrix, and the distance of its rows in elements."""

    @abstractmethod
    def end(self, wide: bool, threads: int = 0) -> tuple[int, int, int, int, int]:
        """Return the last arguments of every call: numel, compute, threads, device, stream."""

    def operands(self, flats: Sequence[Flat]) -> list[Operand]:
        return [self.operand(flat) for flat in flats]

    def common(self, base: Flat | None, models: Sequence[Flat], wide: bool) -> tuple[Any, ...]:
        """Return the arguments that come first in most calls."""
        return self.operand(base), self.operands(models), *self.end(wide)

    def table(self, name: str, values: Any, shape: tuple[int, ...]) -> int:
        """Return the address of a table of doubles."""
        if tuple(values.shape) != shape:
            raise ValueError(
                f"backend {self.NAME!r}: {name}: expected a table of shape {shape}, got "
                f"{tuple(values.shape)}"
            )
        return self.counters(values, "float64")

    def rows(self, name: str, values: Any, count: int, dtype: str) -> tuple[int, int]:
        """Return the address and the stride of scores or ranks, [count, numel with padding];
        NOTHING for None."""
        if values is None:
            return NOTHING
        rows, room = values.shape
        if rows != count or room < padded(self.numel):
            raise ValueError(
                f"backend {self.NAME!r}: {name}: expected {count} rows of {padded(self.numel)} "
                f"numbers, got {tuple(values.shape)}"
            )
        return self.strided(values, dtype)
