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
    from pymerge.adamerging.module import AdaMerging
    from pymerge.analysis.api import analyze
    from pymerge.merging.api import linear, merge, task_arithmetic, ties_merge
    from pymerge.merging.files import merge_checkpoints
    from pymerge.merging.report import MergeReport
    from pymerge.merging.task_vector import TaskVector
    from pymerge.methods.directions.functions import (
        arcee_fusion,
        consensus_ta,
        emr,
        karcher,
        model_stock,
        multislerp,
        nearswap,
        nuslerp,
        passthrough,
        slerp,
        tall_masks,
        tsv_m,
    )
    from pymerge.methods.sparse.functions import (
        breadcrumbs,
        breadcrumbs_ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        magmax,
        pcb_merge,
        ram,
        ramplus_tl,
        sce,
    )
    from pymerge.methods.statistics.functions import fisher_merge, gradient_matching, regmean_merge
    from pymerge.statistics.files import (
        ModelStatistics,
        load_statistics,
        save_statistics,
    )
    from pymerge.statistics.fisher import collect_fisher
    from pymerge.statistics.gradients import gradient_merge
    from pymerge.statistics.gram import collect_gram
    from pymerge.statistics.plus_plus import regmean_plus_plus

__all__ = [
    "AdaMerging",
    "CheckpointError",
    "MergeError",
    "MergeReport",
    "ModelStatistics",
    "NonFiniteError",
    "RequestError",
    "TaskVector",
    "__version__",
    "analyze",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "collect_fisher",
    "collect_gram",
    "consensus_ta",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "fisher_merge",
    "gradient_matching",
    "gradient_merge",
    "karcher",
    "linear",
    "load_statistics",
    "magmax",
    "merge",
    "merge_checkpoints",
    "methods",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "pcb_merge",
    "ram",
    "ramplus_tl",
    "regmean_merge",
    "regmean_plus_plus",
    "save_statistics",
    "sce",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties_merge",
    "tsv_m",
]

# Where each lazily loaded name lives: `pymerge --help` and `pymerge methods` do not wait for torch.
_LAZY = {
    "AdaMerging": "pymerge.adamerging.module",
    "analyze": "pymerge.analysis.api",
    "linear": "pymerge.merging.api",
    "merge": "pymerge.merging.api",
    "task_arithmetic": "pymerge.merging.api",
    "ties_merge": "pymerge.merging.api",
    "merge_checkpoints": "pymerge.merging.files",
    "MergeReport": "pymerge.merging.report",
    "TaskVector": "pymerge.merging.task_vector",
    "breadcrumbs": "pymerge.methods.sparse.functions",
    "breadcrumbs_ties": "pymerge.methods.sparse.functions",
    "dare_linear": "pymerge.methods.sparse.functions",
    "dare_ties": "pymerge.methods.sparse.functions",
    "della": "pymerge.methods.sparse.functions",
    "della_linear": "pymerge.methods.sparse.functions",
    "magmax": "pymerge.methods.sparse.functions",
    "pcb_merge": "pymerge.methods.sparse.functions",
    "ram": "pymerge.methods.sparse.functions",
    "ramplus_tl": "pymerge.methods.sparse.functions",
    "sce": "pymerge.methods.sparse.functions",
    "arcee_fusion": "pymerge.methods.directions.functions",
    "consensus_ta": "pymerge.methods.directions.functions",
    "emr": "pymerge.methods.directions.functions",
    "karcher": "pymerge.methods.directions.functions",
    "model_stock": "pymerge.methods.directions.functions",
    "multislerp": "pymerge.methods.directions.functions",
    "nearswap": "pymerge.methods.directions.functions",
    "nuslerp": "pymerge.methods.directions.functions",
    "passthrough": "pymerge.methods.directions.functions",
    "slerp": "pymerge.methods.directions.functions",
    "tall_masks": "pymerge.methods.directions.functions",
    "tsv_m": "pymerge.methods.directions.functions",
    "ModelStatistics": "pymerge.statistics.files",
    "collect_fisher": "pymerge.statistics.fisher",
    "collect_gram": "pymerge.statistics.gram",
    "fisher_merge": "pymerge.methods.statistics.functions",
    "gradient_matching": "pymerge.methods.statistics.functions",
    "gradient_merge": "pymerge.statistics.gradients",
    "load_statistics": "pymerge.statistics.files",
    "regmean_merge": "pymerge.methods.statistics.functions",
    "regmean_plus_plus": "pymerge.statistics.plus_plus",
    "save_statistics": "pymerge.statistics.files",
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
