"""The Triton backend's ops on rows of matrices: triton_kernels/weighted_sum.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.reference.rows import row_ranks as row_ranks  # torch sorts on the device
from pymerge.ops.triton.library import check, check_counters, run

__all__ = ["row_ranks", "row_weighted_sum"]

_LONG = 1 << 14  # rows with this many columns or more are longer than any block


def row_weighted_sum(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: torch.Tensor,
    columns: int,
    wide: bool,
) -> None:
    numel = out.numel()
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=1)
    shape = len(models), numel // columns
    if tuple(weights.shape) != shape:
        raise ValueError(
            f"backend 'triton': expected weights of shape {shape}, got {tuple(weights.shape)}"
        )
    check_counters(weights, torch.float64)
    if numel == 0:
        return
    arguments = {
        "out": out,
        "stats": stats,
        "weights": weights,
        "columns": columns,
        "rows": shape[1],
        "LONG": columns >= _LONG,
    }
    run("row_weighted_sum", base, models, arguments, [0], [0.0], wide, scratch=("stats",))
