"""Joins the batches of all tasks, so that a step runs the model once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from pymerge.errors import RequestError
from pymerge.statistics.batches import batch_size

__all__ = ["JOINS", "Join", "concatenate", "split_rows"]

Tensor = torch.Tensor
Join = Callable[[list[Any]], Any]

JOINS = ("concatenate",)


def concatenate(batches: Sequence[Any]) -> Any:
    """Return several batches as one: their tensors are concatenated along the first dimension.

    Items of a batch that are not tensors are taken from the first batch.

    Args:
        batches: tensors, tuples or dictionaries, all of one form. Their tensors have equal shapes
            except for the first dimension.

    Raises:
        RequestError: the batches differ in form or shape.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = [tuple(batch.shape) for batch in batches if isinstance(batch, Tensor)]
        if len(shapes) != len(batches) or len({shape[1:] for shape in shapes}) > 1:
            raise RequestError(
                "join: expected batches of equal shapes but for the first dimension, got "
                f"{', '.join(str(shape) for shape in shapes)}; give join=, a function that pads "
                "and concatenates them"
            )
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        _check_forms(all(isinstance(b, Mapping) and set(b) == set(first) for b in batches))
        return {key: concatenate([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        _check_forms(all(isinstance(b, (tuple, list)) and len(b) == len(first) for b in batches))
        return tuple(concatenate(items) for items in zip(*batches, strict=True))
    return first


def _check_forms(equal: bool) -> None:
    if not equal:
        raise RequestError(
            "join: expected batches of one form, tensors, or tuples or dictionaries with the same "
            "items; give join=, a function that makes one batch of them"
        )


def split_rows(output: Any, batches: Sequence[Any]) -> list[Any]:
    """Split a joined batch's output, or its mask, into the parts of each batch.

    Args:
        output: a tensor whose first dimension runs over the examples of all batches, or a tuple,
            dictionary or dataclass of such tensors; every part gets the other tensors in it.
        batches: the batches that were joined.

    Raises:
        RequestError: the output has another number of examples.
    """
    sizes = [batch_size(batch, f"loaders[{task}]") for task, batch in enumerate(batches)]
    total, found = sum(sizes), _leading(output)
    if found is not None and found != total:
        raise RequestError(
            f"join: expected outputs of {total} examples, as many as the batches of all tasks "
            f"have, got {found}"
        )
    return [
        _rows(output, slice(start, stop), total)
        for start, stop in pairwise(accumulate(sizes, initial=0))
    ]


def _leading(output: Any) -> int | None:
    """Return the length of the first tensor that has at least one dimension."""
    if isinstance(output, Tensor):
        return len(output) if output.dim() else None
    if is_dataclass(output) and not isinstance(output, type):
        output = _members(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((n for n in map(_leading, output) if n is not None), None)
    return None


def _members(output: Any) -> dict[str, Any]:
    return {one.name: getattr(output, one.name) for one in fields(output) if one.init}


def _rows(output: Any, rows: slice, total: int) -> Any:
    if isinstance(output, Tensor):
        return output[rows] if output.dim() and len(output) == total else output
    if is_dataclass(output) and not isinstance(output, type):
        parts = {name: _rows(value, rows, total) for name, value in _members(output).items()}
        return replace(output, **parts)
    if isinstance(output, Mapping):
        return {key: _rows(value, rows, total) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_rows(value, rows, total) for value in output))
    if isinstance(output, (tuple, list)):
        return [_rows(value, rows, total) for value in output]
    return output
