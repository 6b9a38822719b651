"""The case table: one row per op and mode. A row gives the correctness test on every backend,
opcheck, and the benchmark (`pytest benchmarks`)."""

from __future__ import annotations

import numpy as np

from pymerge.ops.backends import has_kernel
from pymerge.ops.comparison import EVERY
from tests.case import Case
from tests.case_merges import (
    ANY,
    TRIMMED,
    bare,
    importance,
    linear,
    only_tensor_out,
    packed_sum,
    pointwise,
    ranked,
    row_sum,
    sparse,
    task_arithmetic,
    tensor_out,
    ties,
)
from tests.case_pcb import pcb_exp_sums, pcb_of, pcb_scores_out
from tests.case_sums import (
    comparison,
    divergence_case,
    dots,
    equal_counts,
    equal_counts_out,
    gram,
    histogram,
    histogram_out,
    packed_dots,
    packed_dots_out,
    ranked_sums,
    ranks_out,
    row_ranks,
    row_sums_of,
    sce_sums,
    signs,
    sparse_sums,
    stats_out,
    sums_case,
    sums_of,
)

CASES = [
    Case("linear", "weighted_sum_", linear("sum"), tensor_out),
    Case("linear_unnormalized", "weighted_sum_", linear("one"), tensor_out, slow=True),
    Case("task_arithmetic", "task_arithmetic_", task_arithmetic, tensor_out),
    Case("ties_mean", "ties_", ties("none", "mean_of_count", "mass", 1, False), tensor_out),
    Case("ties_mean_signs", "ties_", ties("none", "mean_of_count", "mass", -1, True), tensor_out),
    Case("ties_sum", "ties_", ties("none", "sum", "mass", -1, False), tensor_out, slow=True),
    Case("ties_max", "ties_", ties("none", "max", "mass", 1, True), tensor_out, slow=True),
    Case(
        "ties_drop", "ties_", ties("none", "mean_of_count", "mass", 0, True), tensor_out, slow=True
    ),
    Case("ties_mergekit", "ties_", ties("before", "mean_of_weights", "mass", 1, False), tensor_out),
    Case(
        "ties_mergekit_sum", "ties_", ties("before", "sum", "mass", 1, False), tensor_out, slow=True
    ),
    Case(
        "ties_weighted_count",
        "ties_",
        ties("before", "mean_of_count", "mass", -1, True),
        tensor_out,
        slow=True,
    ),
    Case("ties_peft", "ties_", ties("after", "mean_of_count", "mass", 1, False), tensor_out),
    Case(
        "ties_peft_frequency",
        "ties_",
        ties("after", "mean_of_count", "count", 1, False),
        tensor_out,
        slow=True,
    ),
    Case(
        "ties_sd_mecha",
        "ties_",
        ties("none", "mean_of_count", "count", 0, False),
        tensor_out,
        slow=True,
    ),
    Case("ties_signs", "ties_signs_", signs, stats_out, streams_out=False),
    Case(
        "magnitude_histogram", "magnitude_histogram_", histogram, histogram_out, streams_out=False
    ),
    Case(
        "magnitude_equal_counts",
        "magnitude_equal_counts_",
        equal_counts,
        equal_counts_out,
        streams_out=False,
    ),
    Case("dare_linear", "sparse_merge_", sparse(True, False, False), tensor_out, slow=True),
    Case("dare_ties", "sparse_merge_", sparse(True, False, True), tensor_out, slow=True),
    Case(
        "breadcrumbs",
        "sparse_merge_",
        sparse(False, True, False, divisor=2.5),
        tensor_out,
        slow=True,
    ),
    Case("breadcrumbs_ties", "sparse_merge_", sparse(False, True, True, divide=True), tensor_out),
    Case("sparse_all", "sparse_merge_", sparse(True, True, True, True, 1.5), tensor_out, slow=True),
    Case("sparse_both", "sparse_merge_", sparse(True, True, False), tensor_out, slow=True),
    Case("sparse_bare", "sparse_merge_", bare, tensor_out, slow=True),
    Case(
        "della", "sparse_merge_", ranked("per_element", True, factors=False), tensor_out, slow=True
    ),
    Case("della_factors", "sparse_merge_", ranked("per_element", True), tensor_out, slow=True),
    Case("della_linear", "sparse_merge_", ranked("chance", False), tensor_out, slow=True),
    Case("breadcrumbs_rows", "sparse_merge_", ranked("band", True), tensor_out, slow=True),
    sums_case("sparse", sparse_sums),
    sums_case("sparse.ranked", ranked_sums),
    sums_case("gram", gram),
    sums_case("gram.deltas", sums_of("gram")),
    sums_case("gram.rows", row_sums_of("gram"), rows=True),
    sums_case("dots", dots),
    sums_case("statistics", sums_of("statistics")),
    sums_case("statistics.rows", row_sums_of("statistics"), rows=True),
    sums_case("ram_counts", sums_of("ram_counts", reals=[0.004])),
    sums_case("emr", sums_of("emr", reals=[0.0])),
    sums_case("sce", sce_sums),
    sums_case("pcb_extremes", sums_of("pcb_extremes")),
    sums_case("pcb_exp", pcb_exp_sums),
    Case("packed_sum", "packed_sum_", packed_sum(TRIMMED), only_tensor_out),
    Case("packed_sum.any", "packed_sum_", packed_sum(ANY), only_tensor_out, slow=True),
    Case("packed_dots", "packed_dots_", packed_dots(TRIMMED), packed_dots_out, False, slow=True),
    Case("packed_dots.any", "packed_dots_", packed_dots(ANY), packed_dots_out, False, slow=True),
    pointwise("nearswap", 0.005, 1e-6, models=1),
    pointwise("ram"),
    pointwise(
        "magmax",
        0.7,
        oracle=lambda b, m: b + 0.7 * np.take_along_axis(m - b, abs(m - b).argmax(0)[None], 0)[0],
    ),
    pointwise("consensus_ta", 0.3, 2.0),
    pointwise("tall_masks", 0.3, 0.4, 1.0),
    pointwise("emr", -1.0, 1.0),
    pointwise("emr", 1.0, 1.7, name="emr_task"),
    pointwise("variance"),
    pointwise("median", 0.7, 1.0, oracle=lambda b, m: b + 0.7 * np.median(m - b, axis=0)),
    pointwise(
        "median", 1.0, 0.0, name="median_of_models", oracle=lambda b, m: np.median(m, axis=0)
    ),
    pointwise("sce", 0.0, 0.0),
    pointwise("sce", 1.0, 2e-5, name="sce_everywhere"),
    Case("row_ranks", "row_ranks_", row_ranks, ranks_out, streams_out=False, slow=True),
    Case("row_weighted_sum", "row_weighted_sum_", row_sum(False), tensor_out, slow=True),
    Case("row_task_arithmetic", "row_weighted_sum_", row_sum(True), tensor_out, slow=True),
    divergence_case("maxima"),
    divergence_case("maxima", rows=True),
    divergence_case("exp"),
    divergence_case("exp", rows=True),
    divergence_case("divergence"),
    divergence_case("divergence", rows=True),
    divergence_case("all"),
    divergence_case("all", rows=True),
    comparison(0),
    comparison(3, start=3 << 16, every=EVERY),
    comparison(5),
    Case("row_importance", "row_importance_", importance(None), tensor_out, slow=True),
    Case("arcee_fusion", "row_importance_", importance(8e-6), tensor_out, slow=True),
    *(
        Case(f"pcb_{name}", "pcb_merge_", pcb_of(variant), tensor_out, slow=True)
        for variant, name in enumerate(("paper", "root", "vision", "vision_es"))
    ),
    *(
        Case(f"pcb_{name}_scores", "pcb_scores_", pcb_of(k), pcb_scores_out, False, slow=True)
        for k, name in enumerate(("paper", "root", "vision", "vision_es"))
    ),
]

# Those of ops that GPUs have kernels for.
GPU_CASES = [case for case in CASES if has_kernel("cuda", case.op)]
