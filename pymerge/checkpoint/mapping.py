"""Read-only memory maps of weight files, and zero-copy arrays over them.

The maps are created by the C library and not by Python's `mmap`: that module keeps a file
descriptor for each map (a thousand shards would exhaust the usual limit), and gives torch a
read-only buffer, about which torch warns. A map lives as long as any array or tensor over it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from pathlib import Path

from pymerge.checkpoint.header import FileIdentity, TensorInfo
from pymerge.errors import CheckpointError
from pymerge.ops.array import Array

__all__ = ["MappedFiles", "advise"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


def advise(address: int, nbytes: int, advice: str) -> None:
    """Call madvise() for the pages that contain some bytes; failures do not matter.

    Args:
        address: the first byte.
        nbytes: how many.
        advice: the name of a MADV constant, e.g. "MADV_WILLNEED"; ignored if it does not exist.
    """
    value = getattr(mmap, advice, None)
    if nbytes <= 0 or value is None:
        return
    begin = address - address % mmap.PAGESIZE
    _libc.madvise(begin, address + nbytes - begin, value)


class MappedFiles:
    """The maps of a checkpoint's safetensors files, each created on first use."""

    def __init__(self, label: str, identities: dict[Path, FileIdentity]) -> None:
        self._label = label
        self._identities = identities
        self._lock = threading.Lock()
        # One ctypes array over each map. Arrays keep a reference to it; its finalizer unmaps.
        self._maps: dict[Path, ctypes.Array[ctypes.c_char]] = {}

    def array(self, info: TensorInfo) -> Array:
        """Return a tensor as an array over the map."""
        if info.nbytes == 0:
            return Array(None, 0, info.dtype, 0)
        mapped = self._map(info.file)
        return Array(mapped, ctypes.addressof(mapped) + info.offset, info.dtype, info.numel)

    def will_need(self, info: TensorInfo, start_byte: int, stop_byte: int) -> None:
        """Start reading bytes of a tensor into the page cache."""
        if stop_byte > start_byte:
            self._advise(info, start_byte, stop_byte, "MADV_WILLNEED")

    def release(self, info: TensorInfo, start_byte: int, stop_byte: int) -> None:
        """Give back the page-table entries of bytes of a tensor, if its file is mapped.

        Pages shared with a neighbour go too, which is safe: they are read from the file again.
        """
        if stop_byte > start_byte and info.file in self._maps:
            self._advise(info, start_byte, stop_byte, "MADV_DONTNEED")

    def close(self) -> None:
        """Release the maps; each is unmapped once no tensor uses it."""
        with self._lock:
            self._maps.clear()

    def _advise(self, info: TensorInfo, start_byte: int, stop_byte: int, advice: str) -> None:
        address = ctypes.addressof(self._map(info.file)) + info.offset
        advise(address + start_byte, stop_byte - start_byte, advice)

    def _map(self, path: Path) -> ctypes.Array[ctypes.c_char]:
        with self._lock:
            found = self._maps.get(path)
            if found is None:
                found = self._maps[path] = _map_file(path, self._identities[path], self._label)
            return found


def _map_file(path: Path, identity: FileIdentity, label: str) -> ctypes.Array[ctypes.c_char]:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{label}: {path.name}: cannot be read: {error.strerror}") from error
    try:
        # A file that shrank would raise SIGBUS in the middle of a kernel.
        if FileIdentity.of(fd) != identity:
            raise CheckpointError(f"{label}: {path.name}: changed since its header was read")
        address = _libc.mmap(None, identity.size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise CheckpointError(f"{label}: {path.name}: cannot be memory-mapped: {reason}")
    finally:
        os.close(fd)
    array = (ctypes.c_char * identity.size).from_address(address)
    # Not at exit: the end of the process unmaps, and until then other threads may still read.
    weakref.finalize(array, _libc.munmap, address, identity.size).atexit = False
    return array
