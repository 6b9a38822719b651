"""All functions of this package that marshal an op; a backend picks those that it supports."""

from __future__ import annotations

from pymerge.ops.native.comparison import compare
from pymerge.ops.native.divergence import divergence_sums, row_importance
from pymerge.ops.native.magnitude import magnitude_equal_counts, magnitude_histogram
from pymerge.ops.native.packed import packed_dots, packed_sum
from pymerge.ops.native.pcb import pcb_merge, pcb_scores
from pymerge.ops.native.pointwise import pointwise
from pymerge.ops.native.rows import row_ranks, row_ranks_by_torch, row_weighted_sum
from pymerge.ops.native.sparse import sparse_merge
from pymerge.ops.native.sums import chunk_sums
from pymerge.ops.native.ties import ties
from pymerge.ops.native.weighted_sum import streaming_floor, weighted_sum

__all__ = [
    "chunk_sums",
    "compare",
    "divergence_sums",
    "magnitude_equal_counts",
    "magnitude_histogram",
    "packed_dots",
    "packed_sum",
    "pcb_merge",
    "pcb_scores",
    "pointwise",
    "row_importance",
    "row_ranks",
    "row_ranks_by_torch",
    "row_weighted_sum",
    "sparse_merge",
    "streaming_floor",
    "ties",
    "weighted_sum",
]
