"""The CPU backend: marshals tensors to the C++ kernels, op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.arguments import (
    Kept,
    SparseMerge,
    check_divergences,
    divergence_columns,
    padded,
)
from pymerge.ops.array import Flat
from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.native.comparison import compare as compare
from pymerge.ops.native.host import (
    NOTHING,
    common_arguments,
    counters_at,
    native,
    operand,
    ranks_at,
)
from pymerge.ops.native.host import build as build
from pymerge.ops.native.host import reason as reason
from pymerge.ops.native.host import set_threads as set_threads
from pymerge.ops.native.host import supported_isas as supported_isas
from pymerge.ops.native.host import threads as threads
from pymerge.ops.native.host import use_isa as use_isa
from pymerge.ops.native.packed import packed_dots as packed_dots
from pymerge.ops.native.packed import packed_sum as packed_sum

NAME = "cpu"
SUMMARY = "C++ kernels"

_WEIGHTING = {"none": 0, "before": 1, "after": 2}
_MERGE = {"mean_of_count": 0, "mean_of_weights": 1, "sum": 2, "max": 3}


def weighted_sum(
    out: Flat,
    stats: Any,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    wide: bool,
) -> None:
    numel = out.numel()
    nonfinite = native().weighted_sum(
        operand(out, numel),
        NOTHING if base is None else operand(base, numel),
        [operand(model, numel) for model in models],
        weights,
        scale,
        divisor,
        numel,
        3 if wide else 0,
        0,
    )
    if nonfinite:
        stats[0] += nonfinite


def streaming_floor(out: Flat, base: Flat | None, models: Sequence[Flat], threads: int = 0) -> None:
    """Read base and models and write out, computing nothing: what benchmarks compare with."""
    numel = out.numel()
    native().streaming_floor(
        operand(out, numel),
        NOTHING if base is None else operand(base, numel),
        [operand(model, numel) for model in models],
        [1.0] * len(models),
        1.0,
        1.0,
        numel,
        0,
        threads,
    )


def ties(
    out: Flat | None,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    weights: Sequence[float],
    weighting: str,
    merge: str,
    elect: str,
    zero_sign: int,
    scale: float,
    want_signs: bool,
    wide: bool,
) -> None:
    numel = base.numel()
    native().ties(
        NOTHING if out is None else operand(out, numel),
        counters_at(stats, least=3),
        operand(base, numel),
        [operand(model, numel) for model in models],
        thresholds,
        weights,
        _WEIGHTING[weighting],
        _MERGE[merge],
        elect == "count",
        zero_sign,
        scale,
        want_signs,
        numel,
        3 if wide else 0,
        0,
    )


def slots() -> int:
    """Return how many slots of counters `magnitude_histogram` can use at once: one a thread."""
    return threads()


def magnitude_histogram(
    counts: Any,
    hot_chunks: Any,
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    wide: bool,
) -> None:
    numel = base.numel()
    slots, count, columns = counts.shape
    if count != len(models):
        raise ValueError(f"backend 'cpu': expected counts of {len(models)} models, got {count}")
    chunks = hot_chunks.shape[1]
    if hot_chunks.shape[0] != count or 0 < chunks < -(-numel // HOT_CHUNK):
        raise ValueError(
            f"backend 'cpu': hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    native().magnitude_histogram(
        counters_at(counts, "int32"),
        counters_at(hot_chunks, "int32"),
        chunks,
        operand(base, numel),
        [operand(model, numel) for model in models],
        lo,
        shift,
        hot,
        slots,
        columns - 3,
        numel,
        3 if wide else 0,
        0,
    )


def magnitude_equal_counts(
    counts: Any,
    base: Flat,
    model: Flat,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    numel = base.numel()
    count = counts.shape[0]
    if count != -(-numel // chunk):
        raise ValueError(f"backend 'cpu': expected {-(-numel // chunk)} counts, got {count}")
    native().magnitude_equal_counts(
        counters_at(counts),
        operand(base, numel),
        operand(model, numel),
        key,
        chunk,
        numel,
        3 if wide else 0,
        0,
    )


def sparse_merge(
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    native().sparse_merge(
        common_arguments(base, models, wide),
        operand(out, models[0].numel()),
        counters_at(stats, least=3),
        *kept.numbers(),
        how.factors,
        how.weights,
        how.elect,
        how.divide,
        how.divisor,
        how.scale,
        kept.start,
        how.bare,
        ranks_at(kept.ranks, models),
        kept.chances,
        kept.per_element,
    )


def pointwise(
    op: str,
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    reals: Sequence[float],
    wide: bool,
) -> None:
    native().pointwise(
        common_arguments(base, models, wide),
        operand(out, models[0].numel()),
        counters_at(stats, least=3),
        op,
        reals,
    )


def chunk_sums(
    kind: str,
    partials: Any,
    base: Flat | None,
    models: Sequence[Flat],
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    native().chunk_sums(
        common_arguments(base, models, wide),
        counters_at(partials, "float64"),
        tuple(partials.shape),
        kind,
        columns,
        *kept.numbers(),
        kept.start,
        ranks_at(kept.ranks, models),
        kept.chances,
        reals,
    )


def pcb_scores(
    scores: Any,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
) -> None:
    count, stride = scores.shape
    if count != len(models) or stride < padded(base.numel()):
        raise ValueError(f"backend 'cpu': scores of shape {tuple(scores.shape)} are too small")
    native().pcb(
        common_arguments(base, models, False),
        NOTHING,
        counters_at(stats, least=3),
        counters_at(scores, "float32"),
        stride,
        variant,
        reals,
    )


def pcb_merge(
    out: Flat,
    stats: Any,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
) -> None:
    native().pcb(
        common_arguments(base, models, False),
        operand(out, models[0].numel()),
        counters_at(stats, least=3),
        0,
        0,
        variant,
        reals,
    )


def row_ranks(ranks: Any, base: Flat, models: Sequence[Flat], columns: int, wide: bool) -> None:
    native().row_ranks(common_arguments(base, models, wide), *ranks_at(ranks, models), columns)


def row_weighted_sum(
    out: Flat,
    stats: Any,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Any,
    columns: int,
    wide: bool,
) -> None:
    shape = len(models), models[0].numel() // columns
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"backend 'cpu': expected weights of shape {shape}, got {tuple(weights.shape)}"
        )
    native().row_weighted_sum(
        common_arguments(base, models, wide),
        operand(out, models[0].numel()),
        counters_at(stats, least=1),
        counters_at(weights, "float64"),
        columns,
    )


def divergence_sums(
    table: Any, base: Flat, model: Flat, kind: str, columns: int, wide: bool
) -> None:
    count = divergence_columns(kind, table, base.numel(), columns, NAME)
    common, address = common_arguments(base, [model], wide), counters_at(table, "float64")
    native().divergence_sums(common, address, count, kind, columns)


def row_importance(
    out: Flat,
    stats: Any,
    base: Flat,
    model: Flat,
    divergences: Any,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    check_divergences(divergences, base.numel(), columns, NAME)
    native().row_importance(
        common_arguments(base, [model], wide),
        operand(out, model.numel()),
        counters_at(stats, least=3),
        counters_at(divergences, "float64"),
        threshold,
        columns,
    )
