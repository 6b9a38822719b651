"""What is wrong with a document that pydantic has read, in the document's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from pymerge.config.schema import dotted
from pymerge.config.yaml_lines import LinedYaml, YamlPath
from pymerge.errors import shown

__all__ = ["Number", "check_number", "is_branch", "wrong_value"]


def check_number(value: Any) -> float | int:
    """Return a number of YAML as it is; ValueError for booleans and text, which pydantic takes.

    NaN is none, nor is an integer that no float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError("expected a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError("expected a number") from None
    return value


Number = Annotated[float | int, BeforeValidator(check_number)]


def is_branch(error: Any, errors: Sequence[Any]) -> bool:
    """Tell whether an error only says that a mapping is of no other kind that its key may be of.

    Such a key has an error of its own within the mapping, too, which knows more.
    """
    # An error about a key that is missing or unknown has the mapping around it for its input.
    if error["type"] in ("extra_forbidden", "missing") or not isinstance(error["input"], dict):
        return False
    at = error["loc"][:-1]
    return any(one is not error and one["loc"][: len(at)] == at for one in errors)


def wrong_value(document: LinedYaml, path: YamlPath, expected: str) -> str:
    """Return `file:line: key: expected ..., got ...` for a key that is there."""
    value: Any = document.data
    for part in path:
        value = value[part]
    return f"{document.where(path)}: {dotted(path)}: expected {expected}, got {shown(value)}"
