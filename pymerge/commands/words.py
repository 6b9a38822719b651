"""Output that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "print_warnings", "value_text"]


def print_warnings(warnings: Sequence[str]) -> None:
    """Print warnings to stderr."""
    for warning in warnings:
        print(f"pymerge: warning: {warning}", file=sys.stderr)


def value_text(value: Any) -> str:
    """Return a parameter's value in YAML syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def console() -> Console:
    """Return a console that is wide unless a terminal sets its width."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)
