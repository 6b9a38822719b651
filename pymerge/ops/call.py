"""Calls ops: finds the backend that computes an op, and calls its function.

The ops are specified in `pymerge.ops.specs`. A call on arrays does not need torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pymerge.errors import not_one_of
from pymerge.ops.array import Array
from pymerge.ops.backends import resolve
from pymerge.ops.spec import OpSpec
from pymerge.ops.specs import OPS

__all__ = ["Counters", "Runs", "call", "compute"]

Counters = Any  # numpy arrays, or tensors


class Runs(Protocol):
    """An object that runs ops; see `pymerge.ops.runner`."""

    def call(self, op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None: ...


def call(name: str, *arguments: Any, backend: str | Runs, **keywords: Any) -> None:
    """Call an op on arrays or tensors; counters are numpy arrays or tensors.

    Arrays are passed straight to the CPU kernels; everything else goes through torch. Numpy
    counters are up to date when this returns, wherever the op runs. Counters that are device
    tensors are updated asynchronously, when the device executes the call.

    Args:
        name: an op of `pymerge.ops.specs`, e.g. "ties_".
        arguments: its positional arguments; counters may be numpy arrays.
        backend: a name of `BACKENDS` other than "auto", or an object that runs ops.
        keywords: its keyword arguments.
    """
    if not isinstance(backend, str):
        backend.call(name, arguments, keywords)
        return
    spec = OPS[name]
    if backend == "cpu":
        named = spec.bind(arguments, keywords)
        if isinstance(_first(spec, named), Array):
            named["backend"] = backend
            compute(spec, named)
            return
    import torch

    from pymerge.ops import contract as contract  # declares torch.ops.pymerge

    converted = [_for_torch(argument) for argument in arguments]
    device = _device_of(converted)
    counters: list[tuple[np.ndarray, Any]] = []
    if device is not None and backend != "reference":
        # These backends count on the device; the counts are copied back below.
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                converted[i] = converted[i].to(device)
                counters.append((argument, converted[i]))
    named = {key: _for_torch(value) for key, value in keywords.items()}
    getattr(torch.ops.pymerge, name)(*converted, backend=backend, **named)
    for host, counted in counters:
        host[...] = counted.cpu().numpy()


def compute(spec: OpSpec, named: Mapping[str, Any]) -> None:
    """Compute an op.

    Args:
        spec: the op.
            named: all its arguments by name, in the order of the schema.
    """
    *values, name = named.values()
    first = _first(spec, named)
    backend = resolve(name, "cpu" if isinstance(first, Array) else first.device)
    for argument, words in spec.choices:
        if named[argument] not in words:
            text = not_one_of(named[argument], words)
            raise ValueError(f"backend {backend.NAME!r}: {argument}: {text}")
    if spec.forward is None:
        getattr(backend, spec.function)(*values)
    else:
        spec.forward(backend, *values)


def _first(spec: OpSpec, named: Mapping[str, Any]) -> Any:
    """Return the tensor that determines where a call is computed."""
    first = named[spec.first]
    return first[0] if isinstance(first, (list, tuple)) else first


def _device_of(arguments: list[Any]) -> Any:
    """Return the device of the first tensor that is not on the CPU, or None."""
    for argument in arguments:
        for one in argument if isinstance(argument, list) else [argument]:
            device = getattr(one, "device", None)
            if device is not None and device.type != "cpu":
                return device
    return None


def _for_torch(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        import torch

        return torch.from_numpy(argument)  # the same memory
    if isinstance(argument, Array):
        return argument.tensor()
    if isinstance(argument, (list, tuple)):
        return [_for_torch(one) for one in argument]
    return argument
