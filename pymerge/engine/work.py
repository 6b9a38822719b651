"""What the engine works on: output tensors, where their inputs come from, where results go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pymerge.ops.array import Flat

__all__ = [
    "NoProgress",
    "Progress",
    "Sink",
    "Source",
    "TensorStatistics",
    "Work",
    "no_progress",
    "row_length",
    "slices",
]


@dataclass(frozen=True)
class Work:
    """One output tensor.

    wide: compute in float64. copied: integers and booleans, equal in all models. parameters:
    resolved for this tensor, by `Parameter.name`; parameters of scope "model" are lists.
    """

    name: str
    numel: int
    wide: bool
    copied: bool
    parameters: Mapping[str, Any]
    shape: tuple[int, ...] = ()


def row_length(work: Work) -> int:
    """Return the length of a row: the last dimension, or all of a vector."""
    return work.shape[-1] if len(work.shape) > 1 else work.numel


@dataclass(frozen=True)
class TensorStatistics:
    """What was collected from data of one tensor.

    models: of each model, in their order; all None where there are none of this tensor. base: of
    the base, or None. transposed: the weight is [in, out]. labels: what messages call them, that of
    the base first where it has any.
    """

    models: Sequence[Flat | None]
    base: Flat | None
    transposed: bool
    labels: Sequence[str]


class Source(Protocol):
    """Gives the inputs of a tensor: 1-D, contiguous, in their own dtypes, not to be written to."""

    @property
    def labels(self) -> Sequence[str]:
        """What messages call the inputs: the base first, where there is one, then the models."""
        ...

    def describe(self, name: str) -> str:
        """Return what messages call a tensor."""
        ...

    def nbytes(self, name: str) -> int:
        """Return the bytes that loading a tensor reads, of all inputs together."""
        ...

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        """Return (base or None, models)."""
        ...

    def statistics(self, name: str) -> TensorStatistics:
        """Return what was collected of a tensor, for methods that need it."""
        ...

    def announce(self, names: Sequence[str]) -> None:
        """Tell the order in which tensors are about to be loaded, so that they can be read
        ahead."""
        ...

    def can_hold(self, nbytes: int) -> bool:
        """Say whether so many bytes, once read, will still be in memory for the next pass."""
        ...

    def release(self, name: str) -> None:
        """Tell that a tensor is not needed for now."""
        ...


class Sink(Protocol):
    """Takes results. Tensors come in the order of the works given to the engine."""

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        """Yield (first element, writable run of elements); each is filled before the next is asked
        for."""
        ...

    def restart(self) -> None:
        """Begin again from the first tensor."""
        ...


class Progress(Protocol):
    """Hears how far the work is."""

    def phase(self, name: str, total_bytes: int) -> None:
        """A phase begins that will read so many bytes."""
        ...

    def advance(self, nbytes: int) -> None:
        """So many bytes of the phase have been read."""
        ...


class NoProgress:
    """A Progress that tells nobody."""

    def phase(self, name: str, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


no_progress: Progress = NoProgress()


def slices(numel: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of stretches of at most `most` elements."""
    for start in range(0, numel, most):
        yield start, min(start + most, numel)
