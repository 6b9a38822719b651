"""The CUDA backend: marshals device tensors to the kernels of `_cuda.so`, op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.ops.arguments import (
    Kept,
    SparseMerge,
    check_divergences,
    divergence_columns,
)
from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.native.device import NOTHING, Call
from pymerge.ops.native.device import phase as phase
from pymerge.ops.native.device import reason as reason
from pymerge.ops.native.packed_cuda import packed_dots as packed_dots
from pymerge.ops.native.packed_cuda import packed_sum as packed_sum

if TYPE_CHECKING:
    import torch

NAME = "cuda"
SUMMARY = "compiled CUDA kernels"

_WEIGHTING = {"none": 0, "before": 1, "after": 2}
_MERGE = {"mean_of_count": 0, "mean_of_weights": 1, "sum": 2, "max": 3}


def weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    wide: bool,
) -> None:
    call = Call(out)
    call.native.weighted_sum(
        call.address(out),
        call.address(base),
        call.addresses(models),
        weights,
        scale,
        divisor,
        *call.end(wide),
        stats=call.counters(stats, least=1),
    )


def streaming_floor(
    out: torch.Tensor, base: torch.Tensor | None, models: Sequence[torch.Tensor]
) -> None:
    """Read base and models and write out, computing nothing: what benchmarks compare with."""
    call = Call(out)
    operands = call.address(out), call.address(base), call.addresses(models)
    call.native.streaming_floor(*operands, [1.0] * len(models), 1.0, 1.0, *call.end(False))


def ties(
    out: torch.Tensor | None,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
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
    call = Call(base)
    call.native.ties(
        call.address(out),
        call.counters(stats, least=3),
        call.address(base),
        call.addresses(models),
        thresholds,
        weights,
        _WEIGHTING[weighting],
        _MERGE[merge],
        elect == "count",
        zero_sign,
        scale,
        want_signs,
        *call.end(wide),
    )


def slots() -> int:
    """Return how many slots of counters `magnitude_histogram` can use at once."""
    return 1


def magnitude_histogram(
    counts: torch.Tensor,
    hot_chunks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    wide: bool,
) -> None:
    call = Call(base)
    slots, count, columns = counts.shape
    if count != len(models):
        raise ValueError(f"backend 'cuda': expected counts of {len(models)} models, got {count}")
    chunks = hot_chunks.shape[1]
    if hot_chunks.shape[0] != count or 0 < chunks < -(-call.numel // HOT_CHUNK):
        raise ValueError(
            f"backend 'cuda': hot_chunks of shape {tuple(hot_chunks.shape)} are too few"
        )
    call.native.magnitude_histogram(
        call.counters(counts, "int32"),
        call.counters(hot_chunks, "int32"),
        chunks,
        call.address(base),
        call.addresses(models),
        lo,
        shift,
        hot,
        slots,
        columns - 3,
        *call.end(wide),
    )


def magnitude_equal_counts(
    counts: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    key: int,
    chunk: int,
    wide: bool,
) -> None:
    call = Call(base)
    expected = -(-call.numel // chunk)
    if counts.numel() != expected:
        raise ValueError(f"backend 'cuda': expected {expected} counts, got {counts.numel()}")
    call.native.magnitude_equal_counts(
        call.counters(counts),
        call.address(base),
        call.address(model),
        key,
        chunk,
        *call.end(wide),
    )


def _ranked(call: Call, kept: Kept, count: int) -> tuple[int, int]:
    return NOTHING if kept.ranks is None else call.rows(kept.ranks, count, "int32")


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    call = Call(out)
    call.native.sparse_merge(
        call.common(base, models, wide),
        call.address(out),
        call.counters(stats, least=3),
        *kept.numbers(),
        how.factors,
        how.weights,
        how.elect,
        how.divide,
        how.divisor,
        how.scale,
        kept.start,
        how.bare,
        _ranked(call, kept, len(models)),
        kept.chances,
        kept.per_element,
    )


def pointwise(
    op: str,
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    wide: bool,
) -> None:
    call = Call(out)
    common = call.common(base, models, wide)
    call.native.pointwise(common, call.address(out), call.counters(stats, least=3), op, reals)


def chunk_sums(
    kind: str,
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    call = Call(models[0])
    call.native.chunk_sums(
        call.common(base, models, wide),
        call.counters(partials, "float64"),
        tuple(partials.shape),
        kind,
        columns,
        *kept.numbers(),
        kept.start,
        _ranked(call, kept, len(models)),
        kept.chances,
        reals,
    )


def pcb_scores(
    scores: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    call = Call(base)
    common = call.common(base, models, False)
    place = call.rows(scores, len(models), "float32")
    call.native.pcb(common, NOTHING, call.counters(stats, least=3), *place, variant, reals)


def pcb_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    call = Call(out)
    common = call.common(base, models, False)
    call.native.pcb(
        common, call.address(out), call.counters(stats, least=3), *NOTHING, variant, reals
    )


def row_ranks(
    ranks: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    columns: int,
    wide: bool,
) -> None:
    """Rank by torch's stable sort, model by model: it runs on the device, too."""
    import torch

    call = Call(base)
    call.rows(ranks, len(models), "int32")
    call.common(base, models, wide)
    if call.numel == 0:
        return
    float_, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    places = torch.arange(columns, dtype=torch.int32, device=base.device)
    for k, model in enumerate(models):
        delta = model.to(float_) - base.to(float_)
        keys = (delta.view(bits) & torch.iinfo(bits).max).view(-1, columns)
        order = torch.sort(keys, dim=1, stable=True).indices
        rows = ranks[k, : call.numel].view(-1, columns)
        rows.scatter_(1, order, places.expand_as(order))


def row_weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: torch.Tensor,
    columns: int,
    wide: bool,
) -> None:
    call = Call(out)
    call.native.row_weighted_sum(
        call.common(base, models, wide),
        call.address(out),
        call.counters(stats, least=1),
        call.table(weights, (len(models), call.numel // columns)),
        columns,
    )


def divergence_sums(
    table: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    kind: str,
    columns: int,
    wide: bool,
) -> None:
    call = Call(base)
    count = divergence_columns(kind, table, call.numel, columns, NAME)
    common, address = call.common(base, [model], wide), call.counters(table, "float64")
    call.native.divergence_sums(common, address, count, kind, columns)


def row_importance(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    model: torch.Tensor,
    divergences: torch.Tensor,
    columns: int,
    threshold: float | None,
    wide: bool,
) -> None:
    call = Call(out)
    check_divergences(divergences, call.numel, columns, NAME)
    call.native.row_importance(
        call.common(base, [model], wide),
        call.address(out),
        call.counters(stats, least=3),
        call.counters(divergences, "float64"),
        threshold,
        columns,
    )
