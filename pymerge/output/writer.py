"""Writes the shards of a layout from a ring of slots, while the next slot is being filled.

The caller fills slots through `ShardWriter.pieces`; a background thread writes the full ones. The
bytes of a file do not depend on the number and size of slots.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pymerge.dtypes import DTYPES
from pymerge.errors import MergeError
from pymerge.ops.array import Array
from pymerge.output.files import ALIGNMENT, OutputFile, preallocate, write_error
from pymerge.output.layout import Layout, PlacedTensor, Shard

__all__ = ["ShardWriter"]


@dataclass(frozen=True)
class _Job:
    """`nbytes` of a slot for `path` at `offset`; `last` closes the file afterwards."""

    path: Path
    slot: int
    nbytes: int
    offset: int
    last: bool


class ShardWriter:
    """Writes all tensors of a layout, in its order, within `slots * slot_bytes` of memory.

    Fill every tensor through `pieces`, then call `finish`; call `abort` instead if something goes
    wrong. As a context manager it aborts unless it was finished.

    Attributes:
        bytes_written: so far, to all files, including bytes that a `restart` made void.
        seconds_blocked: how long the caller has waited for the disk.
    """

    def __init__(
        self, directory: Path, layout: Layout, *, slot_bytes: int = 16 << 20, slots: int = 4
    ) -> None:
        """Create the files at their full size.

        Args:
            directory: an existing directory to write into.
            layout: from `plan_layout`.
            slot_bytes: a positive multiple of 4096.
            slots: at least 1; with 1, filling and writing take turns.

        Raises:
            MergeError: the files cannot be created, or the disk does not have enough space.
        """
        if slot_bytes < ALIGNMENT or slot_bytes % ALIGNMENT or slots < 1:
            raise ValueError(
                f"ShardWriter: expected slot_bytes a positive multiple of {ALIGNMENT} and slots of "
                f"at least 1, got slot_bytes={slot_bytes}, slots={slots}"
            )
        self.bytes_written = 0
        self.seconds_blocked = 0.0
        self._directory = directory
        self._layout = layout
        self._slot_bytes = slot_bytes
        self._needed = sum(shard.nbytes for shard in layout.shards)
        self._preallocate()

        self._memory = mmap.mmap(-1, slots * slot_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

        # The producer's state. `_epoch` distinguishes generators from before and after a restart.
        self._sequence = [(shard, tensor) for shard in layout.shards for tensor in shard.tensors]
        self._epoch = 0
        self._next = 0
        self._unfilled: str | None = None
        self._slot: int | None = None
        self._used = 0
        self._position = 0
        self._ended = False

        # Shared with the thread, under the condition.
        self._changed = threading.Condition()
        self._free = list(range(slots))
        self._jobs: deque[_Job] = deque()
        self._busy = False
        self._stopping = False
        self._discarding = False
        self._error: MergeError | None = None
        self._thread = threading.Thread(target=self._run, name="pymerge-writer", daemon=True)
        self._thread.start()

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """Yield the memory of a tensor piece by piece, to be filled with its output elements.

        A piece must be filled before the next one is requested, and not be touched after that.

        Args:
            name: the next tensor of `layout.order`.

        Yields:
            (first element, writable array of the output dtype); nothing for an empty tensor.

        Raises:
            MergeError: an earlier piece could not be written.
        """
        self._check()
        if self._unfilled is not None:
            raise RuntimeError(f"ShardWriter: {self._unfilled!r} has not been filled to its end")
        if self._next == len(self._sequence):
            raise RuntimeError(f"ShardWriter: got {name!r} after the last tensor of the layout")
        shard, tensor = self._sequence[self._next]
        if name != tensor.name:
            raise RuntimeError(f"ShardWriter: expected {tensor.name!r} next, got {name!r}")
        if tensor is shard.tensors[0]:
            self._put(shard, shard.header)
        if tensor.nbytes == 0:
            self._end_tensor(shard, tensor)
            return iter(())
        self._unfilled = name
        return self._fill(shard, tensor)

    def restart(self) -> None:
        """Start again from the first tensor; everything is written anew.

        Raises:
            MergeError: an earlier piece could not be written.
        """
        self._check()
        self._wait(lambda: not self._jobs and not self._busy)
        self._check()
        self._epoch += 1
        self._next, self._used, self._position, self._unfilled = 0, 0, 0, None

    def finish(self) -> None:
        """Write the rest, wait until it is on the disk, and close the files.

        Raises:
            MergeError: naming the file and the reason.
        """
        self._check()
        if self._unfilled is not None or self._next != len(self._sequence):
            missing = self._unfilled or self._sequence[self._next][1].name
            raise RuntimeError(f"ShardWriter: {missing!r} has not been filled to its end")
        if not self._sequence:  # a file without tensors still has a header
            shard = self._layout.shards[0]
            self._put(shard, shard.header)
            self._submit(shard, last=True)
        self._wait(lambda: not self._jobs and not self._busy)
        self._stop(discard=False)
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Stop writing and close the files, which stay incomplete; may be called at any time."""
        self._stop(discard=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    # ------------------------------------------------------------------ the caller's side

    def _preallocate(self) -> None:
        created: list[Path] = []
        for shard in self._layout.shards:
            path = self._directory / shard.filename
            created.append(path)
            try:
                preallocate(path, shard.nbytes)
            except OSError as error:
                for other in created:  # free the space first, so that the message counts it
                    with contextlib.suppress(OSError):
                        other.unlink()
                raise write_error(path, error, self._needed) from error

    def _fill(self, shard: Shard, tensor: PlacedTensor) -> Iterator[tuple[int, Array]]:
        itemsize = DTYPES[tensor.dtype]
        numel = tensor.nbytes // itemsize
        epoch = self._epoch
        start = 0
        while start < numel:
            slot = self._acquire(shard)
            # Elements never straddle slots: offsets are multiples of the size of an element.
            count = min(numel - start, (self._slot_bytes - self._used) // itemsize)
            offset = slot * self._slot_bytes + self._used
            yield start, Array(self._memory, self._address + offset, tensor.dtype, count)
            if self._epoch != epoch or self._ended:
                raise RuntimeError(
                    f"ShardWriter: {tensor.name!r} was begun before a restart or end"
                )
            self._used += count * itemsize
            start += count
        self._unfilled = None
        self._end_tensor(shard, tensor)

    def _end_tensor(self, shard: Shard, tensor: PlacedTensor) -> None:
        self._next += 1
        if tensor is shard.tensors[-1]:
            self._submit(shard, last=True)

    def _put(self, shard: Shard, data: bytes) -> None:
        done = 0
        while done < len(data):
            slot = self._acquire(shard)
            count = min(len(data) - done, self._slot_bytes - self._used)
            begin = slot * self._slot_bytes + self._used
            self._view[begin : begin + count] = data[done : done + count]
            self._used += count
            done += count

    def _acquire(self, shard: Shard) -> int:
        """Return a slot with room, handing the current one to the thread if it is full."""
        if self._slot is not None and self._used == self._slot_bytes:
            self._submit(shard, last=False)
        if self._slot is None:
            self._wait(lambda: bool(self._free))
            self._check()
            with self._changed:
                self._slot = self._free.pop()
        return self._slot

    def _submit(self, shard: Shard, *, last: bool) -> None:
        assert self._slot is not None  # it contains at least a header
        path = self._directory / shard.filename
        job = _Job(path, self._slot, self._used, self._position, last)
        self._position = 0 if last else self._position + self._used
        self._slot, self._used = None, 0
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` or a failure, and count the time."""
        with self._changed:
            if ready() or self._error is not None:
                return
            began = time.monotonic()
            try:
                self._changed.wait_for(lambda: ready() or self._error is not None)
            finally:
                self.seconds_blocked += time.monotonic() - began

    def _check(self) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
        if self._ended:
            raise RuntimeError("ShardWriter: already finished or aborted")

    def _stop(self, *, discard: bool) -> None:
        with self._changed:
            self._ended = True
            self._stopping = True
            self._discarding = self._discarding or discard
            self._changed.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------ the thread's side

    def _run(self) -> None:
        file: OutputFile | None = None
        path: Path | None = None
        try:
            while (job := self._take()) is not None:
                begin = job.slot * self._slot_bytes
                if file is not None and job.path != path:  # a restart left a file half written
                    file.close()
                    file = None
                path = job.path
                if file is None:
                    file = OutputFile(path)
                file.write(self._view[begin : begin + job.nbytes], job.offset)
                if job.last:
                    file.sync()
                    file.close()
                    file = None
                self._give_back(job)
        except BaseException as error:
            if isinstance(error, OSError) and path is not None:
                failure = write_error(path, error, self._needed)
            else:
                failure = MergeError(f"{path}: cannot be written: {error!r}")
            failure.__cause__ = error
            with self._changed:
                self._error = failure
                self._jobs.clear()
                self._busy = False
                self._changed.notify_all()
        finally:
            if file is not None:
                with contextlib.suppress(OSError):  # the relevant failure is already recorded
                    file.close()

    def _take(self) -> _Job | None:
        """Return the next job, or None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopping)
            if self._discarding or not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()

    def _give_back(self, job: _Job) -> None:
        with self._changed:
            self.bytes_written += job.nbytes
            self._free.append(job.slot)
            self._busy = False
            self._changed.notify_all()
