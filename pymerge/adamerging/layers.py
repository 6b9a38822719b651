"""Selects the tensors of a model that are merged, and the coefficients that each of them uses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pymerge.dtypes import is_float
from pymerge.errors import RequestError, nearest

__all__ = ["Grouping", "Layers", "group_layers", "load_tensors", "match_layers"]

Tensor = torch.Tensor
StateDict = Mapping[str, Tensor]
Granularity = str | Sequence[str]

_SHOWN = 5  # names listed in a message


def load_tensors(model: Any, label: str) -> dict[str, Tensor]:
    """Return the tensors of a model: a state dict, a module, or the path of a checkpoint.

    A checkpoint is mapped, not read: a tensor costs memory only while it is used. For
    MODEL+ADAPTER, the tensors that the adapter changes are computed and held in memory.
    """
    if isinstance(model, (str, os.PathLike)):
        return _mapped(os.fspath(model), label)
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    if not isinstance(model, Mapping):
        raise RequestError(
            f"{label}: expected a state dict, a module or the path of a checkpoint, got "
            f"{type(model).__name__}"
        )
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise RequestError(
                f"{label}[{name!r}]: expected tensors by name, got {type(tensor).__name__}"
            )
    return dict(model)


def _mapped(path: str, label: str) -> dict[str, Tensor]:
    from pymerge.config.schema import read_reference
    from pymerge.plan.inputs import open_model

    problems: list[str] = []
    found = read_reference(path, (), lambda _: label, problems)
    if found is None:
        raise RequestError(problems)
    checkpoint = open_model(found.path, found.adapter, label)
    return {
        name: checkpoint.flat(name).view(checkpoint.tensors[checkpoint.tied.get(name, name)].shape)
        for name in (*checkpoint.tensors, *checkpoint.tied)
    }


@dataclass(frozen=True)
class Layers:
    """The tensors of an architecture, divided into merged and fixed ones.

    Attributes:
        merged: parameters that are merged, in the module's order.
        fixed: parameters and buffers that are taken from the base. They must not differ between
            models, unless the caller permits it.
    """

    merged: tuple[str, ...]
    fixed: tuple[str, ...]


def match_layers(
    architecture: nn.Module,
    base: StateDict,
    models: Sequence[StateDict],
    *,
    only_trainable: bool,
    fixed: str,
) -> Layers:
    """Divide the tensors into merged and fixed ones; raise a RequestError listing every mismatch.

    Args:
        only_trainable: merge only the parameters of `architecture` that require a gradient, else
            all.
        fixed: "equal" requires that tensors that are not merged are the same in all models; "base"
            takes the base's.
    """
    parameters = dict(architecture.named_parameters())
    buffers = dict(architecture.named_buffers())
    merged = [name for name, p in parameters.items() if p.requires_grad or not only_trainable]
    problems: list[str] = []
    if not merged:
        problems.append(
            "model: expected parameters that require a gradient, which preset 'fusion_bench' "
            "merges; got none (all are frozen)"
            if parameters
            else "model: expected a module with parameters, got none"
        )
    inputs = [("base", base), *((f"models[{k}]", model) for k, model in enumerate(models))]
    for label, tensors in inputs:
        problems += _misfits(label, tensors, parameters)
    kept = [name for name in (*parameters, *buffers) if name in base and name not in set(merged)]
    if not problems and fixed == "equal":
        problems += _differing(kept, base, models, buffers)
    if problems:
        raise RequestError(problems)
    return Layers(tuple(merged), tuple(kept))


def _misfits(label: str, tensors: StateDict, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    missing = [name for name in parameters if name not in tensors]
    problems: list[str] = []
    if missing:
        hint = nearest(missing[0], tensors)
        problems.append(
            f"{label}: does not fit the architecture: lacks {_few(missing)} of its "
            f"{len(parameters)} parameters{hint}"
        )
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != parameter.shape:
            problems.append(
                f"{label}[{name!r}]: expected shape {tuple(parameter.shape)} like the "
                f"architecture, got {tuple(tensor.shape)}"
            )
        elif not is_float(tensor.dtype):
            problems.append(
                f"{label}[{name!r}]: expected a floating-point tensor, got {tensor.dtype}"
            )
    return problems


def _differing(
    names: Sequence[str], base: StateDict, models: Sequence[StateDict], buffers: Mapping[str, Any]
) -> list[str]:
    problems: list[str] = []
    for k, model in enumerate(models):
        differ = [
            name for name in names if name in model and not torch.equal(model[name], base[name])
        ]
        if differ:
            what = "a buffer" if differ[0] in buffers else "a frozen parameter"
            problems.append(
                f"models[{k}][{differ[0]!r}]: {what} is not merged and must equal the base's, but "
                f"differs (so do {len(differ) - 1} more); fixed='base' takes the base's"
            )
    return problems


@dataclass(frozen=True)
class Grouping:
    """The coefficient of each layer: `index[l]` is a column of the table; `names` names the
    columns."""

    names: tuple[str, ...]
    index: tuple[int, ...]


def group_layers(layers: Sequence[str], granularity: Granularity) -> Grouping:
    """Group layers by a named granularity, or by regular expressions.

    Args:
        layers: names of tensors.
        granularity: "layer" (each tensor has coefficients of its own, as in the authors' code),
            "module" (weight and bias of a module share them), "task" (all tensors share them), or
            regular expressions. The first expression that is found in a name applies: tensors in
            which it matches the same text share coefficients, e.g.
            [r"layer\\.\\d+\\."]. Tensors that match none have their own.
    """
    if isinstance(granularity, str):
        keys = {
            "layer": lambda name: name,
            "module": lambda name: name.rpartition(".")[0] or name,
            "task": lambda name: "all",
        }
        if granularity not in keys:
            raise RequestError(
                f"granularity: expected 'layer', 'module', 'task' or a list of regular "
                f"expressions, got {granularity!r}{nearest(granularity, keys)}"
            )
        named = [keys[granularity](name) for name in layers]
    else:
        named = _by_expressions(layers, list(granularity))
    order = {key: number for number, key in enumerate(dict.fromkeys(named))}
    return Grouping(tuple(order), tuple(order[key] for key in named))


def _by_expressions(layers: Sequence[str], expressions: list[str]) -> list[str]:
    compiled = [_compiled(expression, number) for number, expression in enumerate(expressions)]
    named = []
    for name in layers:
        found = next((m for e in compiled if (m := e.search(name))), None)
        named.append(name if found is None else f"{found.group(0)}")
    unused = [e.pattern for e in compiled if not any(e.search(name) is not None for name in layers)]
    if unused:
        raise RequestError(
            f"granularity: expected expressions that are found in a tensor's name; "
            f"{unused[0]!r} is found in none (such as {layers[0]!r})"
        )
    return named


def _compiled(expression: str, number: int) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, TypeError) as error:
        raise RequestError(
            f"granularity[{number}]: expected a regular expression, got {expression!r}: {error}"
        ) from None


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
