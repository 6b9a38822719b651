"""JSON parsing in which everything that can go wrong is a ValueError with a readable reason."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["is_text", "parse_json"]


def parse_json(data: bytes, *, unique_keys: bool) -> Any:
    """Parse UTF-8 JSON.

    Args:
        data: the bytes of the document.
        unique_keys: refuse an object that has the same key twice (else the last one wins).

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a repeated key; its text says which.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except _RepeatedKey as error:
        raise ValueError(f"has the key {error.args[0]!r} twice") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def is_text(value: object) -> bool:
    """Tell whether a value is a string that UTF-8 can hold; escapes can form lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _RepeatedKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKey(key)
            seen.add(key)
    return result
