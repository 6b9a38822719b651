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
    from pymerge.api import linear, merge, task_arithmetic, ties_merge
    from pymerge.data_driven.fisher import collect_fisher
    from pymerge.data_driven.functions import fisher_merge, gradient_matching, regmean_merge
    from pymerge.data_driven.gradients import gradient_merge
    from pymerge.data_driven.gram import collect_gram
    from pymerge.data_driven.plus_plus import regmean_plus_plus
    from pymerge.data_driven.statistics import (
        ModelStatistics,
        load_statistics,
        save_statistics,
    )
    from pymerge.engine.checkpoints import merge_checkpoints
    from pymerge.other_functions import (
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
    from pymerge.report import MergeReport
    from pymerge.sparse_functions import (
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
    from pymerge.task_vector import TaskVector

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
    "linear": "pymerge.api",
    "merge": "pymerge.api",
    "task_arithmetic": "pymerge.api",
    "ties_merge": "pymerge.api",
    "merge_checkpoints": "pymerge.engine.checkpoints",
    "MergeReport": "pymerge.report",
    "TaskVector": "pymerge.task_vector",
    "breadcrumbs": "pymerge.sparse_functions",
    "breadcrumbs_ties": "pymerge.sparse_functions",
    "dare_linear": "pymerge.sparse_functions",
    "dare_ties": "pymerge.sparse_functions",
    "della": "pymerge.sparse_functions",
    "della_linear": "pymerge.sparse_functions",
    "magmax": "pymerge.sparse_functions",
    "pcb_merge": "pymerge.sparse_functions",
    "ram": "pymerge.sparse_functions",
    "ramplus_tl": "pymerge.sparse_functions",
    "sce": "pymerge.sparse_functions",
    "arcee_fusion": "pymerge.other_functions",
    "consensus_ta": "pymerge.other_functions",
    "emr": "pymerge.other_functions",
    "karcher": "pymerge.other_functions",
    "model_stock": "pymerge.other_functions",
    "multislerp": "pymerge.other_functions",
    "nearswap": "pymerge.other_functions",
    "nuslerp": "pymerge.other_functions",
    "passthrough": "pymerge.other_functions",
    "slerp": "pymerge.other_functions",
    "tall_masks": "pymerge.other_functions",
    "tsv_m": "pymerge.other_functions",
    "ModelStatistics": "pymerge.data_driven.statistics",
    "collect_fisher": "pymerge.data_driven.fisher",
    "collect_gram": "pymerge.data_driven.gram",
    "fisher_merge": "pymerge.data_driven.functions",
    "gradient_matching": "pymerge.data_driven.functions",
    "gradient_merge": "pymerge.data_driven.gradients",
    "load_statistics": "pymerge.data_driven.statistics",
    "regmean_merge": "pymerge.data_driven.functions",
    "regmean_plus_plus": "pymerge.data_driven.plus_plus",
    "save_statistics": "pymerge.data_driven.statistics",
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
