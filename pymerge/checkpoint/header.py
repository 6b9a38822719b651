"""A strict reader of safetensors headers that reports every problem of a file.

A file is an 8-byte little-endian length, that many bytes of JSON, and the data, in which the
tensors lie back to back. The safetensors library refuses the same damage, but stops at the first
problem and does not name the file.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.problems import Problems
from pymerge.dtypes import DTYPES, SUB_BYTE_DTYPES
from pymerge.errors import nearest
from pymerge.strict_json import is_text, parse_json

__all__ = ["FileIdentity", "Header", "TensorInfo", "read_header", "read_start"]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_BYTES = 2**63 - 1
_FIELDS = ("dtype", "shape", "data_offsets")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor; `offset` counts from the start of `file` (0 in pickled files)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.nbytes // DTYPES[self.dtype]


@dataclass(frozen=True)
class FileIdentity:
    """Shows whether a file on disk is still the one that was opened."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """Return the identity of an open file."""
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """A parsed header: the sound entries, and the names of all of them."""

    tensors: tuple[TensorInfo, ...]
    names: frozenset[str]
    metadata: dict[str, str]
    identity: FileIdentity


def read_start(path: Path, where: str, count: int, problems: Problems) -> tuple[bytes, int] | None:
    """Return the first bytes of a regular file and its size, or None with the problem recorded."""
    try:
        # Opening a named pipe would block forever, so check first.
        if not stat.S_ISREG(os.stat(path).st_mode):
            problems.add(where, "is not a regular file")
            return None
        with open(path, "rb", buffering=0) as file:
            return file.read(count), os.fstat(file.fileno()).st_size
    except OSError as error:
        problems.add(where, f"cannot be read: {error.strerror}")
        return None


def read_header(path: Path, where: str, problems: Problems) -> Header | None:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.
        where: its name in messages.
        problems: every problem found is added to it.

    Returns:
        The header, or None if there is no header that can be parsed.
    """
    start = read_start(path, where, 64, problems)
    if start is None:
        return None
    prefix, size = start
    if prefix.startswith(_LFS_POINTER):
        problems.add(where, "is a Git LFS pointer, not the weights; get them with `git lfs pull`")
        return None
    if len(prefix) < 8:
        problems.add(
            where, f"is no safetensors file: {size} bytes, the header length alone takes 8"
        )
        return None
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        problems.add(
            where,
            f"is damaged or no safetensors file: header of {length} bytes, "
            f"at most {MAX_HEADER_BYTES} are allowed",
        )
        return None
    if 8 + length > size:
        problems.add(
            where,
            f"is truncated: header of {length} bytes, but only {size - 8} bytes follow its length: "
            f"at least {8 + length - size} bytes are missing",
        )
        return None
    try:
        with open(path, "rb") as file:
            identity = FileIdentity.of(file.fileno())
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        problems.add(where, f"cannot be read: {error.strerror}")
        return None
    if identity.size != size or len(text) != length:
        problems.add(where, "changed while it was read")
        return None
    try:
        entries = parse_json(text, unique_keys=True, depth=None)
        if not text.startswith(b"{") or not isinstance(entries, dict):
            raise ValueError("is not a JSON object that begins with '{'")
    except ValueError as error:
        problems.add(where, f"is damaged: the header {error}")
        return None

    metadata = _metadata(entries.pop("__metadata__", {}), where, problems)
    tensors, spans, all_placed = _tensors(entries, path, 8 + length, where, problems)
    _check_layout(spans, size - 8 - length, all_placed, where, problems)
    return Header(tuple(tensors), frozenset(entries), metadata, identity)


def _metadata(value: Any, where: str, problems: Problems) -> dict[str, str]:
    if isinstance(value, dict) and all(is_text(key) and is_text(v) for key, v in value.items()):
        return value
    problems.add(where, "__metadata__: expected an object of strings")
    return {}


_Span = tuple[int, int, str]


