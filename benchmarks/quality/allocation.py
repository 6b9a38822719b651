"""Makes malloc keep freed memory, so that large temporary tensors do not need new pages."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# of mallopt, in glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to return memory to the system; return whether glibc is present.

    A block of 32 MB or more, such as the logits of a language model, otherwise comes from the
    system each time, which clears its pages: a third of the time of a training step. The computed
    numbers do not change; the process keeps the most memory that it had.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) for name, value in settings)
