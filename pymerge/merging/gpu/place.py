"""Decides where a merge of files is computed, and by which backends."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pymerge.errors import RequestError
from pymerge.merging.gpu.device import Device, open_device
from pymerge.methods import MethodSpec
from pymerge.ops.backends import BACKENDS, resolve_for

__all__ = ["Place", "choose_place", "planned_device"]

_GPU = ("cuda", "triton")


@dataclass(frozen=True)
class Place:
    """Where a merge is computed.

    backend: the backend that computes; on a device, if none was named, "auto": for each op the
        fastest.
    device: the GPU, or None for the CPU.
    why: the reason for both, in words.
    warnings: consequences that the user may not expect.
    ops: the backend for ops of a method that has no kernels of its own, if not `backend`.
    """

    backend: str
    device: Device | None
    why: str
    warnings: tuple[str, ...] = ()
    ops: str | None = None


def _wants_gpu(device: str, backend: str | None) -> bool:
    """Return whether a request asks for a GPU.

    "auto" is the CPU: it merges files as fast as the page cache or a disk delivers them.
    """
    if device == "auto":
        return backend == "cuda" or (backend == "triton" and BACKENDS["triton"].device() == "cuda")
    return device != "cpu"


def planned_device(method: MethodSpec, device: str, backend: str | None) -> str:
    """Return where a merge would run if everything that it needs is available."""
    if not _wants_gpu(device, backend):
        return "cpu"
    able = backend not in (None, "auto") or any(name in method.backends for name in _GPU)
    return ("cuda" if device == "auto" else device) if able else "cpu"


def choose_place(
    method: MethodSpec,
    device: str,
    backend: str | None,
    opened: Callable[[str], Device] = open_device,
) -> Place:
    """Choose where a method runs.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: a name of `BACKENDS`, None or "auto".
        opened: returns a device by its name.

    Raises:
        RequestError: the request names something unavailable, or contradicts itself.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise RequestError(f"device: expected auto, cpu, cuda or cuda:N; got {device!r}")
    named = backend not in (None, "auto")
    if not _wants_gpu(device, backend):
        return _on_cpu(method, backend, "it was asked for" if named else None)
    problems: list[str] = []
    gpu: Device | None = None
    try:
        if named and backend != "reference":
            resolve_for(method.name, method.backends, backend, "cuda")
    except RequestError as error:
        problems += error.problems
    try:
        gpu = opened("cuda" if device == "auto" else device)
    except RequestError as error:
        problems += error.problems
    if problems or gpu is None:
        raise RequestError(problems)
    if named:
        return Place(str(backend), gpu, f"backend {backend} was asked for")
    missing = gpu.missing()
    if all(missing.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise RequestError(
            f"device: {device!r} is not available: no backend can compute there: {reasons}"
        )
    kernels = [name for name in missing if name in method.backends]
    if all(missing[name] for name in kernels):
        without = (
            f"{kernels[0]}, which has kernels for it, is not available: {missing[kernels[0]]}"
            if kernels
            else f"no backend has kernels for {method.name} on a GPU"
        )
        place = _on_cpu(method, None, without)
        warning = f"{method.name} is computed on the CPU: {without}"
        return Place(place.backend, None, place.why, (warning, *place.warnings), place.ops)
    left = "".join(f"; {name}: {reason}" for name, reason in missing.items() if reason)
    return Place("auto", gpu, f"the device was asked for; the fastest there for each op{left}")


def _on_cpu(method: MethodSpec, backend: str | None, why: str | None) -> Place:
    chosen = resolve_for(method.name, method.backends, backend).NAME
    if chosen == "reference" and backend in (None, "auto"):
        lacks = BACKENDS["cpu"].reason() or f"{method.name} has no native kernels yet"
        warning = f"computed with the slow reference backend: {lacks}"
        ops = "auto" if BACKENDS["cpu"].reason() is None else None
        return Place(chosen, None, why or lacks, (warning,), ops)
    return Place(chosen, None, why or "the fastest on the CPU, where files are merged by default")
