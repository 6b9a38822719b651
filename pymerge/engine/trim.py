"""What a trim keeps: an order statistic of magnitudes, or everything, or nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["TrimTarget"]


class TrimTarget(NamedTuple):
    """What a trim of `total` elements keeps.

    keep is "all", "none" or "rank"; `rank` (1-based, from the smallest magnitude) is the order
    statistic that serves as the threshold. With `exact`, the number kept is total - rank + 1;
    otherwise it is every element at or above the threshold. The threshold rules' own rank keeps one
    element more than k; if exactly k are requested, they take the next rank.
    """

    keep: Literal["all", "none", "rank"]
    rank: int = 0
    exact: bool = False
