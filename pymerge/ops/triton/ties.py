"""The Triton backend's TIES: triton_kernels/ties.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.triton.library import check, check_counters, largest, run

__all__ = ["ties"]


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
    check(base.numel(), out, base, *models)
    check_counters(stats, torch.int64, least=3)
    if base.numel() == 0:
        return
    arguments = {
        "out": out,
        "stats": stats,
        "WEIGHTING": weighting,
        "MERGE": merge,
        "ELECT": elect,
        "ZERO_SIGN": zero_sign,
        "SIGNS": want_signs,
    }
    limits = [min(max(threshold, 0), largest(wide)) for threshold in thresholds]
    scales = weights if len(weights) > 0 else [1.0] * len(models)
    run(
        "ties",
        base,
        models,
        arguments,
        [0, *limits],
        [scale, *scales],
        wide,
        scratch=("stats",),
    )
