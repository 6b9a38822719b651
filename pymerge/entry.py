"""Functions that users name: `package.module:function` in a config or on the command line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from pymerge.errors import RequestError, nearest

__all__ = ["as_setup", "call_function", "load_function"]

_Setup = TypeVar("_Setup")


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


def call_function(
    name: str, arguments: Mapping[str, Any], where: str, where_arguments: str = "arguments"
) -> Any:
    """Import `package.module:function`, call it, and return what it returns.

    Args:
        name: what a config has.
        arguments: keyword arguments.
        where, where_arguments: what messages about the one and the other begin with.

    Raises:
        RequestError: it cannot be imported (see `load_function`), does not take the arguments, or
            raised.
        OSError: it raised that: a file is missing, or the disk is full, and it says so itself.
    """
    function = load_function(name, where)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise RequestError(f"{where_arguments}: {name}: {error}") from None
    except ValueError:
        pass  # a builtin without a signature
    try:
        return function(**arguments)
    except OSError:
        raise
    except (Exception, SystemExit) as error:
        raise RequestError(
            f"{where}: {name} raised {type(error).__name__}: {error} (PYMERGE_DEBUG=1 shows where)"
        ) from error


def as_setup(found: Any, kind: type[_Setup], where: str) -> _Setup:
    """Return what an entry point returned as the dataclass that it stands for.

    Args:
        found: one of these, or a mapping of its fields.
        kind: the dataclass.
        where: what messages begin with.

    Raises:
        RequestError: it is neither, lacks a field that has no default, or has others.
    """
    if isinstance(found, kind):
        return found
    known = fields(kind)  # pyright: ignore[reportArgumentType]
    names = [field.name for field in known]
    needed = [
        one.name for one in known if one.default is MISSING and one.default_factory is MISSING
    ]
    if not isinstance(found, Mapping):
        raise RequestError(
            f"{where} must return {_article(kind.__name__)} or a dictionary of "
            f"{', '.join(names)}; got {type(found).__name__}"
        )
    if any(key not in names for key in found) or any(name not in found for name in needed):
        others = ", ".join(name for name in names if name not in needed)
        raise RequestError(
            f"{where} must return a dictionary with {' and '.join(needed)}, and perhaps {others}; "
            f"got the keys {', '.join(map(str, found)) or 'of nothing'}"
        )
    return kind(**found)


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
