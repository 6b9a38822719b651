"""The names of a package, listed once in its stub `__init__.pyi`, and loaded on first access.

Editors and type checkers read the stub; `pymerge --help` does not wait for torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["names_of_stub"]


def names_of_stub(
    package: str, file: str, more: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__`, which has its `__all__` too, and its `__dir__`.

    Args:
        package: its `__name__`.
        file: its `__file__`. Beside it, `__init__.pyi` has a line `from MODULE import NAME as NAME`
            for each name. It is read when a name is first accessed.
        more: modules by the names that they have, which the stub takes by `import *`.
    """

    @cache
    def homes() -> dict[str, tuple[str, str]]:
        stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
        found = {
            alias.asname: (str(line.module), alias.name)
            for line in stub.body
            if isinstance(line, ast.ImportFrom)
            for alias in line.names
            if alias.asname is not None
        }
        return found | {name: (module, name) for name, module in (more or {}).items()}

    def load(name: str) -> Any:
        if name == "__all__":
            return sorted(homes())
        if name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, own = homes()[name]
        value = getattr(import_module(module), own)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(homes().keys() | vars(sys.modules[package]).keys())

    return load, names
