"""The Triton backend's methods that look at each element alone: triton_kernels/pointwise.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.reference.pointwise import check_reals
from pymerge.ops.triton.library import check, check_counters, run

__all__ = ["pointwise"]


def pointwise(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    method: str,
    reals: Sequence[float],
    wide: bool,
) -> None:
    numel, count = base.numel(), len(models)
    which = check_reals(method, reals, count, "triton")
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    if numel == 0:
        return
    everywhere = method == "sce" and reals[0] != 0
    run(
        "pointwise",
        base,
        models,
        {"out": out, "stats": stats, "METHOD": "sce_everywhere" if everywhere else method},
        [0, which],
        [float(count), *reals],
        wide,
        scratch=("stats",),
    )
