"""Batches of any structure: their examples, the model's inputs and outputs, and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pymerge.errors import RequestError

__all__ = [
    "Forward",
    "batch_size",
    "batches",
    "check_count",
    "check_module",
    "default_forward",
    "device_of",
    "evaluating",
    "labels_of",
    "logits_of",
    "mapped",
    "shared_names",
    "take",
    "tensors_in",
]

Forward = Callable[[nn.Module, Any], Any]
_LABELS = ("labels", "label")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch without its labels: `model(x)`, `model(*inputs)`, `model(**inputs)`.

    Args:
        batch: a tensor; a tuple or list of inputs, with the labels last (if it has more than one
            item); or a mapping of keyword arguments, with "labels" or "label".
    """
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in _LABELS})
    if isinstance(batch, (tuple, list)):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


def logits_of(output: Any, where: str) -> torch.Tensor:
    """Return the logits of a model's output: a tensor, `.logits`, ["logits"], or the first item."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None:
        found = output
    if not isinstance(found, torch.Tensor):
        raise RequestError(
            f"{where}: the model returned {type(output).__name__} without logits; give "
            "logits=callable(model, batch)"
        )
    return found


def labels_of(batch: Any, where: str) -> torch.Tensor:
    """Return the labels in a batch."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABELS if batch.get(key) is not None), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[-1]
    if not isinstance(found, torch.Tensor):
        raise RequestError(
            f"{where}: labels are needed, but the batch has none; expected a mapping with 'labels' "
            "or a tuple that ends with them"
        )
    return found


def batches(
    loader: Iterable[Any], samples: int, device: torch.device, where: str
) -> Iterator[tuple[int, Any, int]]:
    """Yield (batch number, batch on the device, its number of examples) up to `samples` examples.

    Raises RequestError if there are no examples.
    """
    if isinstance(loader, (torch.Tensor, str, Mapping)) or not isinstance(loader, Iterable):
        raise RequestError(
            f"{where}: loader: expected batches (a DataLoader or a list), got "
            f"{type(loader).__name__}"
        )
    left = samples
    for number, given in enumerate(loader):
        batch = _plain(given, device)
        size = batch_size(batch, f"{where}: batch {number}")
        if size > left:
            batch, size = take(batch, 0, left), left
        if size:
            yield number, batch, size
        left -= size
        if left == 0:
            break
    if left == samples:
        raise RequestError(f"{where}: loader: is empty; expected at least one example")


def _plain(value: Any, device: torch.device) -> Any:
    """Move tensors to a device, and convert mappings to plain dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _plain(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, device) for item in value)
    return value


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """Return all tensors in a batch."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [tensor for item in batch.values() for tensor in tensors_in(item)]
    if isinstance(batch, (tuple, list)):
        return [tensor for item in batch for tensor in tensors_in(item)]
    return []


def batch_size(batch: Any, where: str) -> int:
    """Return the first dimension of the first tensor that has one."""
    for tensor in tensors_in(batch):
        if tensor.dim() > 0:
            return len(tensor)
    raise RequestError(f"{where}: expected a tensor in it, of shape [examples, ...]")


def take(batch: Any, start: int, stop: int) -> Any:
    """Return examples [start, stop) of a batch: of every tensor with as many rows as the first."""
    size = next(len(tensor) for tensor in tensors_in(batch) if tensor.dim() > 0)
    return mapped(batch, lambda tensor: tensor[start:stop], size)


def mapped(batch: Any, change: Callable[[torch.Tensor], Any], size: int) -> Any:
    """Apply a function to each tensor of `size` rows."""
    if isinstance(batch, torch.Tensor):
        return change(batch) if batch.dim() > 0 and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: mapped(item, change, size) for key, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(mapped(item, change, size) for item in batch)
    return batch


def check_count(value: int, name: str, where: str) -> None:
    """Raise RequestError unless the value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"{where}: {name}: expected an integer >= 1, got {value!r}")


def check_module(model: Any, where: str) -> None:
    if not isinstance(model, nn.Module):
        raise RequestError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode (no dropout, no running statistics), and restore it."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def shared_names(model: nn.Module) -> dict[str, str]:
    """Return {other name of a shared parameter: its first name}."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases
