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
    """Import `package.module:function`, also from the current directory, and return it.

    Args:
        name: the text in a config or on a command line.
        where: the beginning of messages.

    Raises:
        RequestError: it has another form, cannot be imported, or is not callable.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise RequestError(f"{where}: expected package.module:function, got {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: finds a script beside the config
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        # whatever the module itself raises: the user asked for the function
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
        name: the text in a config.
        arguments: keyword arguments.
        where, where_arguments: the beginnings of messages about the one and the other.

    Raises:
        RequestError: it cannot be imported (see `load_function`), does not accept the arguments, or
            raised an exception.
        OSError: it raised this: a file is missing or the disk is full, and the message says so.
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
    """Return the result of an entry point as the dataclass that it represents.

    Args:
        found: an instance, or a mapping of its fields.
        kind: the dataclass.
        where: the beginning of messages.

    Raises:
        RequestError: it is neither, lacks a field that has no default, or has unknown fields.
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
