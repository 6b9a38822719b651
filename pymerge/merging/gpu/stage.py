"""Takes calls on host memory to a device and back, tile by tile.

Inputs go through a ring of page-locked chunks into tiles of device memory, on a stream of their
own, while kernels work on the tile before. What an op counts stays on the device until somebody
asks. Memory on either side is what `DeviceSizes` says, whatever the size of a tensor and the number
of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.dtypes import torch_dtype
from pymerge.engine.work import slices
from pymerge.memory import CHUNKS, TILES, DeviceSizes
from pymerge.merging.gpu.device import COMPUTE, IN, Device, OutOfDeviceMemory
from pymerge.ops import call as _calls
from pymerge.ops.array import Array, as_array
from pymerge.ops.backends import BACKENDS
from pymerge.ops.constants import HOT_CHUNK, SCORE_ALIGNMENT, SUM_CHUNK
from pymerge.ops.runner import Runner

if TYPE_CHECKING:
    import torch

__all__ = ["Stage"]

_ALIGNED = 256  # bytes at whose multiples tensors begin in a tile

# Arguments that are as long as a tensor, by the names they have in every op.
_FLATS = ("out", "base", "model", "models")
# Those that an op writes or adds to.
_WRITTEN = ("out", "stats", "counts", "hot_chunks", "partials", "scores", "table")


class Stage(Runner):
    """Runs ops on a device, whether their tensors are in host memory or there already."""

    def __init__(self, device: Device, sizes: DeviceSizes, backend: str = "auto") -> None:
        super().__init__(backend, device.name)
        self.memory = device
        self.sizes = sizes
        self.room = sizes.resident_bytes  # what tensors that stay may still take
        self._ring = _Ring(device, sizes.buffer_bytes)
        self._tiles = [_Tile(device, sizes.tile_bytes) for _ in range(TILES)]
        self._next = 0

    def backend_for(self, op: str) -> str:
        if op not in self._chosen:
            here = self.memory.backend_for(op, self.backend, self._refused.get(op, ()))
            # What has no kernels on the device is computed where the files are.
            cpu = "cpu" if BACKENDS["cpu"].reason() is None else "reference"
            self._chosen[op] = here or f"{cpu} on the host"
        return self._chosen[op]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.memory.zeros(shape, dtype)

    def slots(self) -> int:
        return int(BACKENDS[self.backend_for("magnitude_histogram_").partition(" ")[0]].slots())

    def call(self, op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Run an op; tensors of the device may be written after this returns, arrays are now."""
        named = dict(_signature(op).bind(*arguments, **keywords).arguments)
        self.ran[op] = self.backend_for(op)
        try:
            (self._on_host if " " in self.ran[op] else self._on_device)(op, named)
        except ValueError as error:
            self._take_another(op, error)
            self.call(op, arguments, keywords)

    def _on_device(self, op: str, named: dict[str, Any]) -> None:
        after: list[Callable[[], None]] = []
        for name, value in named.items():
            if isinstance(value, np.ndarray):
                named[name] = self.memory.put(value)
                if _writes(op, name):
                    after.append(lambda to=value, found=named[name]: self._fetch(to, found))
            elif name in ("ranks", "weights", "divergences") and hasattr(value, "contiguous"):
                named[name] = value.contiguous()  # a part of the rows of another piece
        if isinstance(out := named.get("out"), Array):
            named["out"] = self._empty_like(out)
            after.append(lambda: self._bring(out, named["out"]))
        numel = _numel(named)
        for start, stop in slices(numel, self._step(op, named, numel)):
            self._tile(op, named, start, stop, numel)
        for step in after:
            step()

    def keep(self, arrays: Sequence[Array]) -> list[torch.Tensor] | None:
        """Return copies on the device, or None if there is no room; whoever lets go of them adds
        what they took to `room` again."""
        total = _room(arrays)
        if total > self.room:
            return None
        try:
            block = self.memory.empty(total)
        except OutOfDeviceMemory:
            self.room = 0  # somebody else took it
            return None
        self.room -= total
        self.memory.wait(IN, self.memory.record(COMPUTE))
        return self._send(block, arrays)

    # ------------------------------------------------------------------ tiles

    def _step(self, op: str, named: Mapping[str, Any], numel: int) -> int:
        """Return how many elements a tile has."""
        hosted = _hosted(named)
        each = sum(flat.nbytes // max(flat.numel(), 1) for flat in hosted.values())
        if numel == 0 or each == 0:
            return max(numel, 1)
        # Whole chunks of what is counted by chunks, whole rows of what has rows.
        unit = named.get("columns") or HOT_CHUNK
        if op == "magnitude_equal_counts_" and HOT_CHUNK % named["chunk"]:
            unit = named["chunk"]
        most = (self.sizes.tile_bytes - _ALIGNED * len(hosted)) // each
        # One unit at least, for which a tile is made that is larger than the others.
        return numel if numel <= most else max(most // unit, 1) * unit

    def _tile(self, op: str, named: Mapping[str, Any], start: int, stop: int, numel: int) -> None:
        """Run an op on elements [start, stop) of its tensors."""
        part = dict(named)
        for name in _FLATS:
            if part.get(name) is not None:
                part[name] = _each(lambda flat: flat[start:stop], part[name])
        tables: list[_Table] = []
        if stop - start < numel:
            if "start" in part:
                part["start"] += start
            for name, value in named.items():
                width = _width(op, name, named)
                if width is not None and value is not None:
                    tables.append(_Table(name, value, width, start, stop, _writes(op, name)))
        hosted = _hosted(part)
        tile = self._upload(list(hosted.values())) if hosted else None
        if tile is not None:
            there = dict(zip(hosted, tile.tensors, strict=True))
            for name in _FLATS:
                if part.get(name) is not None:
                    part[name] = _each(
                        lambda flat: there[_key(flat)] if isinstance(flat, Array) else flat,
                        part[name],
                    )

        def compute() -> None:
            for table in tables:
                part[table.name] = table.take()
            _torch_op(op)(**part, backend=self.ran[op])
            for table in tables:
                table.put(part[table.name])

        self.memory.launch(compute, list(_tensors(part)))
        if tile is not None:
            tile.done = self.memory.record(COMPUTE)

    def _upload(self, arrays: Sequence[Array]) -> _Tile:
        """Return a tile that holds these arrays; COMPUTE waits for it."""
        tile = self._tiles[self._next]
        self._next = (self._next + 1) % len(self._tiles)
        needed = _room(arrays)
        if needed > tile.buffer.numel():
            tile = _Tile(self.memory, needed)
        self.memory.wait(IN, tile.done)
        tile.tensors = self._send(tile.buffer, arrays)
        return tile

    def _send(self, to: torch.Tensor, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """Copy arrays into device memory that IN may write to; return them there."""
        tensors, at = [], 0
        for array in arrays:
            place = to[at : at + array.nbytes]
            self._ring.send(place, array)
            tensors.append(place.view(torch_dtype(array.code)))
            at += _padded(array.nbytes)
        self.memory.wait(COMPUTE, self.memory.record(IN))
        return tensors

    # ------------------------------------------------------------------ results in host memory

    def _empty_like(self, array: Array) -> torch.Tensor:
        return self.memory.empty(array.nbytes).view(torch_dtype(array.code))

    def _bring(self, to: Array, tensor: torch.Tensor) -> None:
        to.tensor().copy_(self.memory.get(tensor))

    def _fetch(self, to: np.ndarray, tensor: torch.Tensor) -> None:
        to[...] = self.memory.get(tensor).numpy()

    def _on_host(self, op: str, named: dict[str, Any]) -> None:
        """Run an op on the processor, with copies of what is on the device."""
        after: list[Callable[[], None]] = []

        def down(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [down(name, one) for one in value]
            if not hasattr(value, "is_cuda"):
                return value
            copy = self.memory.get(value)
            if _writes(op, name):
                after.append(lambda: self._replace(value, copy))
            return as_array(copy) if name in _FLATS else copy.numpy()

        backend = self.ran[op].partition(" ")[0]
        _calls.call(op, **{n: down(n, v) for n, v in named.items()}, backend=backend)
        for step in after:
            step()

    def _replace(self, to: torch.Tensor, values: torch.Tensor) -> None:
        new = self.memory.put(values)
        self.memory.launch(lambda: to.copy_(new), [to, new])


class _Tile:
    """Device memory for the inputs of one call, and when COMPUTE is done with it."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.buffer = device.empty(nbytes)
        self.done = device.record(COMPUTE)
        self.tensors: list[torch.Tensor] = []


class _Ring:
    """Page-locked chunks, filled by the host and emptied by IN, one after the other."""

    def __init__(self, device: Device, chunk_bytes: int) -> None:
        self._device = device
        self._chunks = [device.pinned(chunk_bytes) for _ in range(CHUNKS)]
        self._emptied: list[Any] = [None] * CHUNKS
        self._at = 0
        self._used = 0

    def send(self, to: torch.Tensor, array: Array) -> None:
        """Copy an array to the device: the host reads it now, IN writes later."""
        if array.nbytes == 0:
            return
        source, done = array.bytes().tensor(), 0
        while done < array.nbytes:
            chunk = self._chunks[self._at]
            if self._used >= chunk.numel():
                self._turn()
                continue
            count = min(chunk.numel() - self._used, array.nbytes - done)
            place = chunk[self._used : self._used + count]
            self._device.fill(place, source[done : done + count])
            self._device.copy(to[done : done + count], place, IN)
            self._used += _padded(count)
            done += count

    def _turn(self) -> None:
        self._emptied[self._at] = self._device.record(IN)
        self._at, self._used = (self._at + 1) % len(self._chunks), 0
        if self._emptied[self._at] is not None:
            self._device.finish(self._emptied[self._at])


class _Table:
    """The columns of a table that belong to a tile, as a table of their own."""

    def __init__(
        self, name: str, whole: torch.Tensor, width: int, start: int, stop: int, written: bool
    ) -> None:
        self.name = name
        self._columns = whole[..., start // width : -(-stop // width)]
        self._written = written
        count = self._columns.shape[-1]
        # Rows as long as the tensors have room for more (`SCORE_ALIGNMENT`).
        self._room = -(-count // SCORE_ALIGNMENT) * SCORE_ALIGNMENT if width == 1 else count

    def take(self) -> torch.Tensor:
        own = self._columns.new_zeros((*self._columns.shape[:-1], self._room))
        if not self._written or self.name == "table":  # which is read as well
            own[..., : self._columns.shape[-1]] = self._columns
        return own

    def put(self, own: torch.Tensor) -> None:
        if self._written:
            self._columns.copy_(own[..., : self._columns.shape[-1]])


def _width(op: str, name: str, named: Mapping[str, Any]) -> int | None:
    """Return how many elements a column of a table is for; None for what is no such table."""
    if name == "hot_chunks":
        return HOT_CHUNK
    if name in ("partials", "table"):
        return named.get("columns") or SUM_CHUNK
    if name in ("scores", "ranks"):
        return 1
    if op == "magnitude_equal_counts_" and name == "counts":
        return named["chunk"]
    if (op, name) in (("row_weighted_sum_", "weights"), ("row_importance_", "divergences")):
        return named["columns"]
    return None


def _writes(op: str, name: str) -> bool:
    return name in _WRITTEN or (op, name) == ("row_ranks_", "ranks")


@cache
def _signature(op: str) -> inspect.Signature:
    return inspect.signature(getattr(_calls, op))


def _torch_op(op: str) -> Any:
    import torch

    from pymerge.ops import contract as contract  # declares torch.ops.pymerge

    return getattr(torch.ops.pymerge, op)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    return [function(one) for one in value] if isinstance(value, (list, tuple)) else function(value)


def _flats(named: Mapping[str, Any]) -> Iterator[Any]:
    for name in _FLATS:
        value = named.get(name)
        if value is not None:
            yield from value if isinstance(value, (list, tuple)) else [value]


def _key(array: Array) -> tuple[int, str, int]:
    return array.data_ptr(), array.code, array.numel()


def _hosted(named: Mapping[str, Any]) -> dict[tuple[int, str, int], Array]:
    """Return the arrays of a call; one that it has twice is there once."""
    return {_key(flat): flat for flat in _flats(named) if isinstance(flat, Array)}


def _tensors(named: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in named.values():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if hasattr(one, "is_cuda"):
                yield one


def _numel(named: Mapping[str, Any]) -> int:
    return int(next(_flats(named)).numel())


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _room(arrays: Sequence[Array]) -> int:
    return sum(_padded(array.nbytes) for array in arrays)
