"""What a method reads, pass by pass: one statement for the plan, the progress and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

__all__ = ["MERGE", "Method", "Step", "whole_model"]


class Step(NamedTuple):
    """One step of a merge: one pass over its inputs, or several for one purpose.

    Attributes:
        name: its name in progress displays and reports.
        words: its purpose, as a plan describes it.
        scope: "tensor" if the step follows the previous one on the same tensor, while that is in
            the page cache; "model" for a pass of its own over all tensors.
        passes: how often it normally reads its scope.
        most: how often in the worst case; None for `passes`. A selection (`selects`) takes more if
            its sample misleads; the engine knows how many.
        selects: whether it finds order statistics, with histograms.
        statistics: whether it reads statistics collected from data, not the models.
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
    """What the engine needs from a method's record."""

    @property
    def name(self) -> str: ...

    @property
    def details(self) -> Any: ...

    def runner(self) -> Any:
        """Return the function that runs the method: (works, source, sink, context) -> counts."""
        ...

    def gathers(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether a tensor is merged by a single op, which needs no other."""
        ...

    def steps(self, parameters: Mapping[str, Any], numel: int, total: int) -> tuple[Step, ...]:
        """Return the steps for a tensor of `numel` elements in a model of `total`."""
        ...
