"""The Triton backend: marshals tensors to the kernels of `pymerge.triton_kernels`."""

from __future__ import annotations

from pymerge.ops.triton.divergence import divergence_sums, row_importance
from pymerge.ops.triton.library import device, interprets, reason
from pymerge.ops.triton.magnitude import magnitude_equal_counts, magnitude_histogram, slots
from pymerge.ops.triton.packed import packed_dots, packed_sum
from pymerge.ops.triton.pcb import pcb_merge, pcb_scores
from pymerge.ops.triton.pointwise import pointwise
from pymerge.ops.triton.rows import row_ranks, row_weighted_sum
from pymerge.ops.triton.sparse import sparse_merge
from pymerge.ops.triton.sums import chunk_sums
from pymerge.ops.triton.ties import ties
from pymerge.ops.triton.weighted_sum import weighted_sum

__all__ = [
    "NAME",
    "SUMMARY",
    "chunk_sums",
    "device",
    "divergence_sums",
    "interprets",
    "magnitude_equal_counts",
    "magnitude_histogram",
    "packed_dots",
    "packed_sum",
    "pcb_merge",
    "pcb_scores",
    "pointwise",
    "reason",
    "row_importance",
    "row_ranks",
    "row_weighted_sum",
    "slots",
    "sparse_merge",
    "ties",
    "weighted_sum",
]

NAME = "triton"
SUMMARY = "Triton kernels"
