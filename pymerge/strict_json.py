"""JSON, read strictly: text becomes values, and values become records.

Whatever is wrong with a file is an error that names it, with the line or the path of the key. Files
that others write are parsed by `parse_json`; those that pymerge writes, its records in metadata of
safetensors files included, are also decoded: each value has the type that the record says.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pymerge.errors import RequestError, shown

__all__ = ["decode", "is_text", "load_json", "parse_json", "read_bytes"]

_MOST_DEPTH = 100  # of objects and lists in each other


class _JsonError(ValueError):
    """What is wrong with a document, in words."""


def parse_json(
    data: bytes | str,
    *,
    unique_keys: bool,
    strict: bool = False,
    finite: bool = False,
    depth: int | None = _MOST_DEPTH,
) -> Any:
    """Parse JSON.

    Args:
        data: the document; bytes are UTF-8.
        unique_keys: refuse an object that has the same key twice (else the last one wins).
        strict: refuse strings that UTF-8 cannot hold.
        finite: refuse NaN and infinity, which JSON does not have, and Python writes.
        depth: most objects and lists within each other; None for what Python can parse.

    Raises:
        ValueError: with a readable reason.
    """
    if isinstance(data, bytes):
        try:
            data = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _JsonError(f"is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(
            data,
            object_pairs_hook=_unique if unique_keys else None,
            parse_constant=_no_constant if finite else None,
        )
    except _JsonError:
        raise
    except RecursionError:
        raise _JsonError("is nested too deeply") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise _JsonError(f"is not JSON: {error}") from None
    if strict or finite or depth is not None:
        _check(value, strict, finite, depth)
    return value


def is_text(value: object) -> bool:
    """Return whether a value is a string that UTF-8 can hold; escapes can form lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _JsonError(f"has the key {key!r} twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise _JsonError(f"holds {name}, which JSON does not have")


def _check(value: Any, strict: bool, finite: bool, depth: int | None) -> None:
    """Check what `parse_json` promises of values, level by level."""
    level, count = [value], 0
    while level:
        for one in level if strict or finite else ():
            if finite and isinstance(one, float) and not math.isfinite(one):
                raise _JsonError("holds a number that is too large")
            if strict and isinstance(one, str) and not is_text(one):
                raise _JsonError(f"holds {one!r}, which UTF-8 cannot hold")
        holders = [one for one in level if isinstance(one, (dict, list))]
        if holders and depth is not None and count == depth:
            raise _JsonError("is nested too deeply")
        keys = (key for one in holders if strict and isinstance(one, dict) for key in one)
        level = [*keys, *(item for one in holders for item in _items(one))]
        count += 1


def _items(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def load_json(data: bytes | str, where: str, *, finite: bool = True) -> Any:
    """Parse JSON that pymerge wrote.

    Args:
        data: the document.
        where: what messages begin with: its file.
        finite: see `parse_json`.

    Raises:
        RequestError: `where`, and the reason.
    """
    try:
        return parse_json(data, unique_keys=True, strict=True, finite=finite)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from None


def read_bytes(path: str | os.PathLike[str], what: str, most: int | None = None) -> bytes:
    """Return the content of a file.

    Args:
        what: was expected, for messages: "an analysis".
        most: bytes that it may have.

    Raises:
        RequestError: there is no such file, it is a directory, too large, or cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = file.read(-1 if most is None else most + 1)
    except FileNotFoundError:
        raise RequestError(f"{name}: no such file; expected {what}") from None
    except IsADirectoryError:
        raise RequestError(f"{name}: expected {what}, got a directory") from None
    except (OSError, ValueError) as error:  # a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{name}: cannot be read: {reason}") from None
    if most is not None and len(content) > most:
        raise RequestError(f"{name}: expected {what}, got more than {most >> 20} MiB")
    return content


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    frozenset: "a list",
    dict: "an object",
    type(None): "null",
}


def decode(kind: Any, value: Any, where: str, path: str = "", *, finite: bool = True) -> Any:
    """Return a value of JSON as what an annotation says.

    Args:
        kind: a dataclass, whose fields without defaults must be there and that has no others;
            `list`, `tuple`, `frozenset` and `dict` of kinds; a kind or None; `Literal`; `Any`; or
            float (which takes integers), int, str, bool.
        value: of `parse_json`.
        where: what messages begin with: the file.
        path: of the value in the document.
        finite: refuse NaN and infinity.

    Raises:
        RequestError: `where: path: expected ..., got ...`.
    """
    return _Decoder(where, finite).value(kind, value, path)


class _Decoder:
    def __init__(self, where: str, finite: bool) -> None:
        self._where = where
        self._finite = finite

    def value(self, kind: Any, value: Any, path: str) -> Any:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._record(kind, value, path)
        if origin is Literal:
            if not any(value == one and type(value) is type(one) for one in inner):
                words = ", ".join(repr(one) for one in inner)
                raise self._error(path, f"one of {words}", value)
            return value
        if origin in (types.UnionType, typing.Union):
            (other,) = (one for one in inner if one is not type(None))
            return None if value is None else self.value(other, value, path)
        if origin in (tuple, list, frozenset):
            return self._list(origin, inner, value, path)
        if origin in (dict, Mapping, typing.get_origin(Mapping[str, Any])):
            if not isinstance(value, Mapping):
                raise self._error(path, _WORDS[dict], value)
            return {
                key: self.value(inner[1], item, f"{path}[{key!r}]") for key, item in value.items()
            }
        return self._plain(kind, value, path)

    def _plain(self, kind: Any, value: Any, path: str) -> Any:
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                raise self._error(path, "a number", value) from None
        if type(value) is not kind or (kind is str and not is_text(value)):
            raise self._error(path, _WORDS[kind], value)
        if kind is int and not -(2**63) <= value < 2**64:
            raise self._error(path, "an integer of 64 bits", value)
        if kind is float and self._finite and not math.isfinite(value):
            raise self._error(path, "a finite number", value)
        return value

    def _record(self, kind: Any, value: Any, path: str) -> Any:
        hints = _hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        needed = {
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if not isinstance(value, Mapping) or not needed <= value.keys() <= fields.keys():
            got = ", ".join(sorted(map(str, value))) if isinstance(value, Mapping) else shown(value)
            raise self._error(path, f"the fields {', '.join(sorted(fields))}", None, got)
        dot = f"{path}." if path else ""
        return kind(
            **{key: self.value(hints[key], item, f"{dot}{key}") for key, item in value.items()}
        )

    def _list(self, origin: Any, inner: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, (list, tuple)):
            raise self._error(path, _WORDS[origin], value)
        fixed = origin is tuple and inner[-1] is not Ellipsis
        kinds = list(inner) if fixed else [inner[0]] * len(value)
        if len(kinds) != len(value):
            raise self._error(path, f"{len(kinds)} entries", None, str(len(value)))
        return origin(
            self.value(kind, item, f"{path}[{index}]")
            for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )

    def _error(self, path: str, expected: str, value: Any, got: str | None = None) -> RequestError:
        at = f"{self._where}: {path}" if path else self._where
        return RequestError(
            f"{at}: expected {expected}, got {shown(value) if got is None else got}"
        )


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
