"""The merge with learned coefficients: of task vectors as they are, or trimmed as in TIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pymerge.engine.context import Context
from pymerge.engine.work import Sink, Source, Work
from pymerge.methods.sums.passes import run_task_arithmetic
from pymerge.methods.ties.passes import run as run_ties

__all__ = ["run"]


def run(
    works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> Mapping[str, int] | None:
    """Run over all works; `for_tensor` of the record has added TIES' details if there is a
    trim."""
    trims = any("weighting" in work.parameters for work in works)
    return (run_ties if trims else run_task_arithmetic)(works, source, sink, context)
