"""LoRA and IA3 adapters of PEFT: read, computed with, merged, folded into a base, extracted.

See docs/adapters.md. Nothing here imports torch before something needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.adapters.adapter import Adapter
    from pymerge.adapters.arithmetic import add, analogy, negate, scale
    from pymerge.adapters.combine import merge_adapters
    from pymerge.adapters.extract import ExtractReport, extract_lora
    from pymerge.adapters.files import load
    from pymerge.adapters.fold import fold
    from pymerge.commands.adapters import run_merge_adapters

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
    "Adapter": "adapter",
    "ExtractReport": "extract",
    "add": "arithmetic",
    "analogy": "arithmetic",
    "extract_lora": "extract",
    "fold": "fold",
    "load": "files",
    "merge_adapters": "combine",
    "negate": "arithmetic",
    "run_merge_adapters": "command",
    "scale": "arithmetic",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pymerge.adapters' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"pymerge.adapters.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
