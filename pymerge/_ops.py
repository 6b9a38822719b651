"""The op contract: schemas and fakes of `torch.ops.pymerge.*`.

Every op writes into tensors that the caller owns (tiles of an output), works on contiguous tensors
of equal length, of dtypes float32, float16, bfloat16 or float64 in any mixture, and computes in
float32, or float64 where `wide`. Arguments are validated by the public API (`pymerge.api`,
`pymerge.plan`), not here. `backend` is a name of `pymerge.backends.BACKENDS` or "auto". Where a
flag is said to grow by 1, CUDA only raises it to at least 1.

weighted_sum_: out = sum_k weights[k] models[k] / divisor;
    stats[0] += 1 if a result is not finite.
task_arithmetic_: out = base + scale sum_k weights[k] (models[k] - base) / divisor; the same.
ties_: out = trim, elect, disjoint merge, given thresholds on bits(|delta|);
    stats[0 .. 2] += balance of the elected signs, number of zero votes that kept something (both
    only where want_signs), 1 if a delta is not finite.
ties_signs_: the same statistics, no output.
magnitude_histogram_: counts[slot, k, 0 .. bins + 2] += keys below, in each bin of, and above a
    bracket, and those equal to hot[k], counted apart; the caller adds the slots (one a thread)
    before 2^31 elements were counted. hot_chunks[k, j] = those equal to hot[k] among each 65536
    elements (not counted where hot_chunks has no columns).
magnitude_equal_counts_: counts[j] = number of keys equal to `key` in chunk j.
sparse_merge_: out = base + scale merge_k w_k (f_k t_k), t_k = delta_k where lo_k <= key <= last_k
    and, where there are seeds (two words for each model), hash(start + i) <= limits[k]; merged by
    the sum (/ divisor), or with `elect` by the sum over what has the sign of the sum, where zero
    elects + (`divide`: by the weights of those that agree); stats[2] += 1 if a delta is not finite.
sparse_sums_: partials[2k, c] = sum over chunk c (1024 elements, a fixed order, doubles) of
    |delta_k|, partials[2k + 1, c] of |t_k|.
gram_: partials[row, c] = sum over chunk c of x_i x_j, i <= j row by row; x the models, or their
    deltas where there is a base.
pcb_extremes_, pcb_exp_sums_: what the paper's softmax needs, chunk by chunk: least and largest
    product of each pair of deltas; sums of exp of the scaled products.
pcb_scores_, pcb_merge_: scores[k, :numel] = PCB's score of each element (rows have room for a
    multiple of 64); the merge. See csrc/math/pcb.h and PcbArgs in csrc/kernel_table.h; always in
    float32.
nearswap_, ram_, magmax_, consensus_: see csrc/math/pointwise.h; stats[2] += 1 if an input is not
    finite.
"""

from __future__ import annotations

from typing import Any

import torch

from pymerge import _calls

__all__ = ["NAMES"]

_LIBRARY = torch.library.Library("pymerge", "DEF")

_SCHEMAS = {
    "weighted_sum_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor[] models, float[] weights, float divisor, *, "
        "bool wide=False, str backend='auto') -> ()"
    ),
    "task_arithmetic_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, float[] weights, "
        "float scale, float divisor, *, bool wide=False, str backend='auto') -> ()"
    ),
    "ties_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int[] thresholds, "
        "float[] weights, str weighting, str merge, str elect, int zero_sign, float scale, "
        "bool want_signs, *, bool wide=False, str backend='auto') -> ()"
    ),
    "ties_signs_": (
        "(Tensor(a!) stats, Tensor base, Tensor[] models, int[] thresholds, float[] weights, "
        "str weighting, str elect, *, bool wide=False, str backend='auto') -> ()"
    ),
    "magnitude_histogram_": (
        "(Tensor(a!) counts, Tensor(b!) hot_chunks, Tensor base, Tensor[] models, int[] lo, "
        "int[] shift, int[] hot, *, "
        "bool wide=False, str backend='auto') -> ()"
    ),
    "magnitude_equal_counts_": (
        "(Tensor(a!) counts, Tensor base, Tensor model, int key, int chunk, *, bool wide=False, "
        "str backend='auto') -> ()"
    ),
    "sparse_merge_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int[] lo, int[] last, "
        "int[] seeds, int[] limits, float[] factors, float[] weights, bool elect, bool divide, "
        "float divisor, float scale, int start, *, bool wide=False, str backend='auto') -> ()"
    ),
    "sparse_sums_": (
        "(Tensor(a!) partials, Tensor base, Tensor[] models, int[] lo, int[] last, int[] seeds, "
        "int[] limits, int start, *, bool wide=False, str backend='auto') -> ()"
    ),
    "gram_": (
        "(Tensor(a!) partials, Tensor? base, Tensor[] models, *, bool wide=False, "
        "str backend='auto') -> ()"
    ),
    "nearswap_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor model, float t, *, "
        "bool wide=False, str backend='auto') -> ()"
    ),
    "ram_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, float[] factors, "
        "float epsilon, *, bool wide=False, str backend='auto') -> ()"
    ),
    "magmax_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, float scale, *, "
        "bool wide=False, str backend='auto') -> ()"
    ),
    "consensus_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, float[] thresholds, "
        "float scale, int need, *, bool wide=False, str backend='auto') -> ()"
    ),
    "pcb_extremes_": (
        "(Tensor(a!) partials, Tensor base, Tensor[] models, *, str backend='auto') -> ()"
    ),
    "pcb_exp_sums_": (
        "(Tensor(a!) partials, Tensor base, Tensor[] models, float[] reals, *, "
        "str backend='auto') -> ()"
    ),
    "pcb_scores_": (
        "(Tensor(a!) scores, Tensor(b!) stats, Tensor base, Tensor[] models, int variant, "
        "float[] reals, *, str backend='auto') -> ()"
    ),
    "pcb_merge_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int variant, "
        "float[] reals, *, str backend='auto') -> ()"
    ),
}

NAMES = tuple(_SCHEMAS)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """All ops write into their arguments and return nothing, so every fake is empty."""


def _register() -> None:
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, getattr(_calls, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pymerge::{name}", _nothing, lib=_LIBRARY)


_register()
