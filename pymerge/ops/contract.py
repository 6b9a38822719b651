"""The op contract: schemas and fakes of `torch.ops.pymerge.*`.

Every op writes into tensors that the caller owns (tiles of an output), works on contiguous tensors
of equal length, of dtypes float32, float16, bfloat16 or float64 in any mixture, and computes in
float32, or float64 where `wide`. Arguments are validated by the public API (`pymerge.merging.api`,
`pymerge.plan`), not here. `backend` is a name of `pymerge.ops.backends.BACKENDS` or "auto". Where a
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
    and, where there are seeds (two words for each model), hash(start + i) <= limits[k]; or by
    `ranks` (of row_ranks_): lo_k <= rank <= last_k or, with `chances` (two numbers for each model),
    drawn with probability first + rank step and divided by it (`per_element`). Merged by the sum
    (/ divisor), or with `elect` by the sum over what has the sign of the sum, where zero elects +
    (`divide`: by the weights of those that agree). bare: nothing is added to the base.
    stats[2] += 1 if a delta is not finite.
pointwise_: a method that looks at each element alone: nearswap, ram, magmax, consensus, tall, emr,
    sce, or "variance" (of the task vectors). reals: see csrc/math/pointwise.h. stats[2] += 1 if an
    input is not finite.
chunk_sums_: partials[row, c] = sums over chunk c (1024 elements, in a fixed order, in doubles) or,
    with `columns`, over row c of a matrix. kind: gram, dots, statistics, sparse (L1 norms of task
    vectors and of what is kept), ram_counts, emr, sce, pcb_extremes, pcb_exp; what the rows are:
    SumsArgs in csrc/kernel_table.h. dots: <gradient, delta_k>, the gradient last among the models.
pcb_scores_, pcb_merge_: scores[k, :numel] = max(scale x, 0), x PCB's score of an element and scale
    the last of the reals (rows have room for a multiple of 64); the merge. See csrc/math/pcb.h and
    PcbArgs in csrc/kernel_table.h; always in float32.
row_ranks_: ranks[k, i] = rank of |delta_k| within its row of `columns`, from 0, equal magnitudes by
    index (rows of `ranks` have room for a multiple of 64).
row_weighted_sum_: out = sum_k weights[k, row] x_k, or base + sum_k weights[k, row] (x_k - base);
    stats[0] += 1 if a result is not finite.
divergence_sums_: table[5, c] of chunks or rows, as chunk_sums_ counts them: "maxima" of model and
    base, "exp" sums of exp(x - maximum), "divergence" KL(softmax(model) || softmax(base)) with 1e-8
    added to each probability, in doubles. Each kind reads what those before it wrote; "all" is the
    three.
compare_: what task vectors have to do with each other: sums of segments of 65536 elements (norms,
    products, distances), and counts, which grow (kept above thresholds, in both of a pair, of
    opposite signs, equal, magnitudes). thresholds: of each level and model. See ComparisonArgs in
    csrc/kernel_table.h and `pymerge.ops.comparison`.
packed_sum_: out = base + sum_k weights[k] t_k, t_k trimmed task vectors: bit i of masks[k][j] says
    whether model k keeps element 32 j + i; values[k] are what it keeps, its own numbers in its own
    dtype; offsets[k] how many of them are before each chunk of 1024 elements, and how many there
    are. t_k = values[k] - base there, and nothing elsewhere.
packed_dots_: partials[k, c] = <gradient, t_k> over chunk c, as dots of chunk_sums_.
row_importance_: out = |model - base| D_row, rounded once; with a threshold the base, plus the delta
    where that is at least the threshold. stats[2] += 1 if an input is not finite.
"""

from __future__ import annotations

from typing import Any

import torch

from pymerge.ops import call as _calls

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
        "float divisor, float scale, int start, Tensor? ranks=None, float[] chances=[], "
        "bool per_element=False, *, bool bare=False, bool wide=False, str backend='auto') -> ()"
    ),
    "pointwise_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, str method, "
        "float[] reals, *, bool wide=False, str backend='auto') -> ()"
    ),
    "chunk_sums_": (
        "(Tensor(a!) partials, Tensor? base, Tensor[] models, str kind, float[] reals=[], "
        "int[] lo=[], int[] last=[], int[] seeds=[], int[] limits=[], int start=0, "
        "Tensor? ranks=None, float[] chances=[], int columns=0, *, bool wide=False, "
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
    "row_ranks_": (
        "(Tensor(a!) ranks, Tensor base, Tensor[] models, int columns, *, bool wide=False, "
        "str backend='auto') -> ()"
    ),
    "row_weighted_sum_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor? base, Tensor[] models, Tensor weights, "
        "int columns, *, bool wide=False, str backend='auto') -> ()"
    ),
    "divergence_sums_": (
        "(Tensor(a!) table, Tensor base, Tensor model, str kind, int columns=0, *, "
        "bool wide=False, str backend='auto') -> ()"
    ),
    "compare_": (
        "(Tensor(a!) sums, Tensor(b!) counts, Tensor base, Tensor[] models, int[] thresholds, "
        "int start=0, int every=1, *, bool wide=False, str backend='auto') -> ()"
    ),
    "packed_sum_": (
        "(Tensor(a!) out, Tensor base, Tensor[] masks, Tensor[] values, Tensor[] offsets, "
        "float[] weights, *, bool wide=False, str backend='auto') -> ()"
    ),
    "packed_dots_": (
        "(Tensor(a!) partials, Tensor gradient, Tensor base, Tensor[] masks, Tensor[] values, "
        "Tensor[] offsets, *, bool wide=False, str backend='auto') -> ()"
    ),
    "row_importance_": (
        "(Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor model, Tensor divergences, "
        "int columns, float? threshold=None, *, bool wide=False, str backend='auto') -> ()"
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
