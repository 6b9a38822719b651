"""Checks that all primitives make of their arguments, and the conversion of these for an op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.dtypes import is_float
from pymerge.errors import RequestError
from pymerge.ops.backends import resolve

Tensor = torch.Tensor


def flattened(tensor: Tensor) -> Tensor:
    """Return a tensor in the form that ops accept: contiguous, with one dimension."""
    return tensor.detach().contiguous().view(-1)


def is_wide(*tensors: Tensor) -> bool:
    """Return whether the result is computed in float64; one such input is enough."""
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def delta_dtype(wide: bool) -> torch.dtype:
    """Return the dtype of task vectors."""
    return torch.float64 if wide else torch.float32


def backend_name(name: str | None, tensor: Tensor) -> str:
    """Return the requested backend, or the fastest for a tensor."""
    return resolve(name, tensor.device).NAME


def counters_on(tensor: Tensor, backend: str | None) -> torch.device | str:
    """Return where an op's counters must be."""
    return "cpu" if backend_name(backend, tensor) == "reference" else tensor.device


def require(holds: bool, argument: str, expected: str, got: str) -> None:
    """Raise RequestError about an argument unless a condition holds."""
    if not holds:
        raise RequestError(f"{argument}: expected {expected}; got {got}")


def check_count(name: str, values: Sequence[object], models: Sequence[Tensor]) -> None:
    """Raise RequestError unless there is one value for each model."""
    require(len(values) == len(models), name, f"{len(models)}, one per model", f"{len(values)}")


def check(base: Tensor, models: Sequence[Tensor]) -> None:
    """Raise RequestError unless there are models, all of them float tensors like the base."""
    require(len(models) > 0, "models", "at least one tensor", "none")
    for label, tensor in [("base", base), *((f"models[{k}]", m) for k, m in enumerate(models))]:
        require(isinstance(tensor, Tensor), label, "a tensor", type(tensor).__name__)
        require(is_float(tensor.dtype), label, "a floating-point tensor", f"{tensor.dtype}")
        require(
            tensor.shape == base.shape,
            label,
            f"shape {tuple(base.shape)} like base",
            f"{tuple(tensor.shape)}",
        )
        same = tensor.device == base.device
        require(same, label, f"a tensor on {base.device} like base", f"{tensor.device}")
