"""Damaged files: bytes flipped, cut, inserted; JSON values of other types, keys removed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

__all__ = ["bytes_damaged", "header_damaged", "texts_damaged", "values_damaged"]

DEEP = "[" * 50_000
# They replace values; text is inserted into the document unchanged.
_RAW = ("NaN", "-Infinity", "1e999", "1" * 400, "1" * 5000, '"\\ud800"', DEEP, "[" * 99 + "]" * 99)
_OTHERS: tuple[Any, ...] = (None, True, -1, 0.5, 10**9, "", "x", "\0", "(", [], ["x"], {}, {"x": 1})


_IN = ("__metadata__",)


def bytes_damaged(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yield damaged copies of a file: empty, garbage, and `count` small accidents."""
    rng = random.Random(seed)
    yield b""
    yield rng.randbytes(64)
    yield b"\xff\xfe" + content
    yield content + content
    yield content + b"\0"
    for _ in range(count):
        damaged, at = bytearray(content), rng.randrange(len(content))
        kind = rng.randrange(5)
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            del damaged[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            damaged[at:at] = rng.randbytes(rng.randrange(1, 5))
        else:
            damaged[at : at + 1] = rng.choice([b"\n", b'"', b"{", b"]", b",", b"9", b"-", b":"])
        yield bytes(damaged)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from _paths(value[key], (*path, key))


def values_damaged(value: Any, seed: int, count: int) -> Iterator[Any]:
    """Yield `count` copies of plain values in which one value is replaced or missing."""
    rng, paths = random.Random(seed), list(_paths(value))
    for _ in range(count):
        path = rng.choice(paths)
        kind = rng.randrange(4) if path else 3
        if kind == 0:
            yield _replaced(value, path, ...)
        elif kind == 1 and isinstance(path[-1], str):
            renamed = _replaced(value, path, ...)
            _at(renamed, path[:-1])[path[-1] + "x"] = _at(value, path)
            yield renamed
        else:
            yield _replaced(value, path, rng.choice(_OTHERS))


def texts_damaged(value: Any, seed: int, count: int) -> Iterator[str]:
    """Yield `count` damaged documents: JSON with values that JSON does not have, and duplicate
    keys."""
    rng, paths = random.Random(seed), list(_paths(value))
    for one in values_damaged(value, seed, count - count // 3):
        yield json.dumps(one)
    for _ in range(count // 3):
        path = rng.choice(paths)
        if path and isinstance(path[-1], str) and rng.randrange(4) == 0:
            key = json.dumps(path[-1]) + ": "
            yield json.dumps(value).replace(key, key + "1, " + key, 1)
        else:
            marked = json.dumps(_replaced(value, path, "<here>"))
            yield marked.replace('"<here>"', rng.choice(_RAW))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """Return a copy with the value at a path replaced; `...` removes it."""
    if not path:
        return other
    made = copy.deepcopy(value)
    holder = _at(made, path[:-1])
    if other is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = other
    return made


def header_damaged(content: bytes, key: str | None, seed: int, count: int) -> Iterator[bytes]:
    """Yield safetensors files whose header, or JSON within its metadata, is damaged.

    Args:
        key: the key of the metadata whose text is JSON; None for the header itself.
    """
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    value = header if key is None else json.loads(header["__metadata__"][key])
    for text in texts_damaged(value, seed, count):
        whole = text if key is None else json.dumps(_replaced(header, (*_IN, key), text))
        yield struct.pack("<Q", len(whole.encode())) + whole.encode() + content[8 + size :]
