"""The CPU backend: calls of the C++ kernels on host memory."""

from __future__ import annotations

from functools import partial

from pymerge.ops.native import kernels
from pymerge.ops.native.host import HostCall, threads
from pymerge.ops.native.host import build as build
from pymerge.ops.native.host import reason as reason
from pymerge.ops.native.host import set_threads as set_threads
from pymerge.ops.native.host import supported_isas as supported_isas
from pymerge.ops.native.host import use_isa as use_isa

NAME = HostCall.NAME
SUMMARY = "C++ kernels"


def slots() -> int:
    """Return how many slots of counters `magnitude_histogram` can use at once: one per thread."""
    return threads()


weighted_sum = partial(kernels.weighted_sum, HostCall)
streaming_floor = partial(kernels.streaming_floor, HostCall)
ties = partial(kernels.ties, HostCall)
magnitude_histogram = partial(kernels.magnitude_histogram, HostCall)
magnitude_equal_counts = partial(kernels.magnitude_equal_counts, HostCall)
sparse_merge = partial(kernels.sparse_merge, HostCall)
pointwise = partial(kernels.pointwise, HostCall)
chunk_sums = partial(kernels.chunk_sums, HostCall)
pcb_scores = partial(kernels.pcb_scores, HostCall)
pcb_merge = partial(kernels.pcb_merge, HostCall)
row_ranks = partial(kernels.row_ranks, HostCall)
row_weighted_sum = partial(kernels.row_weighted_sum, HostCall)
divergence_sums = partial(kernels.divergence_sums, HostCall)
row_importance = partial(kernels.row_importance, HostCall)
compare = partial(kernels.compare, HostCall)
packed_sum = partial(kernels.packed_sum, HostCall)
packed_dots = partial(kernels.packed_dots, HostCall)
