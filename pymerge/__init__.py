"""pymerge: merge neural networks, exactly, at the speed of reading the files.

The Python API: `merge`, `linear`, `task_arithmetic`, `ties_merge` over tensors, lists and state
dicts; `merge_checkpoints` over sharded checkpoints; `TaskVector`; `methods()`. The command line:
`pymerge --help`. All names are in `__init__.pyi`.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

# The function takes the place of the package's name; `from pymerge.methods import` works as ever.
from pymerge.methods import METHODS as _METHODS
from pymerge.methods import methods as methods

# A method's function is in its family's room, under the name that its record has for it.
_FUNCTIONS = {spec.function_name: spec.functions for spec in _METHODS.values() if spec.callable}

__getattr__, __dir__ = names_of_stub(__name__, __file__, _FUNCTIONS)
