"""What a trim keeps: an order statistic of magnitudes, or everything, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TrimTarget"]


@dataclass(frozen=True)
class TrimTarget:
    """What a trim of `total` elements keeps.

    keep is "all", "none" or "rank"; `rank` (1-based, from the smallest magnitude) is the order
    statistic that serves as the threshold. With `exact`, the number kept is total - rank + 1;
    otherwise it is every element at or above the threshold. The threshold rules' own rank keeps one
    element more than k; if exactly k are requested, they take the next rank.
    """

    keep: Literal["all", "none", "rank"]
    rank: int = 0
    exact: bool = False
