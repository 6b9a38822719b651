"""What a mutant is, and how it is put into a tree."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = ["Mutant", "StaleMutant", "mutant"]


class StaleMutant(Exception):
    """The list no longer fits the sources."""


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests of which one at least must fail.

    name: what is wrong, in a few words; unique.
    file: the source, relative to the root.
    original: text that occurs in it exactly once.
    replacement: what stands there instead.
    tests: node ids of pytest, relative to the root.
    known: why it may survive; empty where it must not.
    """

    name: str
    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]
    known: str = ""

    def applied(self, root: Path) -> str:
        """Return the text of the file with the fault.

        Raises:
            StaleMutant: the file is missing, the original does not occur exactly once, or the
                result is no Python or the same program.
        """
        try:
            source = (root / self.file).read_text(encoding="utf-8")
        except OSError as error:
            raise StaleMutant(f"{self.name}: {self.file}: {error.strerror}") from None
        count = source.count(self.original)
        if count != 1:
            raise StaleMutant(
                f"{self.name}: {self.file}: expected the original exactly once, found it {count} "
                f"times: {self.original!r}"
            )
        text = source.replace(self.original, self.replacement)
        try:
            program = ast.dump(ast.parse(text))
        except SyntaxError as error:
            raise StaleMutant(f"{self.name}: {self.file}: is no Python then: {error}") from None
        if program == _program(source):
            raise StaleMutant(f"{self.name}: {self.file}: the replacement changes nothing")
        return text

    def problem(self, root: Path) -> str | None:
        """Return why the mutant does not fit a tree, or None."""
        try:
            self.applied(root)
        except StaleMutant as error:
            return str(error)
        return None


@lru_cache(maxsize=16)  # a list goes file by file
def _program(source: str) -> str:
    return ast.dump(ast.parse(source))


def mutant(
    name: str, file: str, original: str, replacement: str, *tests: str, known: str = ""
) -> Mutant:
    """Return a mutant; see `Mutant`."""
    return Mutant(name, file, original, replacement, tests, known)
