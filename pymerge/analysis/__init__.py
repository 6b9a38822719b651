"""Task vectors before a merge: norms, angles, sign conflicts, overlaps, spectra."""

from __future__ import annotations

from pymerge.lazy import names_of_stub

__getattr__, __dir__ = names_of_stub(__name__, __file__)
