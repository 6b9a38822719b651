"""What the engine works on: output tensors, the sources of their inputs, the sinks of results."""

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
    """Statistics of one tensor, collected from data.

    models: of each model, in their order; all None if there are none for this tensor. base: of the
    base, or None. transposed: the weight is [in, out]. labels: their names in messages, that of the
    base first if it has statistics.
    """

    models: Sequence[Flat | None]
    base: Flat | None
    transposed: bool
    labels: Sequence[str]


class Source(Protocol):
    """Provides the inputs of a tensor: 1-D, contiguous, in their own dtypes, read-only."""

    @property
    def labels(self) -> Sequence[str]:
        """Return the names of the inputs in messages: the base first, if any, then the models."""
        ...

    def describe(self, name: str) -> str:
        """Return the name of a tensor in messages."""
        ...

    def nbytes(self, name: str) -> int:
        """Return the bytes that loading a tensor reads, over all inputs."""
        ...

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        """Return (base or None, models)."""
        ...

    def statistics(self, name: str) -> TensorStatistics:
        """Return the statistics of a tensor, for methods that need them."""
        ...

    def announce(self, names: Sequence[str]) -> None:
        """Announce the order in which tensors are about to be loaded, so that they can be read
        ahead."""
        ...

    def can_hold(self, nbytes: int) -> bool:
        """Return whether this many bytes, once read, will still be in memory for the next pass."""
        ...

    def release(self, name: str) -> None:
        """Declare that a tensor is not needed for now."""
        ...


class Sink(Protocol):
    """Receives results. Tensors come in the order of the works given to the engine."""

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        """Yield (first element, writable run of elements); each is filled before the next is
        requested."""
        ...

    def restart(self) -> None:
        """Start again from the first tensor."""
        ...


class Progress(Protocol):
    """Is notified of how far the work has progressed."""

    def phase(self, name: str, total_bytes: int) -> None:
        """A phase begins that will read this many bytes."""
        ...

    def advance(self, nbytes: int) -> None:
        """This many bytes of the phase have been read."""
        ...


class NoProgress:
    """A Progress that ignores all notifications."""

    def phase(self, name: str, total_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


no_progress: Progress = NoProgress()


def slices(numel: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of stretches of at most `most` elements."""
    for start in range(0, numel, most):
        yield start, min(start + most, numel)
