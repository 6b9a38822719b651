"""Marshals `row_ranks_` and `row_weighted_sum_`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.ops.array import Flat
from pymerge.ops.native.call import Call

__all__ = ["row_ranks", "row_ranks_by_torch", "row_weighted_sum"]


def row_ranks(
    begin: type[Call], ranks: Any, base: Flat, models: Sequence[Flat], columns: int, wide: bool
) -> None:
    call = begin(base)
    place = call.rows("ranks", ranks, len(models), "int32")
    call.native.row_ranks(call.common(base, models, wide), *place, columns)


def row_ranks_by_torch(
    begin: type[Call], ranks: Any, base: Any, models: Sequence[Any], columns: int, wide: bool
) -> None:
    """Rank with torch's stable sort, model by model; it also runs on the device."""
    import torch

    call = begin(base)
    call.rows("ranks", ranks, len(models), "int32")
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
    begin: type[Call],
    out: Flat,
    stats: Any,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Any,
    columns: int,
    wide: bool,
) -> None:
    call = begin(out)
    call.native.row_weighted_sum(
        call.common(base, models, wide),
        call.operand(out),
        call.counters(stats, least=1),
        call.table("weights", weights, (len(models), call.numel // columns)),
        columns,
    )
