"""The engine: streams tiles through the ops, from tensors in memory or from checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.engine.checkpoints import merge_checkpoints

__all__ = ["merge_checkpoints"]


def __getattr__(name: str) -> Any:
    # Merging tensors in memory needs neither YAML nor files.
    if name == "merge_checkpoints":
        from pymerge.engine.checkpoints import merge_checkpoints

        return merge_checkpoints
    raise AttributeError(f"module 'pymerge.engine' has no attribute {name!r}")
