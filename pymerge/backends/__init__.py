"""The backends: who computes an op. Each turns tensors into pointers, or is pure torch; no more.

`reference` (pure torch, the definition), `cpu` (C++), `cuda` and `triton`. A backend that cannot be
used says why: `describe()` is what `pymerge info` prints.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pymerge.backends import cpu, cuda, reference, triton
from pymerge.errors import RequestError, nearest

__all__ = ["BACKENDS", "Backend", "describe", "resolve"]


class Backend(Protocol):
    """What a backend module offers. Tensors are contiguous and of equal length; see
    `pymerge._ops`."""

    NAME: str

    def reason(self) -> str | None:
        """Say why the backend cannot be used, or return None."""
        ...

    def weighted_sum(
        self,
        out: torch.Tensor,
        stats: torch.Tensor,
        base: torch.Tensor | None,
        models: Sequence[torch.Tensor],
        weights: Sequence[float],
        scale: float,
        divisor: float,
        wide: bool,
    ) -> None: ...

    def ties(
        self,
        out: torch.Tensor | None,
        stats: torch.Tensor,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
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
        counts: torch.Tensor,
        hot_chunks: torch.Tensor,
        base: torch.Tensor,
        models: Sequence[torch.Tensor],
        lo: Sequence[int],
        shift: Sequence[int],
        hot: Sequence[int],
        wide: bool,
    ) -> None: ...

    def magnitude_equal_counts(
        self,
        counts: torch.Tensor,
        base: torch.Tensor,
        model: torch.Tensor,
        key: int,
        chunk: int,
        wide: bool,
    ) -> None: ...


BACKENDS: dict[str, Any] = {
    "reference": reference,
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
}

_METHODS = ("linear", "task_arithmetic", "ties")
# Devices that a backend takes; reference runs wherever torch does.
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}


def resolve(name: str | None, device: torch.device | str = "cpu") -> Backend:
    """Return the backend of that name, or the fastest that can run on the device for None and
    "auto".

    Raises RequestError with the reason where a backend named explicitly cannot be used.
    """
    kind = torch.device(device).type
    if name is None or name == "auto":
        for candidate in ("cuda", "triton", "cpu"):
            if _DEVICES[candidate] == kind and BACKENDS[candidate].reason() is None:
                return BACKENDS[candidate]
        if kind == "cpu":
            warnings.warn(
                f"pymerge computes with the slow reference backend: {cpu.reason()}",
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
    if name in _DEVICES and _DEVICES[name] != kind:
        raise RequestError(
            f"backend: {name!r} computes on {_DEVICES[name]} tensors, but these are on {kind}"
        )
    return backend


def describe() -> dict[str, Any]:
    """Tell what the native build is, which backends can be used, and which methods each runs."""
    backends = {}
    for name, backend in BACKENDS.items():
        reason = backend.reason()
        backends[name] = {"available": reason is None, "reason": reason or backend.SUMMARY}
    methods = {
        method: {name: entry["available"] or entry["reason"] for name, entry in backends.items()}
        for method in _METHODS
    }
    return {"native": cpu.build(), "backends": backends, "methods": methods}
