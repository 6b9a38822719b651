"""The Triton backend's PCB-Merging: triton_kernels/pcb.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.arguments import padded
from pymerge.ops.triton.library import check, check_counters, check_reals, check_shape, run

__all__ = ["pcb_merge", "pcb_scores"]


def _pcb(
    out: torch.Tensor | None,
    scores: torch.Tensor | None,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    numel, count = base.numel(), len(models)
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    pairs = count * (count + 1) // 2
    wanted = 1 + (3 * pairs + 3 * count if variant == 0 else 7 * count)
    check_reals("pcb", reals, wanted, count)
    if numel == 0:
        return
    run(
        "pcb",
        base,
        models,
        {
            "out": out,
            "scores": scores,
            "stats": stats,
            "stride": 0 if scores is None else scores.stride(0),
            "VARIANT": variant,
        },
        [0],
        [float(count), *reals],
        wide=False,
        scratch=("stats",),
    )


def pcb_scores(
    scores: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    check_shape("scores", scores, torch.float32, len(models), padded(base.numel()))
    _pcb(None, scores, stats, base, models, variant, reals)


def pcb_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    variant: int,
    reals: Sequence[float],
) -> None:
    _pcb(out, None, stats, base, models, variant, reals)
