"""The CPU as a `pymerge.merging.gpu.device.Device`, for tests without a GPU.

Everything runs at once, and the required order is checked: each access to device memory or to
page-locked memory is made by the host or by a stream, and must be ordered after every access by
another actor to the same bytes. Events and waits define the order; they are vector clocks. A
missing wait is therefore found however fast or slow a real device is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pymerge.merging.gpu.device import COMPUTE, IN, OUT, OutOfDeviceMemory

HOST = "host"
Clock = dict[str, int]


class Race(AssertionError):
    """Two accesses to the same memory without a defined order."""


class Event(Clock):
    """The work that a stream had done, and knew of, when the event was recorded."""

    stream: str


@dataclass
class Access:
    begin: int
    end: int
    actor: str
    time: int


@dataclass
class Block:
    """Memory that was allocated; it is kept, so that its address is not used again."""

    storage: Any
    pinned: bool
    accesses: list[Access] = field(default_factory=list)


class HostDevice:
    """Runs ops on a backend that accepts CPU tensors.

    Args:
        backend: runs all ops except those that it `lacks`.
        largest: size in bytes of the largest block that can be allocated.
        failing: the numbers of the requests for memory that fail.
        memory: free bytes.
    """

    name = "cuda:0"
    title = "cuda:0 (the processor)"

    def __init__(
        self,
        backend: str = "cpu",
        *,
        lacks: Sequence[str] = (),
        largest: int = 1 << 40,
        failing: Sequence[int] = (),
        memory: int = 1 << 30,
    ) -> None:
        self.backend = backend
        self.lacks = set(lacks)
        self.largest = largest
        self.failing = set(failing)
        self.memory = memory
        self.requests = 0
        self.most = 0  # the size of the largest block allocated
        self.waited = 0  # how often the host waited
        self.launches = 0
        self.copied = {IN: 0, OUT: 0}
        self._clocks: dict[str, Clock] = {
            actor: dict.fromkeys((HOST, IN, COMPUTE, OUT), 0) for actor in (HOST, IN, COMPUTE, OUT)
        }
        self._blocks: dict[int, Block] = {}

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def missing(self) -> dict[str, str | None]:
        return {self.backend: None}

    def backend_for(self, op: str, wanted: str, without: Collection[str] = ()) -> str | None:
        return None if op in self.lacks or self.backend in without else self.backend

    def free(self) -> int:
        return self.memory

    def peak(self) -> int:
        return self.most

    # ------------------------------------------------------------------ memory

    def empty(self, nbytes: int) -> torch.Tensor:
        self.requests += 1
        if nbytes > self.largest or self.requests in self.failing:
            raise OutOfDeviceMemory(f"{nbytes} bytes are too many")
        self.most = max(self.most, nbytes)
        return self._made(torch.empty(nbytes, dtype=torch.uint8))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return self._made(torch.zeros(shape, dtype=getattr(torch, dtype)))

    def put(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        return self._made(tensor.clone(memory_format=torch.contiguous_format))

    def _made(self, tensor: torch.Tensor) -> torch.Tensor:
        # The allocator may return memory that COMPUTE still uses for something else.
        self._touch(tensor, COMPUTE)
        return tensor

    def pinned(self, nbytes: int) -> torch.Tensor:
        tensor = torch.empty(nbytes, dtype=torch.uint8)
        storage = tensor.untyped_storage()
        self._blocks[storage.data_ptr()] = Block(storage, pinned=True)
        return tensor

    def fill(self, to: torch.Tensor, source: torch.Tensor) -> None:
        for tensor in (to, source):
            block = self._blocks.get(tensor.untyped_storage().data_ptr())
            if block is not None:
                assert block.pinned, "the host cannot touch memory of the device"
                self._touch(tensor, HOST)
        to.copy_(source)

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        self._touch(tensor, COMPUTE)
        self._merge(HOST, self._clocks[COMPUTE])
        self.waited += 1
        return tensor.clone()

    # ------------------------------------------------------------------ streams

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: str) -> None:
        assert to.nbytes == source.nbytes
        here, there = (source, to) if stream == IN else (to, source)
        assert self._blocks[here.untyped_storage().data_ptr()].pinned
        assert not self._blocks[there.untyped_storage().data_ptr()].pinned
        self._touch(to, stream)
        self._touch(source, stream)
        self.copied[stream] += to.nbytes
        to.copy_(source)

    def launch(self, function: Callable[[], Any], tensors: Sequence[torch.Tensor]) -> Any:
        self.launches += 1
        for tensor in tensors:
            self._touch(tensor, COMPUTE)
        return function()

    def record(self, stream: str) -> Event:
        self._merge(stream, self._clocks[HOST])
        event = Event(self._clocks[stream])
        event.stream = stream
        return event

    def wait(self, stream: str, event: Clock) -> None:
        self._merge(stream, event)

    def finish(self, event: Clock) -> None:
        self.waited += 1
        self._merge(HOST, event)

    # ------------------------------------------------------------------ order

    def _merge(self, actor: str, event: Clock) -> None:
        own = self._clocks[actor]
        for other, time in event.items():
            own[other] = max(own[other], time)

    def _touch(self, tensor: torch.Tensor, actor: str) -> None:
        """Record an access, which must come after all others to the same bytes."""
        if tensor.numel() == 0:
            return
        if actor != HOST:  # the host submits work to a stream after its own earlier accesses
            self._merge(actor, self._clocks[HOST])
        storage = tensor.untyped_storage()
        # Memory that torch itself allocated belongs to COMPUTE.
        block = self._blocks.setdefault(storage.data_ptr(), Block(storage, pinned=False))
        begin = tensor.data_ptr() - storage.data_ptr()
        last = sum(
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        end = begin + (last + 1) * tensor.element_size()
        clock = self._clocks[actor]
        clock[actor] += 1
        kept = []
        for old in block.accesses:
            overlaps = old.begin < end and begin < old.end
            if overlaps and clock[old.actor] < old.time:
                raise Race(
                    f"{actor} touches bytes [{begin}, {end}), and nothing says that {old.actor} is "
                    f"done with [{old.begin}, {old.end})"
                )
            if not (begin <= old.begin and old.end <= end):
                kept.append(old)
        block.accesses = [*kept, Access(begin, end, actor, clock[actor])]
