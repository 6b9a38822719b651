"""The Triton backend's methods that look at each element alone: triton_kernels/pointwise.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.arguments import check_kind
from pymerge.ops.triton.library import asked, check, check_counters, check_reals, run

__all__ = ["REALS", "pointwise"]

# Numbers of a method beside those of each model, and whether there are those: csrc/pointwise.def.
REALS = {
    "nearswap": (2, False),
    "ram": (1, True),
    "magmax": (1, False),
    "consensus_ta": (2, True),
    "tall_masks": (3, False),
    "emr": (2, False),
    "variance": (0, False),
    "sce": (2, True),
}
# Where among them a method is told which model it is asked about, and the least of those numbers.
_ASKS = {"tall_masks": (2, 0), "emr": (0, -1)}


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
    check_kind("pointwise_", method, REALS, "triton")
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    own, of_each = REALS[method]
    check_reals(method, reals, own + (count if of_each else 0), count)
    which = 0
    if method in _ASKS:
        at, least = _ASKS[method]
        which = asked(method, reals[at], least, count)
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
