"""Which data chooses coefficients and which reports, and checks that keep the two apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pymerge.errors import RequestError
from pymerge.hashing import sha256_of

__all__ = ["Split", "check_splits", "content_hash", "read_split"]

_KEYS = ("name", "path", "hash")
_TEST = re.compile(r"(?<![a-z])test(ing|s|set)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Split:
    """A part of the data.

    name: its name for the metric ("validation"). path: its file or folder, if it has one. hash:
    SHA-256 of the content of `path`, or whatever identifies the data if there is no path.
    """

    name: str
    path: str | None = None
    hash: str | None = None

    def to_dict(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        more = [self.path] if self.path else []
        more += [f"sha256 {self.hash[:16]}"] if self.hash else []
        return f"{self.name!r}" + (f" ({', '.join(more)})" if more else "")


def read_split(value: str | Mapping[str, Any], where: str) -> Split:
    """Read `validation` or `{name: ..., path: ..., hash: ...}`, and hash the content of the path.

    Raises:
        RequestError: unknown keys, no name, a path that does not exist, a hash that differs.
    """
    if isinstance(value, str):
        value = {"name": value}
    odd = [str(key) for key in value if key not in _KEYS]
    if odd:
        raise RequestError(f"{where}: unknown key {odd[0]!r} (known: {', '.join(_KEYS)})")
    name, path, given = (value.get(key) for key in _KEYS)
    if name is None and path is not None:
        name = Path(str(path)).name
    for key, text in (("name", name), ("path", path), ("hash", given)):
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise RequestError(f"{where}: {key}: expected a string, got {text!r}")
    if name is None:
        raise RequestError(f"{where}: name: is missing; expected the name of a part of the data")
    found = given
    if path is not None:
        found = content_hash(Path(path), f"{where}: path")
        if given is not None and given.lower() != found:
            raise RequestError(f"{where}: hash: expected {found}, that of {path}; got {given!r}")
    return Split(name, path, found)


def content_hash(path: Path, where: str = "path") -> str:
    """Return the SHA-256 of a file, or, for a folder, that of its files' names and contents."""
    try:
        if path.is_file():
            return sha256_of(path)
        if path.is_dir():
            total = hashlib.sha256()
            for file in sorted(one for one in path.rglob("*") if one.is_file()):
                total.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
            return total.hexdigest()
    except OSError as error:
        raise RequestError(f"{where}: {path} cannot be read: {error.strerror}") from None
    raise RequestError(f"{where}: there is no file or folder {path}")


def check_splits(
    search: Split, report: Split | None, allow_test_split: bool, where: str = "data"
) -> list[str]:
    """Return the problems: a search on test data, or on the data of the report."""
    problems = []
    places = [("name", search.name), ("path", Path(search.path).name if search.path else "")]
    for key, text in places:
        if _TEST.search(text) and not allow_test_split:
            problems.append(
                f"{where}.search: {key}: {text!r} is called test: coefficients that test data "
                "chooses make its results worthless; search on other data, or set "
                "allow_test_split: true, which is recorded"
            )
            break
    if report is not None:
        same = None
        if search.name == report.name:
            same = f"have the name {search.name!r}"
        elif (
            search.path
            and report.path
            and Path(search.path).resolve() == Path(report.path).resolve()
        ):
            same = f"are {search.path}"
        elif search.hash and search.hash == report.hash:
            same = f"have the same content (sha256 {search.hash[:16]})"
        if same is not None:
            problems.append(
                f"{where}.search and {where}.report both {same}; report on data that chose nothing"
            )
    return problems
