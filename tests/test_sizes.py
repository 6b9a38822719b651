"""Sizes in bytes: what is read, what is refused, what is shown."""

from __future__ import annotations

import pytest

from pymerge.byte_sizes import format_size, parse_size
from pymerge.errors import RequestError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * 2**30),
        ("5GB", 5 * 10**9),
        ("512MB", 512 * 10**6),
        ("512 mib", 512 * 2**20),
        ("1.5KiB", 1536),
        ("0.1GB", 10**8),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("7B", 7),
        (" 4096 ", 4096),
        (4096, 4096),
    ],
)
def test_sizes_are_read_exactly(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1GB",
        "0",
        0,
        -5,
        "1e9",
        "1_000",
        "five",
        "1GBs",
        "1 2GB",
        True,
        "nan",
        "0.1B",
        "\u0661GB",
    ],
)
def test_what_is_not_a_size_is_refused(text: str | int) -> None:
    with pytest.raises(RequestError, match="memory: expected a size such as 2GiB"):
        parse_size(text, "memory")


def test_an_ambiguous_unit_is_refused_with_both_readings() -> None:
    with pytest.raises(RequestError, match=r"did you mean 2GiB or 2GB\?"):
        parse_size("2G")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (64 * 2**20, "64.0 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (5 * 10**9, "4.66 GiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_are_shown_for_people(size: int, expected: str) -> None:
    assert format_size(size) == expected
