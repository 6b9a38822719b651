"""The Triton backend's sparse merges: triton_kernels/sparse.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.ops.arguments import Kept, SparseMerge
from pymerge.ops.triton.library import check, check_counters, check_ranks, largest, run

__all__ = ["decides", "rules_of", "sparse_merge"]


def decides(kept: Kept, wide: bool) -> str:
    """Return the rule that selects elements: KEEP in triton_kernels/sparse.py."""
    if kept.ranks is not None:
        if not kept.chances:
            return "ranks"
        return "shares" if kept.per_element else "chances"
    band = any(lo > 0 for lo in kept.lo) or any(last < largest(wide) for last in kept.last)
    return {
        (False, False): "all",
        (True, False): "band",
        (False, True): "drawn",
        (True, True): "both",
    }[band, bool(kept.seeds)]


def rules_of(kept: Kept, count: int, wide: bool) -> tuple[list[int], list[float]]:
    """Return the integers of each model's rule, and its chances."""
    most = largest(wide and kept.ranks is None)
    rules: list[int] = []
    for k in range(count):
        lo, last = (kept.lo[k], kept.last[k]) if kept.lo else (0, most)
        # A least key above the largest possible one keeps nothing.
        band = (1, 0) if lo > most else (max(lo, 0), min(last, most))
        words = kept.seeds[2 * k : 2 * k + 2] or (0, 0)
        rules += [*band, *words, kept.limits[k] if kept.limits else 0]
    return rules, [float(chance) for chance in kept.chances] or [0.0] * (2 * count)


def sparse_merge(
    out: torch.Tensor,
    stats: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    kept: Kept,
    how: SparseMerge,
    wide: bool,
) -> None:
    numel, count = base.numel(), len(models)
    check(numel, out, base, *models)
    check_counters(stats, torch.int64, least=3)
    stride = check_ranks(kept.ranks, count, numel)
    if numel == 0:
        return
    rules, chances = rules_of(kept, count, wide)
    arguments = {
        "out": out,
        "stats": stats,
        "ranks": kept.ranks,
        "stride": stride,
        "KEEP": decides(kept, wide),
        "ELECT": how.elect,
        "DIVIDE_WEIGHTS": how.divide,
        "DIVIDE": how.divisor != 1.0,
        "BARE": how.bare,
    }
    own = [number for pair in zip(how.factors, how.weights, strict=True) for number in pair]
    run(
        "sparse_merge",
        base,
        models,
        arguments,
        [0, kept.start, *rules],
        [how.scale, how.divisor, *own, *chances],
        wide,
        scratch=("stats",),
    )
