"""The specification of every op, from which everything else about it follows.

An op writes into tensors that the caller owns (tiles of an output). Its tensors are contiguous and
of equal length, in any mixture of float32, float16, bfloat16 and float64; it computes in float32,
or in float64 if `wide`. The public API validates arguments (`pymerge.merging.api`, `pymerge.plan`);
ops do not. `backend` is a name of `pymerge.ops.backends.BACKENDS`, or "auto".

Nothing here needs torch. `pymerge.ops.contract` declares the ops to torch, `pymerge.ops.call` finds
the backend that computes an op, and `pymerge.merging.gpu.stage` splits calls into tiles according
to the roles of their arguments.
"""

from __future__ import annotations

from pymerge.ops.arguments import TIES_ELECT, TIES_MERGE, WEIGHTING
from pymerge.ops.constants import HOT_CHUNK, SUM_CHUNK
from pymerge.ops.forward import chunk_sums, sparse_merge, task_arithmetic, ties_signs, weighted_sum
from pymerge.ops.spec import COLUMNS, COUNTERS, FLAT, OF_A_MODEL, START, Choice, OpSpec, Table

__all__ = ["OPS"]

_HOW = "*, bool wide=False, str backend='auto'"
_MERGE = {"out": FLAT, "stats": COUNTERS, "base": FLAT, "models": FLAT}
_TIES = {"weighting": Choice(WEIGHTING), "elect": Choice(TIES_ELECT)}
_ROW = Table("columns")  # one column per row of a matrix
_CHUNK = Table("columns", otherwise=SUM_CHUNK)  # the same, or one column per chunk of a sum
_RANKS = Table(1)  # one column per element
_PACKED = {"masks": OF_A_MODEL, "values": OF_A_MODEL, "offsets": OF_A_MODEL}

