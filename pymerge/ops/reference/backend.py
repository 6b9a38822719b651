"""The reference backend: pure torch, on any device.

It is the definition; every kernel is tested against it. Arithmetic is in float32 (float64 if
`wide`), takes the models in order, and rounds once, at the store. Nothing here is fast, and any
change here changes what pymerge computes.
"""

from __future__ import annotations

from pymerge.ops.reference.comparison import compare
from pymerge.ops.reference.divergence import divergence_sums, row_importance
from pymerge.ops.reference.magnitude import magnitude_equal_counts, magnitude_histogram, slots
from pymerge.ops.reference.packed import packed_dots, packed_sum
from pymerge.ops.reference.pcb import pcb_merge, pcb_scores
from pymerge.ops.reference.pointwise import pointwise
from pymerge.ops.reference.rows import row_ranks, row_weighted_sum
from pymerge.ops.reference.sparse import sparse_merge
from pymerge.ops.reference.sums import chunk_sums
from pymerge.ops.reference.ties import ties
from pymerge.ops.reference.weighted_sum import weighted_sum

__all__ = [
    "NAME",
    "SUMMARY",
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
    "reason",
    "row_importance",
    "row_ranks",
    "row_weighted_sum",
    "slots",
    "sparse_merge",
    "ties",
    "weighted_sum",
]

NAME = "reference"
SUMMARY = "pure torch: the definition, slow"


def reason() -> str | None:
    """Return why the backend cannot be used, or None."""
    return None
