"""Searches for the coefficients of a merge: grids, random points, CMA-ES; `pymerge search`.

See docs/search.md. `run_search` searches; `Remerger` merges the same checkpoints repeatedly.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

__getattr__, __dir__ = names_of_stub(__name__, __file__)
