"""What the ops are: the one statement of each, from which all else about it follows.

An op writes into tensors that the caller owns (tiles of an output), works on contiguous tensors of
equal length, of dtypes float32, float16, bfloat16 or float64 in any mixture, and computes in
float32, or float64 where `wide`. Arguments are validated by the public API (`pymerge.merging.api`,
`pymerge.plan`), not here. `backend` is a name of `pymerge.ops.backends.BACKENDS` or "auto".

Nothing here needs torch. `pymerge.ops.contract` declares the ops to torch, `pymerge.ops.call` finds
the backend that computes one, and `pymerge.merging.gpu.stage` cuts calls into tiles by the roles of
their arguments.
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
_ROW = Table("columns")  # a column for each row of a matrix
_CHUNK = Table("columns", otherwise=SUM_CHUNK)  # the same, or one for each chunk of a sum
_RANKS = Table(1)  # a column for each element
_PACKED = {"masks": OF_A_MODEL, "values": OF_A_MODEL, "offsets": OF_A_MODEL}

_SPECS = (
    OpSpec(
        "weighted_sum_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor[] models, float[] weights, float divisor, "
        + _HOW,
        {"out": FLAT, "stats": COUNTERS, "models": FLAT},
        "out = sum_k weights[k] models[k] / divisor. stats[0] += 1 if a result is not finite; CUDA "
        "only raises such a flag to at least 1.",
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
        "balance of the elected signs, number of zero votes that kept something (both only where "
        "want_signs), 1 if a delta is not finite.",
    ),
    OpSpec(
        "ties_signs_",
        "Tensor(a!) stats, Tensor base, Tensor[] models, int[] thresholds, float[] weights, "
        "str weighting, str elect, " + _HOW,
        {"stats": COUNTERS, "base": FLAT, "models": FLAT, **_TIES},
        "The statistics of ties_, no output.",
        function="ties",
        forward=ties_signs,
    ),
    OpSpec(
        "magnitude_histogram_",
        "Tensor(a!) counts, Tensor(b!) hot_chunks, Tensor base, Tensor[] models, int[] lo, "
        "int[] shift, int[] hot, " + _HOW,
        {"counts": COUNTERS, "hot_chunks": Table(HOT_CHUNK), "base": FLAT, "models": FLAT},
        "counts[slot, k, 0 .. bins + 2] += keys below, in each bin of, and above a bracket, and "
        "those equal to hot[k], counted apart; the caller adds the slots (one a thread) before "
        "2^31 elements were counted. hot_chunks[k, j] = those equal to hot[k] among each 65536 "
        "elements (not counted where hot_chunks has no columns).",
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
        "out = base + scale merge_k w_k (f_k t_k), t_k = delta_k where lo_k <= key <= last_k and, "
        "where there are seeds (two words for each model), hash(start + i) <= limits[k]; or by "
        "`ranks` (of row_ranks_): lo_k <= rank <= last_k or, with `chances` (two numbers for each "
        "model), drawn with probability first + rank step and divided by it (`per_element`). "
        "Merged by the sum (/ divisor), or with `elect` by the sum over what has the sign of the "
        "sum, where zero elects + (`divide`: by the weights of those that agree). bare: nothing is "
        "added to the base. stats[2] += 1 if a delta is not finite.",
        forward=sparse_merge,
    ),
    OpSpec(
        "pointwise_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, str method, "
        "float[] reals, " + _HOW,
        _MERGE,
        "A method that looks at each element alone, or the variance of the task vectors: a kind of "
        "csrc/pointwise.def. reals: see csrc/math/pointwise.h. stats[2] += 1 if an input is not "
        "finite.",
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
        "with `columns`, over row c of a matrix. What the rows of a kind are: SumsArgs in "
        "csrc/kernel_table.h. sparse: L1 norms of task vectors and of what is kept, as "
        "sparse_merge_ keeps it. dots: <gradient, delta_k>, the gradient last among the models.",
        forward=chunk_sums,
    ),
    OpSpec(
        "pcb_scores_",
        "Tensor(a!) scores, Tensor(b!) stats, Tensor base, Tensor[] models, int variant, "
        "float[] reals, *, str backend='auto'",
        {"scores": _RANKS, "stats": COUNTERS, "base": FLAT, "models": FLAT},
        "scores[k, :numel] = max(scale x, 0), x PCB's score of an element and scale the last of "
        "the reals (rows have room for a multiple of 64). See csrc/math/pcb.h and PcbArgs in "
        "csrc/kernel_table.h; always in float32. stats as pointwise_.",
    ),
    OpSpec(
        "pcb_merge_",
        "Tensor(a!) out, Tensor(b!) stats, Tensor base, Tensor[] models, int variant, "
        "float[] reals, *, str backend='auto'",
        _MERGE,
        "The merge by the scores of pcb_scores_; always in float32.",
    ),
    OpSpec(
        "row_ranks_",
        "Tensor(a!) ranks, Tensor base, Tensor[] models, int columns, " + _HOW,
        {"ranks": _RANKS, "base": FLAT, "models": FLAT, "columns": COLUMNS},
        "ranks[k, i] = rank of |delta_k| within its row of `columns`, from 0, equal magnitudes by "
        "index (rows of `ranks` have room for a multiple of 64).",
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
        'table[5, c] of chunks or rows, as chunk_sums_ counts them: "maxima" of model and base, '
        '"exp" sums of exp(x - maximum), "divergence" KL(softmax(model) || softmax(base)) with '
        "1e-8 added to each probability, in doubles. Each kind reads what those before it wrote; "
        '"all" is the three.',
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
        "out = |model - base| D_row, rounded once; with a threshold the base, plus the delta where "
        "that is at least the threshold. stats[2] += 1 if an input is not finite.",
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
        "What task vectors have to do with each other: sums of segments of 65536 elements (norms, "
        "products, distances), and counts, which grow (kept above thresholds, in both of a pair, "
        "of opposite signs, equal, magnitudes). thresholds: of each level and model. See "
        "ComparisonArgs in csrc/kernel_table.h and `pymerge.ops.comparison`.",
    ),
    OpSpec(
        "packed_sum_",
        "Tensor(a!) out, Tensor base, Tensor[] masks, Tensor[] values, Tensor[] offsets, "
        "float[] weights, " + _HOW,
        {"out": FLAT, "base": FLAT, **_PACKED},
        "out = base + sum_k weights[k] t_k, t_k trimmed task vectors: bit i of masks[k][j] says "
        "whether model k keeps element 32 j + i; values[k] are what it keeps, its own numbers in "
        "its own dtype; offsets[k] how many of them are before each chunk of 1024 elements, and "
        "how many there are. t_k = values[k] - base there, and nothing elsewhere.",
    ),
    OpSpec(
        "packed_dots_",
        "Tensor(a!) partials, Tensor gradient, Tensor base, Tensor[] masks, Tensor[] values, "
        "Tensor[] offsets, " + _HOW,
        {"partials": Table(SUM_CHUNK), "gradient": FLAT, "base": FLAT, **_PACKED},
        "partials[k, c] = <gradient, t_k> over chunk c, as dots of chunk_sums_.",
    ),
)

OPS = {spec.name: spec for spec in _SPECS}
