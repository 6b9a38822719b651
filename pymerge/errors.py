"""The exceptions of pymerge, and what their messages use to show names and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "CheckpointError",
    "MergeError",
    "NonFiniteError",
    "RequestError",
    "listed",
    "nearest",
    "not_one_of",
    "shown",
]


class RequestError(ValueError):
    """Something about the request is wrong: a config, a parameter, an input. Exit code 2.

    `problems` lists every problem that was found; the message shows them all.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            message = f"{len(self.problems)} problems:{lines}"
        super().__init__(message)


class CheckpointError(RequestError):
    """A checkpoint is damaged, incomplete, or does not fit the others."""


class NonFiniteError(RequestError):
    """An input holds NaN or infinity, and the merge was not asked to keep them."""


class MergeError(RuntimeError):
    """The merge failed for a reason that is not the request's: I/O, a full disk. Exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of the known names, else the empty string."""
    import difflib  # only where something is wrong

    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return `'a', 'b' and 3 more`."""
    text = ", ".join(f"'{name}'" for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def not_one_of(value: Any, known: Iterable[str]) -> str:
    """Return `expected one of a, b; got 'x'`, with the nearest of the known names."""
    known = list(known)
    return f"expected one of {', '.join(known)}; got {value!r}{nearest(value, known)}"


def shown(value: Any) -> str:
    """Return a value for a message: containers by kind, long strings cut."""
    if isinstance(value, (dict, list)):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if value is None:
        return "nothing"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a number of {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
