"""The operations that the methods consist of, on tensors: for methods of your own.

All run on any backend and give the same bits on each. A *task vector* (delta) is `model - base`, in
float32 (float64 if an input is), and is never stored unless necessary. Inputs are tensors of one
shape, on one device, of dtypes float32, float16, bfloat16 or float64 in any mixture; if a sequence
of tensors is expected, each of them is a layer.

Example:
    >>> import torch
    >>> from pymerge import primitives
    >>> base, tuned = torch.zeros(4), [torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.ones(4)]
    >>> cuts = primitives.magnitude_thresholds(base, tuned, density=0.5)
    >>> primitives.elect_signs(base, tuned, cuts)
    tensor([ 1., -1.,  1.,  1.])
"""

from __future__ import annotations

from pymerge.primitives.masks import random_mask, row_ranks
from pymerge.primitives.sums import Statistics, dots, gram, statistics, weighted_sum
from pymerge.primitives.ties import (
    disjoint_merge,
    elect_signs,
    magnitude_thresholds,
    task_vector,
    trim,
)

__all__ = [
    "Statistics",
    "disjoint_merge",
    "dots",
    "elect_signs",
    "gram",
    "magnitude_thresholds",
    "random_mask",
    "row_ranks",
    "statistics",
    "task_vector",
    "trim",
    "weighted_sum",
]
