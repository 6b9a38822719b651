"""pymerge: merge neural networks, exactly, at the speed of reading the files.

The Python API: `merge`, `linear`, `task_arithmetic`, `ties_merge` over tensors, lists and state
dicts; `merge_checkpoints` over sharded checkpoints; `TaskVector`; `methods()`. The command line:
`pymerge --help`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge._version import __version__
from pymerge.errors import CheckpointError, MergeError, NonFiniteError, RequestError

# The function takes the place of the package's name; `from pymerge.methods import` works as ever.
from pymerge.methods import methods

if TYPE_CHECKING:
    from pymerge.api import linear, merge, task_arithmetic, ties_merge
    from pymerge.engine.checkpoints import merge_checkpoints
    from pymerge.report import MergeReport
    from pymerge.task_vector import TaskVector

__all__ = [
    "CheckpointError",
    "MergeError",
    "MergeReport",
    "NonFiniteError",
    "RequestError",
    "TaskVector",
    "__version__",
    "linear",
    "merge",
    "merge_checkpoints",
    "methods",
    "task_arithmetic",
    "ties_merge",
]

# Where each lazily loaded name lives: `pymerge --help` and `pymerge methods` do not wait for torch.
_LAZY = {
    "linear": "pymerge.api",
    "merge": "pymerge.api",
    "task_arithmetic": "pymerge.api",
    "ties_merge": "pymerge.api",
    "merge_checkpoints": "pymerge.engine.checkpoints",
    "MergeReport": "pymerge.report",
    "TaskVector": "pymerge.task_vector",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
