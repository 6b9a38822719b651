"""The backends that compute ops. A backend passes pointers to kernels or is pure torch.

They are `reference` (pure torch, the definition), `cpu` (C++), `cuda` and `triton`. A backend is a
module with a NAME, a SUMMARY, `reason()`, `slots()`, and a function for each op that it supports
(`OpSpec.function`). `reason()` returns why the backend cannot be used, or None. The functions of
`cpu` accept `Array`s and numpy counters as well as torch tensors.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.errors import RequestError, not_one_of
from pymerge.ops.specs import OPS

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKENDS",
    "choose",
    "describe",
    "has_kernel",
    "resolve",
    "takes_fewer_models",
]


class _Backends(Mapping[str, Any]):
    """The backend modules by name. Each is imported on first access, because some import torch."""

    _MODULES: ClassVar[dict[str, str]] = {
        "reference": "pymerge.ops.reference.backend",
        "cpu": "pymerge.ops.native.cpu",
        "cuda": "pymerge.ops.native.cuda",
        "triton": "pymerge.ops.triton.backend",
    }

    def __init__(self) -> None:
        self._imported: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        found = self._imported.get(name)
        if found is None:
            found = self._imported[name] = importlib.import_module(self._MODULES[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._MODULES)

    def __len__(self) -> int:
        return len(self._MODULES)


BACKENDS: Mapping[str, Any] = _Backends()

# The device type of each backend; reference runs wherever torch does.
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}


def _device(name: str) -> str | None:
    """Return the device type whose tensors a backend accepts at present; None for any."""
    return BACKENDS["triton"].device() if name == "triton" else _DEVICES.get(name)


def resolve(name: str | None, device: torch.device | str = "cpu") -> Any:
    """Return the backend of that name; for None and "auto", the fastest that can run on the device.

    Raises:
        RequestError: a backend named explicitly cannot be used; the message gives the reason.
    """
    kind = device.partition(":")[0] if isinstance(device, str) else device.type
    if name is None or name == "auto":
        for candidate in ("cuda", "triton", "cpu"):
            if _DEVICES[candidate] != kind or _device(candidate) != kind:
                continue  # Triton's interpreter runs on the CPU, but only on explicit request
            if BACKENDS[candidate].reason() is None:
                return BACKENDS[candidate]
        if kind == "cpu":
            warnings.warn(
                f"pymerge computes with the slow reference backend: {BACKENDS['cpu'].reason()}",
                RuntimeWarning,
                stacklevel=2,
            )
        return BACKENDS["reference"]
    if name not in BACKENDS:
        raise RequestError(f"backend: {not_one_of(name, ['auto', *BACKENDS])}")
    backend = BACKENDS[name]
    reason = backend.reason()
    if reason is not None:
        raise RequestError(f"backend: {name!r} is not available: {reason}")
    expected = _device(name)
    if expected is not None and expected != kind:
        raise RequestError(
            f"backend: {name!r} computes on {expected} tensors, but these are on {kind}"
        )
    return backend


def has_kernel(name: str, op: str) -> bool:
    """Return whether a backend supports an op of `pymerge.ops.specs`."""
    return op in OPS and hasattr(BACKENDS[name], OPS[op].function)


def choose(
    op: str,
    name: str | None,
    device: torch.device | str = "cpu",
    without: Collection[str] = (),
) -> str:
    """Return the name of the backend that runs an op.

    It is the one that was named. For None and "auto" it is the fastest one that can run on the
    device, has a kernel for the op, and is not in `without`.

    Raises:
        RequestError: a backend named explicitly cannot be used.
    """
    first = resolve(name, device).NAME
    if name not in (None, "auto"):
        return first
    kind = str(device).partition(":")[0]
    for other in (first, "triton", "cpu"):
        if other in without or not has_kernel(other, op) or BACKENDS[other].reason() is not None:
            continue
        if other == first or _DEVICES[other] == kind == _device(other):
            return other
    return "reference"


def takes_fewer_models(error: ValueError) -> bool:
    """Return whether a backend refused a call because a launch cannot take so many models."""
    return "more models than a launch" in str(error)


def resolve_for(
    method: str, kernels: Sequence[str], name: str | None, device: torch.device | str = "cpu"
) -> Any:
    """Return the backend that runs a method.

    It is chosen as in `resolve`, but falls back to the reference if the fastest one available has
    no kernels for the method.

    Raises:
        RequestError: a backend named explicitly has no kernels for the method.
    """
    chosen = resolve(name, device)
    if chosen.NAME in kernels:
        return chosen
    if name is None or name == "auto":
        return BACKENDS["reference"]
    raise RequestError(
        f"backend: {name!r} has no kernels for {method}, which runs on {', '.join(kernels)}"
    )


def describe() -> dict[str, Any]:
    """Describe the native build, the backends that can be used, and the choice of "auto"."""
    backends = {}
    for name, backend in BACKENDS.items():
        reason = backend.reason()
        backends[name] = {"available": reason is None, "reason": reason or backend.SUMMARY}
    return {
        "native": BACKENDS["cpu"].build(),
        "backends": backends,
        "auto": {kind: _automatic(kind, backends) for kind in ("cpu", "cuda")},
    }


def _automatic(kind: str, backends: Mapping[str, Any]) -> str:
    """Name the backends that run on a kind of device if none is requested."""
    for name in ("cuda", "triton", "cpu"):
        if _DEVICES[name] == kind == _device(name) and backends[name]["available"]:
            return f"{name}, and reference for ops that it has no kernels for"
    missing = [f"{name}: {backends[name]['reason']}" for name in _DEVICES if _DEVICES[name] == kind]
    return f"reference; {'; '.join(missing)}"
