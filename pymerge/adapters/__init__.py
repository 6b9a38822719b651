"""LoRA and IA3 adapters of PEFT: read, computed with, merged, folded into a base, extracted.

See docs/adapters.md.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

__getattr__, __dir__ = names_of_stub(__name__, __file__)
