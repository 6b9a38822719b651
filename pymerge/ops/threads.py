"""How many threads compute: set for a while, and what was set before holds again afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pymerge.ops.native import host

__all__ = ["kernel_threads", "torch_threads"]

_lock = threading.Lock()
# What is asked for now, each request in a list of its own; the last one holds.
_requests: list[list[int | None]] = []
_before: int | None = None


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def kernel_threads(count: int | None) -> Iterator[None]:
    """Let the CPU kernels use `count` threads; None means all cores that the process may run on.

    Requests may be nested, and may overlap in several threads: the latest one that has not ended
    holds, and after the last one what was set before the first.
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
    """Let torch compute on `count` threads; the context is the number that it had before.

    Sums, products and decompositions of torch depend on the number of threads; on one they do not.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
