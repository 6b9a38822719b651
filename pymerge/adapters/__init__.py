"""PEFT's LoRA and IA3 adapters: reading, arithmetic, merging, folding into a base, extraction.

See docs/adapters.md.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

__getattr__, __dir__ = names_of_stub(__name__, __file__)
