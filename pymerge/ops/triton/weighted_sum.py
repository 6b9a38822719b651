"""The Triton backend's weighted sums: triton_kernels/weighted_sum.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.triton.library import check, check_counters, run

__all__ = ["weighted_sum"]


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
    check(out.numel(), out, base, *models)
    check_counters(stats, torch.int64, least=1)
    if out.numel() == 0:
        return
    arguments = {"out": out, "stats": stats, "DIVIDE": divisor != 1.0}
    run(
        "weighted_sum",
        base,
        models,
        arguments,
        [0],
        [scale, divisor, *weights],
        wide,
        scratch=("stats",),
    )
