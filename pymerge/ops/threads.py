"""Sets the number of threads for a while, and restores the previous number afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pymerge.ops.native import host

__all__ = ["kernel_threads", "torch_threads"]

_lock = threading.Lock()
# The requests in force, each in a list of its own; the last one takes effect.
_requests: list[list[int | None]] = []
_before: int | None = None


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def kernel_threads(count: int | None) -> Iterator[None]:
    """Let the CPU kernels use `count` threads; None means all cores that the process may run on.

    Requests may be nested, and may overlap in several threads. The latest request that has not
    ended takes effect; after the last one ends, the original setting is restored.
    """
    global _before
    mine = [count]
    with _lock:
        before = host.set_threads(count)
        if not _requests:
            _before = before
        _requests.append(mine)
    try:
        yield
    finally:
        with _lock:
            _requests[:] = [one for one in _requests if one is not mine]
            host.set_threads(_requests[-1][0] if _requests else _before)


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """Let torch compute on `count` threads; the context yields the previous number.

    Sums, products and decompositions in torch depend on the number of threads, unless it is 1.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
