"""The backends: who computes an op. Each turns tensors into pointers, or is pure torch; no more.

`reference` (pure torch, the definition), `cpu` (C++), `cuda` and `triton`. A backend that cannot be
used says why: `describe()` is what `pymerge info` prints.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pymerge.errors import RequestError, nearest
from pymerge.ops.array import Flat

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKENDS",
    "Backend",
    "choose",
    "describe",
    "has_kernel",
    "resolve",
    "takes_fewer_models",
]


class Backend(Protocol):
    """What a backend module offers. Tensors are contiguous and of equal length, counters writable;
    see `pymerge.ops.contract`. All take torch tensors, `cpu` also `Array` and counters of numpy."""

    NAME: str
    SUMMARY: str

    def reason(self) -> str | None:
        """Say why the backend cannot be used, or return None."""
        ...

    def weighted_sum(
        self,
        out: Flat,
        stats: Any,
        base: Flat | None,
        models: Sequence[Flat],
        weights: Sequence[float],
        scale: float,
        divisor: float,
        wide: bool,
    ) -> None: ...

    def ties(
        self,
        out: Flat | None,
        stats: Any,
        base: Flat,
        models: Sequence[Flat],
        thresholds: Sequence[int],
        weights: Sequence[float],
        weighting: str,
        merge: str,
        elect: str,
        zero_sign: int,
        scale: float,
        want_signs: bool,
        wide: bool,
    ) -> None: ...

    def slots(self) -> int:
        """Return how many slots of counters `magnitude_histogram` can use at once."""
        ...

    def magnitude_histogram(
        self,
        counts: Any,
        hot_chunks: Any,
        base: Flat,
        models: Sequence[Flat],
        lo: Sequence[int],
        shift: Sequence[int],
        hot: Sequence[int],
        wide: bool,
    ) -> None: ...

    def magnitude_equal_counts(
        self,
        counts: Any,
        base: Flat,
        model: Flat,
        key: int,
        chunk: int,
        wide: bool,
    ) -> None: ...


class _Backends(Mapping[str, Any]):
    """The backend modules by name, each imported when it is asked for: some import torch."""

    _MODULES: ClassVar[dict[str, str]] = {
        "reference": "pymerge.ops.reference.backend",
        "cpu": "pymerge.ops.native.marshal",
        "cuda": "pymerge.ops.native.marshal_cuda",
        "triton": "pymerge.ops.triton.backend",
    }

    def __getitem__(self, name: str) -> Any:
        return importlib.import_module(self._MODULES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._MODULES)

    def __len__(self) -> int:
        return len(self._MODULES)


BACKENDS: Mapping[str, Any] = _Backends()

# Devices that a backend is for; reference runs wherever torch does.
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}


def _device(name: str) -> str | None:
    """Return the type of device whose tensors a backend takes now; None for any."""
    return BACKENDS["triton"].device() if name == "triton" else _DEVICES.get(name)


def resolve(name: str | None, device: torch.device | str = "cpu") -> Backend:
    """Return the backend of that name, or the fastest that can run on the device for None and
    "auto".

    Raises RequestError with the reason where a backend named explicitly cannot be used.
    """
    kind = str(device).partition(":")[0]
    if name is None or name == "auto":
        for candidate in ("cuda", "triton", "cpu"):
            if _DEVICES[candidate] != kind or _device(candidate) != kind:
                continue  # Triton's interpreter runs on the CPU, but only where it is asked for
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
        known = ", ".join(["auto", *BACKENDS])
        raise RequestError(
            f"backend: expected one of {known}; got {name!r}{nearest(name, BACKENDS)}"
        )
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


# Ops that are a mode of a backend's function; all others are called as the function is.
_FUNCTIONS = {"task_arithmetic_": "weighted_sum", "ties_signs_": "ties"}


def has_kernel(name: str, op: str) -> bool:
    """Tell whether a backend has an op of `pymerge.ops.contract`."""
    return hasattr(BACKENDS[name], _FUNCTIONS.get(op, op.removesuffix("_")))


def choose(
    op: str,
    name: str | None,
    device: torch.device | str = "cpu",
    without: Collection[str] = (),
) -> str:
    """Return the name of the backend that runs an op: the one that was named, or, for None and
    "auto", the fastest that can run on the device, has a kernel for it, and is not in `without`.

    Raises RequestError where a backend named explicitly cannot be used.
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
    """Tell whether a backend refused a call because a launch cannot take so many models."""
    return "more models than a launch" in str(error)


def resolve_for(
    method: str, kernels: Sequence[str], name: str | None, device: torch.device | str = "cpu"
) -> Backend:
    """Return the backend that runs a method: as `resolve`, or the reference where the fastest that
    can run has no kernels for it.

    Raises RequestError where a backend named explicitly has none.
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
    """Tell what the native build is, which backends can be used, and which methods each runs."""
    backends = {}
    for name, backend in BACKENDS.items():
        reason = backend.reason()
        backends[name] = {"available": reason is None, "reason": reason or backend.SUMMARY}
    from pymerge.methods import METHODS

    methods = {
        method: {
            name: (entry["available"] or entry["reason"])
            if name in spec.backends
            else f"no kernels: the reference computes it ({spec.torch_because or 'not yet'})"
            for name, entry in backends.items()
        }
        for method, spec in METHODS.items()
    }
    return {
        "native": BACKENDS["cpu"].build(),
        "backends": backends,
        "auto": {kind: _automatic(kind, backends) for kind in ("cpu", "cuda")},
        "methods": methods,
        "analyze": "cpu, or reference; GPUs have no kernels for it: what is there is copied here",
    }


def _automatic(kind: str, backends: Mapping[str, Any]) -> str:
    """Say what runs on a kind of device where no backend is named."""
    for name in ("cuda", "triton", "cpu"):
        if _DEVICES[name] == kind == _device(name) and backends[name]["available"]:
            return f"{name}, and reference for what it has no kernels for"
    missing = [f"{name}: {backends[name]['reason']}" for name in _DEVICES if _DEVICES[name] == kind]
    return f"reference; {'; '.join(missing)}"