def _tensors(
    entries: dict[str, Any], path: Path, data_start: int, where: str, problems: Problems
) -> tuple[list[TensorInfo], list[_Span], bool]:
    """Return the sound tensors, the spans of all that have one, and whether all have one."""
    tensors: list[TensorInfo] = []
    spans: list[_Span] = []
    for name, entry in entries.items():
        found: list[tuple[str, str]] = []  # (kind, text)
        if not is_text(name):
            found.append(("name", "the name is no valid Unicode"))
        if not isinstance(entry, dict):
            found.append(("entry", f"expected an object, got {_short(entry)}"))
            _report(name, found, where, problems)
            continue
        if set(entry) != set(_FIELDS):
            found.append(("fields", _wrong_fields(entry)))
        itemsize = _itemsize(entry, found)
        numel = _numel(entry, found)
        span = _span(entry, found)
        if span is not None:
            spans.append((*span, name))
            if itemsize is not None and numel is not None:
                needed, got = numel * itemsize, span[1] - span[0]
                if needed > _MAX_BYTES:
                    found.append(("size", f"shape {_short(entry['shape'])} is impossibly large"))
                elif needed != got:
                    found.append(
                        (
                            "bytes",
                            f"shape {_short(entry['shape'])} of {entry['dtype']} takes {needed} "
                            f"bytes, but data_offsets give it {got}",
                        )
                    )
        if found or span is None:
            _report(name, found, where, problems)
        else:
            shape = tuple(entry["shape"])
            offset, nbytes = data_start + span[0], span[1] - span[0]
            tensors.append(TensorInfo(name, entry["dtype"], shape, path, offset, nbytes))
    return tensors, spans, len(spans) == len(entries)


def _report(name: str, found: list[tuple[str, str]], where: str, problems: Problems) -> None:
    for kind, text in found:
        problems.add(where, f"tensor {_short(name, 200)}: {text}", kind)


def _short(value: object, limit: int = 80) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _wrong_fields(entry: dict[str, Any]) -> str:
    parts = [f"{name!r} is missing" for name in _FIELDS if name not in entry]
    parts += [f"unknown field {_short(name)}" for name in entry if name not in _FIELDS]
    return ", ".join(parts)


def _itemsize(entry: dict[str, Any], found: list[tuple[str, str]]) -> int | None:
    if "dtype" not in entry:
        return None
    code = entry["dtype"]
    if isinstance(code, str) and code in DTYPES:
        return DTYPES[code]
    if code in SUB_BYTE_DTYPES:
        found.append(
            ("dtype", f"dtype {code}, whose elements are no whole bytes, is not supported")
        )
    else:
        hint = nearest(code, DTYPES) if isinstance(code, str) and len(code) < 40 else ""
        found.append(("dtype", f"unknown dtype {_short(code)}{hint}"))
    return None


def _numel(entry: dict[str, Any], found: list[tuple[str, str]]) -> int | None:
    if "shape" not in entry:
        return None
    shape = entry["shape"]
    # type() and not isinstance(): JSON's true is a bool, which Python counts as an int
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        text = f"shape: expected a list of integers of at least 0, got {_short(shape)}"
        found.append(("shape", text))
        return None
    numel = 1
    for size in shape:
        if size > _MAX_BYTES or (numel := numel * size) > _MAX_BYTES:
            found.append(("size", f"shape {_short(shape)} is impossibly large"))
            return None
    return numel


def _span(entry: dict[str, Any], found: list[tuple[str, str]]) -> tuple[int, int] | None:
    if "data_offsets" not in entry:
        return None
    span = entry["data_offsets"]
    if (
        not isinstance(span, list)
        or len(span) != 2
        or any(type(bound) is not int for bound in span)
        or not 0 <= span[0] <= span[1] <= _MAX_BYTES
    ):
        text = f"data_offsets: expected [begin, end] with 0 <= begin <= end, got {_short(span)}"
        found.append(("data_offsets", text))
        return None
    return span[0], span[1]


def _check_layout(
    spans: list[_Span], data_bytes: int, all_placed: bool, where: str, problems: Problems
) -> None:
    """Record a problem unless the tensors fill the data section back to back."""
    position, previous = 0, ""
    for begin, end, name in sorted(spans):
        if begin < position:
            problems.add(
                where,
                f"tensor {_short(name, 200)}: overlaps {_short(previous, 200)} in the data",
                "overlap",
            )
        elif begin > position and all_placed:
            problems.add(
                where,
                f"tensor {_short(name, 200)}: a hole of {begin - position} bytes lies before it",
                "hole",
            )
        if end > position:
            position, previous = end, name
    if position > data_bytes:
        beyond = sum(end > data_bytes for _, end, _ in spans)
        problems.add(
            where,
            f"is truncated: {position - data_bytes} bytes are missing "
            f"({data_bytes} of {position} data bytes are there); "
            f"{beyond} of {len(spans)} tensors are affected",
        )
    elif position < data_bytes and all_placed:
        problems.add(where, f"has {data_bytes - position} bytes after its last tensor")
