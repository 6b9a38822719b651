"""Searches the coefficients of a merge: grids, random points, CMA-ES; `pymerge search`.

See docs/search.md. `run_search` searches; `Remerger` merges the same checkpoints again and again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.search.config import SearchConfig, load_search
    from pymerge.search.data import Split
    from pymerge.search.journal import Trial
    from pymerge.search.remerge import Merged, Remerger
    from pymerge.search.study import SearchResult, run_search

__all__ = [
    "Merged",
    "Remerger",
    "SearchConfig",
    "SearchResult",
    "Split",
    "Trial",
    "load_search",
    "run_search",
]

_HOMES = {
    "Merged": "remerge",
    "Remerger": "remerge",
    "SearchConfig": "config",
    "SearchResult": "study",
    "Split": "data",
    "Trial": "journal",
    "load_search": "config",
    "run_search": "study",
}


def __getattr__(name: str) -> Any:
    # Nothing is imported before it is asked for.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"pymerge.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pymerge.search' has no attribute {name!r}")
