"""The return value of the entry point of `pymerge collect`, and each model's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pymerge.entry import as_setup, call_function
from pymerge.errors import RequestError
from pymerge.statistics.config import FUNCTIONS, CollectConfig

__all__ = ["CollectSetup", "call_entry", "functions_of", "loader_of"]

Function = Callable[..., Any]
ForEach = Function | Sequence[Function | None] | Mapping[str, Function | None] | None


@dataclass
class CollectSetup:
    """The return value of a config's entry point (or a dictionary with the same keys).

    model: the architecture, with values of any kind; they are overwritten by each model's. loaders:
    for each model an iterable of batches, as a list in the models' order, or by the models' names.
    logits (for kind fisher), forward, mask (for kind gram): as in `collect_fisher` and
    `collect_gram`; a function for all models, or one for each, like the loaders. Those for the
    other kind are ignored, so that one entry point can serve both.
    """

    model: nn.Module
    loaders: Sequence[Iterable[Any]] | Mapping[str, Iterable[Any]]
    logits: ForEach = None
    forward: ForEach = None
    mask: ForEach = None


def call_entry(config: CollectConfig) -> CollectSetup:
    """Call the entry point and check what it returns.

    Raises:
        RequestError: there is no such function, it does not take the arguments, it raised, or it
            returned something else.
    """
    where = f"{config.where(('entry',))}: entry"
    at = f"{config.where(('arguments',))}: arguments"
    found = call_function(config.entry, config.arguments, where, at)
    setup = as_setup(found, CollectSetup, f"{where}: {config.entry}")
    problems = _problems(setup, config)
    if problems:
        raise RequestError([f"{where}: {config.entry}: {problem}" for problem in problems])
    return setup


def _problems(setup: CollectSetup, config: CollectConfig) -> list[str]:
    problems = []
    if not isinstance(setup.model, nn.Module):
        problems.append(f"model: expected a torch.nn.Module, got {type(setup.model).__name__}")
    problems += _for_each_problems(setup.loaders, "loaders", config)
    for name in FUNCTIONS[config.kind]:
        given = getattr(setup, name)
        if given is None or callable(given):
            continue
        found = _for_each_problems(given, name, config)
        if not found:
            values = given.values() if isinstance(given, Mapping) else given
            wrong = [one for one in values if one is not None and not callable(one)]
            if wrong:
                found = [f"{name}: expected functions, got {type(wrong[0]).__name__}"]
        problems += found
    return problems


def _for_each_problems(given: Any, name: str, config: CollectConfig) -> list[str]:
    """Check that there is one item for each model."""
    names = [model.name for model in config.models]
    if isinstance(given, Mapping):
        twice = [one for k, one in enumerate(names) if one in names[:k]]
        if twice:
            return [f"{name}: by name, but two models are called {twice[0]!r}; name them"]
        missing = [one for one in names if one not in given]
        if missing:
            keys = ", ".join(repr(key) for key in given) or "nothing"
            return [f"{name}: has none for the model {missing[0]!r}; it has {keys}"]
        return []
    if not isinstance(given, Sequence) or isinstance(given, (str, torch.Tensor)):
        return [
            f"{name}: expected a list with one for each of {len(names)} models, or a dictionary by "
            f"their names; got {type(given).__name__}"
        ]
    if len(given) != len(names):
        return [f"{name}: expected {len(names)}, one for each model; got {len(given)}"]
    return []


def loader_of(setup: CollectSetup, config: CollectConfig, index: int) -> tuple[Any, int | str]:
    """Return a model's batches, and their key: a name or a position."""
    if isinstance(setup.loaders, Mapping):
        name = config.models[index].name
        return setup.loaders[name], name
    return setup.loaders[index], index


def functions_of(setup: CollectSetup, config: CollectConfig, index: int) -> dict[str, Any]:
    """Return the functions for collecting a model's statistics."""
    found = {}
    for name in FUNCTIONS[config.kind]:
        given = getattr(setup, name)
        if isinstance(given, Mapping):
            given = given[config.models[index].name]
        elif given is not None and not callable(given):
            given = given[index]
        found[name] = given
    return found
