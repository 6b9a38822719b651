"""A collector of problems that prevents a damaged file from flooding the message."""

from __future__ import annotations

__all__ = ["Problems"]

_LIMIT = 20


class Problems:
    """Collects messages by kind; of each kind, the first 20 are kept and the rest counted."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._kept: dict[tuple[str, str], list[str]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, where: str, text: str, kind: str | None = None) -> None:
        """Record one problem.

        Args:
            where: the file that has it, or "" for the checkpoint as a whole.
            text: the message.
            kind: a key shared by similar problems of one file; None for the text itself.
        """
        group = (where, text if kind is None else kind)
        kept = self._kept.setdefault(group, [])
        self._counts[group] = self._counts.get(group, 0) + 1
        if len(kept) < _LIMIT:
            kept.append(f"{self._prefix(where)}{text}")

    def __bool__(self) -> bool:
        return bool(self._kept)

    def messages(self) -> list[str]:
        """Return all messages, each flood ending in "and N more"."""
        result: list[str] = []
        for group, kept in self._kept.items():
            result += kept
            more = self._counts[group] - len(kept)
            if more:
                result.append(f"{self._prefix(group[0])}and {more} more like the last one")
        return result

    def _prefix(self, where: str) -> str:
        return f"{self.label}: {where}: " if where else f"{self.label}: "
