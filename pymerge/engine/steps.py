"""What a method reads, pass by pass: one statement for the plan, the progress and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["MERGE", "Method", "Step", "whole_model"]


@dataclass(frozen=True)
class Step:
    """One step of a merge: a pass over its inputs, or several for one purpose.

    Attributes:
        name: what progress and reports call it.
        words: what a plan says it is for.
        scope: "tensor" where a tensor's step follows the one before it on the same tensor, while
            that is in the page cache; "model" for a pass of its own over all tensors.
        passes: how often it reads its scope, as a rule.
        most: how often in the worst case; None for `passes`. A selection (`selects`) takes more
            where its sample misleads: the engine knows how many.
        selects: it finds order statistics, with histograms.
        statistics: it reads what was collected from data, not the models.
    """

    name: str
    words: str
    scope: Literal["tensor", "model"] = "tensor"
    passes: int = 1
    most: int | None = None
    selects: bool = False
    statistics: bool = False


MERGE = Step("merge", "the merge")


def whole_model(steps: Sequence[Step]) -> bool:
    """Return whether a tensor of the result depends on other tensors."""
    return any(step.scope == "model" for step in steps)


class Method(Protocol):
    """What the engine asks a method's record."""

    @property
    def name(self) -> str: ...

    @property
    def details(self) -> Any: ...

    def runner(self) -> Any:
        """Return the function that runs the method: (works, source, sink, context) -> counts."""
        ...

    def gathers(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether all that is done with a tensor is one op, which needs no other."""
        ...

    def steps(self, parameters: Mapping[str, Any], numel: int, total: int) -> tuple[Step, ...]:
        """Return what is read for a tensor of `numel` elements in a model of `total`."""
        ...
