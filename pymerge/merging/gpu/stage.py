"""Takes calls on host memory to a device and back, tile by tile.

Inputs go through a ring of page-locked chunks into tiles of device memory, on a stream of their
own, while kernels process the previous tile. The counts of an op stay on the device until they are
requested. `DeviceSizes` fixes the memory on both sides, whatever the size of a tensor and the
number of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.dtypes import torch_dtype
from pymerge.engine.work import slices
from pymerge.memory import CHUNKS, TILES, DeviceSizes
from pymerge.merging.gpu.device import COMPUTE, IN, Device, OutOfDeviceMemory
from pymerge.ops.array import Array, as_array
from pymerge.ops.backends import BACKENDS
from pymerge.ops.call import call
from pymerge.ops.constants import HOT_CHUNK, SCORE_ALIGNMENT
from pymerge.ops.runner import Runner
from pymerge.ops.spec import COLUMNS, OF_A_MODEL, START, OpSpec, Table
from pymerge.ops.specs import OPS

if TYPE_CHECKING:
    import torch

__all__ = ["Stage"]

_ALIGNED = 256  # tensors begin at multiples of this many bytes in a tile


class Stage(Runner):
    """Runs ops on a device, whether their tensors are in host memory or already on the device."""

    def __init__(self, device: Device, sizes: DeviceSizes, backend: str = "auto") -> None:
        super().__init__(backend, device.name)
        self.memory = device
        self.sizes = sizes
        self.room = sizes.resident_bytes  # bytes left for tensors that stay
        self._ring = _Ring(device, sizes.buffer_bytes)
        self._tiles = [_Tile(device, sizes.tile_bytes) for _ in range(TILES)]
        self._next = 0

    def backend_for(self, op: str) -> str:
        if op not in self._chosen:
            here = self.memory.backend_for(op, self.backend, self._refused.get(op, ()))
            # Ops without kernels for the device are computed on the host, where the files are.
            cpu = "cpu" if BACKENDS["cpu"].reason() is None else "reference"
            self._chosen[op] = here or f"{cpu} on the host"
        return self._chosen[op]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        return self.memory.zeros(shape, dtype)

    def slots(self) -> int:
        return int(BACKENDS[self.backend_for("magnitude_histogram_").partition(" ")[0]].slots())

    def call(self, op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Run an op; tensors of the device may be written after this returns, arrays are now."""
        spec = OPS[op]
        named = spec.bind(arguments, keywords)
        del named["backend"]
        self.ran[op] = self.backend_for(op)
        try:
            (self._on_host if " " in self.ran[op] else self._on_device)(spec, named)
        except ValueError as error:
            self._take_another(op, error)
            self.call(op, arguments, keywords)

    def _on_device(self, spec: OpSpec, named: dict[str, Any]) -> None:
        after: list[Callable[[], None]] = []
        for name, value in named.items():
            if isinstance(value, np.ndarray):
                named[name] = self.memory.put(value)
                if name in spec.written:
                    after.append(lambda to=value, found=named[name]: self._fetch(to, found))
            elif name in spec.tables and name not in spec.written and value is not None:
                named[name] = value.contiguous()  # a part of the rows of another piece
        if isinstance(out := named.get("out"), Array):
            named["out"] = self._empty_like(out)
            after.append(lambda: self._bring(out, named["out"]))
        numel = int(next(_flats(spec, named)).numel())
        for start, stop in slices(numel, self._step(spec, named, numel)):
            self._tile(spec, named, start, stop, numel)
        for step in after:
            step()

    def keep(self, arrays: Sequence[Array]) -> list[torch.Tensor] | None:
        """Return copies on the device, or None if there is no room; whoever releases them must
        add their size to `room` again."""
        total = _room(arrays)
        if total > self.room:
            return None
        try:
            block = self.memory.empty(total)
        except OutOfDeviceMemory:
            self.room = 0  # another process took it
            return None
        self.room -= total
        self.memory.wait(IN, self.memory.record(COMPUTE))
        return self._send(block, arrays)

    # ------------------------------------------------------------------ tiles

    def _step(self, spec: OpSpec, named: Mapping[str, Any], numel: int) -> int:
        """Return how many elements a tile has."""
        hosted = _hosted(spec, named)
        each = sum(flat.nbytes // max(flat.numel(), 1) for flat in hosted.values())
        if numel == 0 or each == 0 or spec.having(OF_A_MODEL) is not None:
            return max(numel, 1)
        # Whole columns of every table, whole rows of what has rows.
        columns = named[rows] if (rows := spec.having(COLUMNS)) is not None else 0
        unit = math.lcm(columns or 1, *(table.elements(named) for table in spec.tables.values()))
        if not columns and HOT_CHUNK % unit == 0:
            unit = HOT_CHUNK
        most = (self.sizes.tile_bytes - _ALIGNED * len(hosted)) // each
        # At least one unit, which may need a tile that is larger than the others.
        return numel if numel <= most else max(most // unit, 1) * unit

    def _tile(
        self, spec: OpSpec, named: Mapping[str, Any], start: int, stop: int, numel: int
    ) -> None:
        """Run an op on elements [start, stop) of its tensors."""
        part = dict(named)
        for name in spec.flats:
            if part[name] is not None:
                part[name] = _each(lambda flat: flat[start:stop], part[name])
        tables: list[_Part] = []
        if stop - start < numel:
            first = spec.having(START)
            if first is not None:
                part[first] += start
            for name, table in spec.tables.items():
                if named[name] is not None:
                    elements = table.elements(named)
                    whole, written = named[name], name in spec.written
                    tables.append(_Part(name, table, whole, elements, start, stop, written))
        hosted = _hosted(spec, part)
        tile = self._upload(list(hosted.values())) if hosted else None
        if tile is not None:
            there = dict(zip(hosted, tile.tensors, strict=True))
            for name in spec.flats:
                if part[name] is not None:
                    part[name] = _each(
                        lambda flat: there[_key(flat)] if isinstance(flat, Array) else flat,
                        part[name],
                    )

        def compute() -> None:
            for table in tables:
                part[table.name] = table.take()
            _torch_op(spec.name)(**part, backend=self.ran[spec.name])
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

    def _on_host(self, spec: OpSpec, named: dict[str, Any]) -> None:
        """Run an op on the processor, with copies of what is on the device."""
        after: list[Callable[[], None]] = []

        def down(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [down(name, one) for one in value]
            if not hasattr(value, "is_cuda"):
                return value
            copy = self.memory.get(value)
            if name in spec.written:
                after.append(lambda: self._replace(value, copy))
            return as_array(copy) if name in spec.flats else copy.numpy()

        backend = self.ran[spec.name].partition(" ")[0]
        call(spec.name, **{n: down(n, v) for n, v in named.items()}, backend=backend)
        for step in after:
            step()

    def _replace(self, to: torch.Tensor, values: torch.Tensor) -> None:
        new = self.memory.put(values)
        self.memory.launch(lambda: to.copy_(new), [to, new])


class _Tile:
    """Device memory for the inputs of one call, and the event after COMPUTE's last use of it."""

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


class _Part:
    """The columns of a table that belong to a tile, as a table of their own."""

    def __init__(
        self,
        name: str,
        table: Table,
        whole: torch.Tensor,
        elements: int,
        start: int,
        stop: int,
        written: bool,
    ) -> None:
        self.name = name
        self._columns = whole[..., start // elements : -(-stop // elements)]
        self._written, self._read = written, table.read or not written
        count = self._columns.shape[-1]
        # Rows as long as the tensors have room for more (`SCORE_ALIGNMENT`).
        self._room = -(-count // SCORE_ALIGNMENT) * SCORE_ALIGNMENT if elements == 1 else count

    def take(self) -> torch.Tensor:
        own = self._columns.new_zeros((*self._columns.shape[:-1], self._room))
        if self._read:
            own[..., : self._columns.shape[-1]] = self._columns
        return own

    def put(self, own: torch.Tensor) -> None:
        if self._written:
            self._columns.copy_(own[..., : self._columns.shape[-1]])


def _torch_op(op: str) -> Any:
    import torch

    from pymerge.ops import contract as contract  # declares torch.ops.pymerge

    return getattr(torch.ops.pymerge, op)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    return [function(one) for one in value] if isinstance(value, (list, tuple)) else function(value)


def _flats(spec: OpSpec, named: Mapping[str, Any]) -> Iterator[Any]:
    for name in spec.flats:
        value = named[name]
        if value is not None:
            yield from value if isinstance(value, (list, tuple)) else [value]


def _key(array: Array) -> tuple[int, str, int]:
    return array.data_ptr(), array.code, array.numel()


def _hosted(spec: OpSpec, named: Mapping[str, Any]) -> dict[tuple[int, str, int], Array]:
    """Return the arrays of a call; one that it has twice is there once."""
    return {_key(flat): flat for flat in _flats(spec, named) if isinstance(flat, Array)}


def _tensors(named: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in named.values():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if hasattr(one, "is_cuda"):
                yield one


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _room(arrays: Sequence[Array]) -> int:
    return sum(_padded(array.nbytes) for array in arrays)