_SPECS = (
    OpSpec(
        "weighted_sum_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor[] models, float[] weights, float divisor, "
        + _HOW,
        {"out": FLAT, "stats": COUNTERS, "models": FLAT},
        "out = sum_k weights[k] models[k] / divisor. stats[0] += 1 if a result is not finite; "
        "CUDA only raises such a flag to at least 1.",
        function="weighted_sum",
        forward=weighted_sum,
    ),
    OpSpec(
        "task_arithmetic_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, float[] weights, "
        "float scale, float divisor, " + _HOW,
        _MERGE,
        "out = base + scale sum_k weights[k] (models[k] - base) / divisor. stats as weighted_sum_.",
        function="weighted_sum",
        forward=task_arithmetic,
    ),
    OpSpec(
        "ties_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int[] thresholds, "
        "float[] weights, str weighting, str merge, str elect, int zero_sign, float scale, "
        "bool want_signs, " + _HOW,
        {**_MERGE, **_TIES, "merge": Choice(TIES_MERGE)},
        "out = trim, elect, disjoint merge, given thresholds on bits(|delta|). stats[0 .. 2] += "
        "balance of the elected signs, number of zero votes on elements that a model keeps (both "
        "only if want_signs), 1 if a delta is not finite.",
    ),
    OpSpec(
        "ties_signs_",
        "Tensor(a!) stats, Tensor base, Tensor[] models, int[] thresholds, float[] weights, "
        "str weighting, str elect, " + _HOW,
        {"stats": COUNTERS, "base": FLAT, "models": FLAT, **_TIES},
        "The statistics of ties_, without an output.",
        function="ties",
        forward=ties_signs,
    ),
    OpSpec(
        "magnitude_histogram_",
        "Tensor(a!) counts, Tensor(b!) hot_chunks, Tensor base, Tensor[] models, int[] lo, "
        "int[] shift, int[] hot, " + _HOW,
        {"counts": COUNTERS, "hot_chunks": Table(HOT_CHUNK), "base": FLAT, "models": FLAT},
        "counts[slot, k, 0 .. bins + 2] += keys below a bracket, in each of its bins, above it, "
        "and those equal to hot[k], which are counted separately. The caller adds up the slots "
        "(one per thread) before 2^31 elements have been counted. hot_chunks[k, j] = number of "
        "keys equal to hot[k] in each run of 65536 elements (not counted if hot_chunks has no "
        "columns).",
    ),
    OpSpec(
        "magnitude_equal_counts_",
        "Tensor(a!) counts, Tensor base, Tensor model, int key, int chunk, " + _HOW,
        {"counts": Table("chunk"), "base": FLAT, "model": FLAT},
        "counts[j] = number of keys equal to `key` in chunk j.",
    ),
    OpSpec(
        "sparse_merge_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int[] lo, int[] last, "
        "int[] seeds, int[] limits, float[] factors, float[] weights, bool elect, bool divide, "
        "float divisor, float scale, int start, Tensor? ranks=None, float[] chances=[], "
        "bool per_element=False, *, bool bare=False, bool wide=False, str backend='auto'",
        {**_MERGE, "start": START, "ranks": _RANKS},
        "out = base + scale merge_k w_k (f_k t_k). t_k = delta_k where lo_k <= key <= last_k "
        "and, if there are seeds (two words for each model), hash(start + i) <= limits[k]. With "
        "`ranks` (of row_ranks_), t_k = delta_k where lo_k <= rank <= last_k; with `chances` "
        "(two numbers for each model), an element is drawn with probability first + rank step "
        "and, if `per_element`, divided by it. Merged by the sum (/ divisor) or, with `elect`, "
        "by the sum of the terms that have the sign of the total sum, where zero elects + "
        "(`divide`: divided by the weights of those that agree). bare: the base is not added. "
        "stats[2] += 1 if a delta is not finite.",
        forward=sparse_merge,
    ),
    OpSpec(
        "pointwise_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, str method, "
        "float[] reals, " + _HOW,
        _MERGE,
        "A method that treats each element on its own, or the variance of the task vectors: a "
        "kind of csrc/pointwise.def. reals: see csrc/math/pointwise.h. stats[2] += 1 if an input "
        "is not finite.",
    ),
    OpSpec(
        "chunk_sums_",
        "Tensor(a!) partials, Tensor? base, Tensor[] models, str kind, float[] reals=[], "
        "int[] lo=[], int[] last=[], int[] seeds=[], int[] limits=[], int start=0, "
        "Tensor? ranks=None, float[] chances=[], int columns=0, " + _HOW,
        {
            "partials": _CHUNK,
            "base": FLAT,
            "models": FLAT,
            "start": START,
            "ranks": _RANKS,
            "columns": COLUMNS,
        },
        "partials[row, c] = sums over chunk c (1024 elements, in a fixed order, in doubles) or, "
        "with `columns`, over row c of a matrix. SumsArgs in csrc/kernel_table.h lists the rows "
        "of each kind. sparse: L1 norms of the task vectors and of their kept elements, selected "
        "as in sparse_merge_. dots: <gradient, delta_k>, the gradient being the last of the "
        "models.",
        forward=chunk_sums,
    ),
    OpSpec(
        "pcb_scores_",
        "Tensor(a!) scores, Tensor(b!) stats, Tensor base, Tensor[] models, int variant, "
        "float[] reals, *, str backend='auto'",
        {"scores": _RANKS, "stats": COUNTERS, "base": FLAT, "models": FLAT},
        "scores[k, :numel] = max(scale x, 0), where x is PCB's score of an element and scale the "
        "last of the reals (rows are padded to a multiple of 64). See csrc/math/pcb.h and "
        "PcbArgs in csrc/kernel_table.h; always in float32. stats as in pointwise_.",
    ),
    OpSpec(
        "pcb_merge_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int variant, "
        "float[] reals, *, str backend='auto'",
        _MERGE,
        "The merge weighted by the scores of pcb_scores_; always in float32.",
    ),
    OpSpec(
        "row_ranks_",
        "Tensor(a!) ranks, Tensor base, Tensor[] models, int columns, " + _HOW,
        {"ranks": _RANKS, "base": FLAT, "models": FLAT, "columns": COLUMNS},
        "ranks[k, i] = rank of |delta_k| within its row of `columns`, from 0; equal magnitudes "
        "are ordered by index (rows of `ranks` are padded to a multiple of 64).",
    ),
    OpSpec(
        "row_weighted_sum_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor? base, Tensor[] models, Tensor weights, "
        "int columns, " + _HOW,
        {**_MERGE, "weights": _ROW, "columns": COLUMNS},
        "out = sum_k weights[k, row] x_k, or base + sum_k weights[k, row] (x_k - base). "
        "stats[0] += 1 if a result is not finite.",
    ),
    OpSpec(
        "divergence_sums_",
        "Tensor(a!) table, Tensor base, Tensor model, str kind, int columns=0, " + _HOW,
        {
            "table": Table("columns", otherwise=SUM_CHUNK, read=True),
            "base": FLAT,
            "model": FLAT,
            "columns": COLUMNS,
        },
        'table[5, c] by chunks or rows, as in chunk_sums_: "maxima" of model and base, "exp" '
        'sums of exp(x - maximum), "divergence" KL(softmax(model) || softmax(base)) with 1e-8 '
        "added to each probability, in doubles. Each kind reads the rows that the previous kinds "
        'wrote; "all" computes all three.',
    ),
    OpSpec(
        "row_importance_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor model, Tensor divergences, "
        "int columns, float? threshold=None, " + _HOW,
        {
            "out": FLAT,
            "stats": COUNTERS,
            "base": FLAT,
            "model": FLAT,
            "divergences": _ROW,
            "columns": COLUMNS,
        },
        "out = |model - base| D_row, rounded once. With a threshold, out = the base, plus the "
        "delta where this importance is at least the threshold. stats[2] += 1 if an input is not "
        "finite.",
    ),
    OpSpec(
        "compare_",
        "Tensor(a!) sums, Tensor(b!) counts, Tensor base, Tensor[] models, int[] thresholds, "
        "int start=0, int every=1, " + _HOW,
        {
            "sums": Table(HOT_CHUNK),
            "counts": COUNTERS,
            "base": FLAT,
            "models": FLAT,
            "start": START,
        },
        "A comparison of task vectors: sums over segments of 65536 elements (norms, products, "
        "distances), and counts, which accumulate (kept above thresholds, in both of a pair, of "
        "opposite signs, equal, magnitudes). thresholds: for each level and model. See "
        "ComparisonArgs in csrc/kernel_table.h and `pymerge.ops.comparison`.",
    ),
    OpSpec(
        "packed_sum_",
        "Tensor(a!) out, Tensor base, Tensor[] masks, Tensor[] values, Tensor[] offsets, "
        "float[] weights, " + _HOW,
        {"out": FLAT, "base": FLAT, **_PACKED},
        "out = base + sum_k weights[k] t_k, where t_k are trimmed task vectors. Bit i of "
        "masks[k][j] is set if model k keeps element 32 j + i. values[k] holds the kept elements "
        "of the model itself, in its own dtype. offsets[k] holds the number of kept elements "
        "before each chunk of 1024, then their total. t_k = values[k] - base where kept, and "
        "zero elsewhere.",
    ),
    OpSpec(
        "packed_dots_",
        "Tensor(a!) partials, Tensor gradient, Tensor base, Tensor[] masks, Tensor[] values, "
        "Tensor[] offsets, " + _HOW,
        {"partials": Table(SUM_CHUNK), "gradient": FLAT, "base": FLAT, **_PACKED},
        "partials[k, c] = <gradient, t_k> over chunk c, summed like the dots of chunk_sums_.",
    ),
)

OPS = {spec.name: spec for spec in _SPECS}
