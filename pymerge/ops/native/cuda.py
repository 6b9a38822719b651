"""The CUDA backend: calls of the kernels of `_cuda.so` on device tensors."""

from __future__ import annotations

from functools import partial

from pymerge.ops.native import kernels
from pymerge.ops.native.device import DeviceCall
from pymerge.ops.native.device import phase as phase
from pymerge.ops.native.device import reason as reason

NAME = DeviceCall.NAME
SUMMARY = "compiled CUDA kernels"


def slots() -> int:
    """Return the number of counter slots that `magnitude_histogram` can use at once."""
    return 1


weighted_sum = partial(kernels.weighted_sum, DeviceCall)
streaming_floor = partial(kernels.streaming_floor, DeviceCall)
ties = partial(kernels.ties, DeviceCall)
magnitude_histogram = partial(kernels.magnitude_histogram, DeviceCall)
magnitude_equal_counts = partial(kernels.magnitude_equal_counts, DeviceCall)
sparse_merge = partial(kernels.sparse_merge, DeviceCall)
pointwise = partial(kernels.pointwise, DeviceCall)
chunk_sums = partial(kernels.chunk_sums, DeviceCall)
pcb_scores = partial(kernels.pcb_scores, DeviceCall)
pcb_merge = partial(kernels.pcb_merge, DeviceCall)
row_ranks = partial(kernels.row_ranks_by_torch, DeviceCall)
row_weighted_sum = partial(kernels.row_weighted_sum, DeviceCall)
divergence_sums = partial(kernels.divergence_sums, DeviceCall)
row_importance = partial(kernels.row_importance, DeviceCall)
packed_sum = partial(kernels.packed_sum, DeviceCall)
packed_dots = partial(kernels.packed_dots, DeviceCall)
