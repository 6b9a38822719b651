"""Structures of tensors: a tensor, a list of tensors, a state dict. Here they are all converted to
dictionaries of tensors by name, compared with each other, and converted back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from pymerge.dtypes import is_float
from pymerge.errors import RequestError

__all__ = [
    "Tensors",
    "check_tensors",
    "match_tensors",
    "named_tensors",
    "shown_name",
    "structured",
    "tied_names",
]

Tensors = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


def match_tensors(
    where: str, base: Any, models: Sequence[Any]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Return base and models as dictionaries of compatible tensors, by their labels, and the name
    of each tensor in messages; raise RequestError listing what is not compatible."""
    inputs = {"base": named_tensors(base, f"{where}: base", base)}
    inputs |= {
        f"models[{k}]": named_tensors(model, f"{where}: models[{k}]", base)
        for k, model in enumerate(models)
    }
    check_tensors(where, inputs, base)
    return inputs, {name: shown_name(name, base) for name in inputs["base"]}


def named_tensors(value: Any, where: str, like: Any) -> dict[str, torch.Tensor]:
    """Return a structure as a dictionary of tensors; names of lists sort in the list's order."""
    kinds = {torch.Tensor: "a tensor", Mapping: "a state dict", Sequence: "a list of tensors"}
    kind = next((k for k in kinds if isinstance(value, k)), None)
    expected = next((k for k in kinds if isinstance(like, k)), None)
    if kind is None or isinstance(value, str):
        raise RequestError(
            f"{where}: expected a tensor, a list of tensors or a state dict, got "
            f"{type(value).__name__}"
        )
    if kind is not expected and expected is not None:
        raise RequestError(f"{where}: expected {kinds[expected]} like the first, got {kinds[kind]}")
    if kind is torch.Tensor:
        items = {"": value}
    elif kind is Mapping:
        items = dict(value)
    else:
        items = {f"{index:012d}": tensor for index, tensor in enumerate(value)}
    for name, tensor in items.items():
        if not isinstance(name, str):
            raise RequestError(f"{where}: keys must be strings, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise RequestError(
                f"{where}{_suffix(name, value)}: expected a tensor, got {type(tensor).__name__}"
            )
    return items


def _suffix(name: str, like: Any) -> str:
    if isinstance(like, torch.Tensor):
        return ""
    return f"[{name!r}]" if isinstance(like, Mapping) else f"[{int(name)}]"


def shown_name(name: str, like: Any) -> str:
    """Return the name of a tensor in messages."""
    return f"tensor{_suffix(name, like)}" if _suffix(name, like) else "the tensor"


def check_tensors(where: str, inputs: Mapping[str, dict[str, torch.Tensor]], like: Any) -> None:
    """Raise RequestError listing every reason why tensors cannot be merged, or differ from the
    first input's: keys, shapes, dtypes, devices."""
    labels = list(inputs)
    leader, first = labels[0], inputs[labels[0]]
    problems = []

    def suffix(name: str) -> str:
        return _suffix(name, like)

    for label in labels:
        for name, tensor in inputs[label].items():
            reason = _refusal(tensor)
            if reason is not None:
                problems.append(f"{where}: {label}{suffix(name)}: {reason}")
    for label in labels[1:]:
        tensors = inputs[label]
        for name in first.keys() - tensors.keys():
            problems.append(f"{where}: {label} lacks {suffix(name) or 'the tensor'} of {leader}")
        for name in tensors.keys() - first.keys():
            problems.append(f"{where}: {label}{suffix(name)} is not in {leader}")
        for name in first.keys() & tensors.keys():
            mine, tensor = first[name], tensors[name]
            shown = f"{where}: {label}{suffix(name)}"
            if mine.shape != tensor.shape:
                problems.append(
                    f"{shown} has shape {tuple(tensor.shape)}, expected {tuple(mine.shape)} like "
                    f"{leader}"
                )
            floats = mine.is_floating_point(), tensor.is_floating_point()
            if floats[0] != floats[1] or (not floats[0] and mine.dtype != tensor.dtype):
                problems.append(
                    f"{shown} has dtype {tensor.dtype}, expected {mine.dtype} like {leader}"
                )
            if mine.device != tensor.device:
                problems.append(
                    f"{shown} is on {tensor.device}, expected {mine.device} like {leader}"
                )
    if problems:
        raise RequestError(sorted(problems))


def _refusal(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be merged, or None."""
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout} cannot be merged; make it dense"
    unknown = tensor.is_floating_point() and not is_float(tensor.dtype)
    if unknown or tensor.is_complex() or tensor.is_quantized:
        return f"dtype {tensor.dtype} cannot be merged; convert it"
    return None


def tied_names(inputs: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Return {name: the earlier name with which it shares memory in the first input and equals in
    all}."""
    seen: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    first, *others = inputs.values()
    for name, tensor in first.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        earlier = seen.setdefault(memory, name)
        if earlier == name:
            continue
        if all(
            other[name].data_ptr() == other[earlier].data_ptr()
            or torch.equal(other[name], other[earlier])
            for other in others
        ):
            tied[name] = earlier
    return tied


def structured(like: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return tensors by name in the structure of another value: undoes `named_tensors`."""
    if isinstance(like, torch.Tensor):
        return tensors[""]
    if isinstance(like, Mapping):
        if type(like) is dict:
            return tensors
        try:
            return cast(Any, type(like))(tensors)
        except TypeError:
            return tensors
    values = [tensors[name] for name in sorted(tensors)]
    return tuple(values) if isinstance(like, tuple) else values
