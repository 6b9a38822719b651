"""LoRA and IA3 adapters of PEFT: read, computed with, merged, folded into a base, extracted.

See docs/adapters.md. Nothing here imports torch before something needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.adapters.arithmetic import add, analogy, negate, scale
    from pymerge.adapters.combine import merge_adapters
    from pymerge.adapters.config import run_merge_adapters
    from pymerge.adapters.extract import ExtractReport, extract_lora
    from pymerge.adapters.fold import fold
    from pymerge.checkpoint.peft.adapter import Adapter
    from pymerge.checkpoint.peft.files import load

__all__ = [
    "Adapter",
    "ExtractReport",
    "add",
    "analogy",
    "extract_lora",
    "fold",
    "load",
    "merge_adapters",
    "negate",
    "run_merge_adapters",
    "scale",
]

_LAZY = {
    "Adapter": "pymerge.checkpoint.peft.adapter",
    "ExtractReport": "pymerge.adapters.extract",
    "add": "pymerge.adapters.arithmetic",
    "analogy": "pymerge.adapters.arithmetic",
    "extract_lora": "pymerge.adapters.extract",
    "fold": "pymerge.adapters.fold",
    "load": "pymerge.checkpoint.peft.files",
    "merge_adapters": "pymerge.adapters.combine",
    "negate": "pymerge.adapters.arithmetic",
    "run_merge_adapters": "pymerge.adapters.config",
    "scale": "pymerge.adapters.arithmetic",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pymerge.adapters' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
