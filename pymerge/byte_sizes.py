"""Byte sizes as people write them: `2GiB`, `5GB`, `512MB`, `1048576`."""

from __future__ import annotations

import re
from decimal import Decimal

from pymerge.errors import RequestError

__all__ = ["format_size", "parse_size"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*\Z", re.ASCII)
_EXPECTED = "a size such as 2GiB, 5GB, 512MB or a number of bytes"


def parse_size(value: int | str, where: str = "size") -> int:
    """Return a size in bytes.

    Args:
        value: bytes as an int, or a number with one of the units B, KB, MB, GB, TB (powers of
            1000), KiB, MiB, GiB, TiB (powers of 1024), in any case. A bare `G` is refused: it means
            10**9 to some and 2**30 to others.
        where: the name of the argument in an error.

    Raises:
        RequestError: not a size, or less than one byte.
    """
    size = -1
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.match(value)):
        unit = match[2].lower()
        if unit in _UNITS:
            size = int(Decimal(match[1]) * _UNITS[unit])
        elif f"{unit}b" in _UNITS:
            letter = unit.upper()
            raise RequestError(
                f"{where}: expected {_EXPECTED}, got {value!r}; did you mean {match[1]}{letter}iB "
                f"or {match[1]}{letter}B?"
            )
    if size < 1:
        raise RequestError(f"{where}: expected {_EXPECTED}, got {value!r}")
    return size


def format_size(size: int) -> str:
    """Return a size in readable form: `0 B`, `64.0 MiB`, `1.07 GiB`."""
    if size < 1024:
        return f"{size} B"
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        # 1023.95 would print as 1024.0
        if value < 1023.95:
            break
        value, unit = value / 1024, larger
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
