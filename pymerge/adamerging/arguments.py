"""Checks the arguments of `AdaMerging` before anything is opened."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pymerge.adamerging.presets import PRESETS
from pymerge.config.schema import read_reference
from pymerge.dtypes import is_float
from pymerge.errors import RequestError, nearest

__all__ = ["check_arguments", "model_names"]


def check_arguments(
    model: Any,
    models: Any,
    *,
    granularity: Any,
    preset: Any,
    heads: Any,
    clamp: Any,
    density: Any,
    names: Any,
    fixed: Any,
    dtype: Any,
) -> None:
    """Raise a RequestError that lists every problem with the arguments of `AdaMerging`."""
    problems: list[str] = []
    if not isinstance(model, nn.Module):
        problems.append(f"model: expected a module, got {type(model).__name__}")
    if not _is_list(models) or not models:
        problems.append(f"models: expected a list of at least one model, got {models!r:.60}")
        raise RequestError(problems)
    count = len(models)
    if not isinstance(granularity, str) and not (_is_list(granularity) and granularity):
        problems.append(
            "granularity: expected 'layer', 'module', 'task' or a list of regular expressions, got "
            f"{granularity!r:.60}"
        )
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        problems.append(
            f"preset: expected one of {known}; got {preset!r}{nearest(str(preset), PRESETS)}"
        )
    if heads is not None:
        problems += _about_heads(heads, count)
    if clamp is not None and clamp != "preset":
        good = _is_list(clamp) and len(clamp) == 2 and all(_is_number(end) for end in clamp)
        if not good or not clamp[0] < clamp[1]:
            problems.append(f"clamp: expected (lowest, highest) or None, got {clamp!r}")
    if not _is_number(density) or not 0 <= density <= 1:
        problems.append(f"density: expected a number in [0, 1], got {density!r}")
    if names is not None:
        problems += _about_names(names, count)
    if dtype is not None and not is_float(dtype):
        problems.append(f"dtype: expected a floating-point dtype, got {dtype!r}")
    if fixed not in ("equal", "base"):
        problems.append(f"fixed: expected 'equal' or 'base', got {fixed!r}")
    if problems:
        raise RequestError(problems)


def _about_heads(heads: Any, count: int) -> list[str]:
    if not _is_list(heads):
        return [f"heads: expected a list, one per model; got {heads!r:.60}"]
    if len(heads) != count:
        return [f"heads: expected {count}, one per model; got {len(heads)}"]
    return [
        f"heads[{k}]: expected a module or a function, got {head!r:.60}"
        for k, head in enumerate(heads)
        if not callable(head)
    ]


def _about_names(names: Any, count: int) -> list[str]:
    if not _is_list(names) or not all(isinstance(name, str) for name in names):
        return [f"names: expected a list of strings, one per model; got {names!r:.60}"]
    if len(names) != count:
        return [f"names: expected {count}, one per model; got {len(names)}"]
    twice = [name for name, times in Counter(names).items() if times > 1]
    return [f"names: expected unique names, got {twice[0]!r} more than once"] if twice else []


def model_names(
    models: Sequence[Any], names: Sequence[str | None] | None = None
) -> tuple[str, ...]:
    """Return the names that tables use for the models; they are unique.

    Args:
        models: paths, or anything else.
        names: the names chosen by the user, or None. The default for a path is its last part (for
            MODEL+ADAPTER, that of the adapter), or the whole path if two last parts are equal. For
            anything else it is "model K".
    """
    chosen = list(names) if names is not None else [None] * len(models)
    paths = [isinstance(model, (str, os.PathLike)) for model in models]
    found = [
        own if own is not None else _last(os.fspath(model)) if path else f"model {k}"
        for k, (model, own, path) in enumerate(zip(models, chosen, paths, strict=True))
    ]
    for numbered in (False, True):
        times = Counter(found)
        for k, name in enumerate(tuple(found)):
            if times[name] > 1 and chosen[k] is None and paths[k]:
                found[k] = f"{name} ({k})" if numbered else os.fspath(models[k])
    return tuple(found)


def _last(path: str) -> str:
    """Return the last part of a path; for MODEL+ADAPTER, that of the adapter."""
    found = read_reference(path, (), lambda _: "", [])
    own = path if found is None else found.adapter or found.path
    return Path(own).name or path


def _is_list(value: Any) -> bool:
    return isinstance(value, (Sequence, nn.ModuleList)) and not isinstance(value, (str, bytes))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
