"""pymerge: merge neural networks, exactly, at the speed of reading the files.

The Python API: `merge`, `linear`, `task_arithmetic`, `ties_merge` over tensors, lists and state
dicts; `merge_checkpoints` over sharded checkpoints; `TaskVector`; `methods()`. The command line:
`pymerge --help`. All names are in `__init__.pyi`.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

# The function takes the place of the package's name; `from pymerge.methods import` works as ever.
from pymerge.methods import methods as methods

__getattr__, __dir__, __all__ = names_of_stub(__name__, __file__)
