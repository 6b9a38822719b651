"""Functions that users name: `package.module:function` in a config or on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from pymerge.errors import RequestError, nearest

__all__ = ["load_function"]


def load_function(name: str, where: str = "metric") -> Callable[..., Any]:
    """Import `package.module:function`, from the current directory too.

    Args:
        name: what a config or a command line has.
        where: what messages begin with.

    Raises:
        RequestError: it is not written so, cannot be imported, or is not callable.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise RequestError(f"{where}: expected package.module:function, got {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a script beside the config is found
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        # whatever the module itself raises: the function is what was asked for
        raise RequestError(
            f"{where}: module {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        known = [known for known in dir(found) if not known.startswith("_")]
        if not hasattr(found, part):
            raise RequestError(
                f"{where}: module {module!r} has no {attribute!r}{nearest(part, known)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise RequestError(
            f"{where}: {name} is not callable: expected a function or class, got "
            f"{type(found).__name__}"
        )
    return found
