"""The reference of sums in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pymerge.ops.arguments import Kept, check_kind
from pymerge.ops.constants import SUM_CHUNK, SUM_LANES
from pymerge.ops.reference.pcb import pcb_rows
from pymerge.ops.reference.sparse import kept_values
from pymerge.ops.reference.value import Element, keys, scalar

__all__ = ["SUMS", "added", "chunk_sums", "chunks_of", "extremes"]

Row = tuple[str, torch.Tensor]  # how to reduce ("sum", "min", "max"), values
Rows = Callable[[Element, Sequence[float], Kept], list[Row]]  # of an element, reals, kept elements
_AT_ONCE = 1 << 20


def chunks_of(values: torch.Tensor, columns: int, filling: float = 0.0) -> torch.Tensor:
    """Return the values as doubles [segments, chunks of a segment, elements of a chunk], padded.

    A segment is a row of `columns`, or a chunk if `columns` is 0. A chunk has SUM_CHUNK elements;
    if a row is shorter, it has as many steps of all lanes as cover the row, because more zeros
    would add nothing.
    """
    length = columns or SUM_CHUNK
    segments = -(-values.numel() // length)
    chunk = min(SUM_CHUNK, -(-length // SUM_LANES) * SUM_LANES)
    room = -(-length // chunk) * chunk
    doubles = values.to(torch.float64)
    whole = torch.nn.functional.pad(doubles, (0, segments * length - len(doubles)), value=filling)
    rows = whole.view(segments, length)
    padded = torch.nn.functional.pad(rows, (0, room - length), value=filling)
    return padded.view(segments, -1, chunk)


def added(chunks: torch.Tensor) -> torch.Tensor:
    """Return the sum of each segment, in the order that all backends use: each lane of a chunk in
    order, then its lanes, then the chunks of the segment."""
    steps = chunks.unflatten(-1, (-1, SUM_LANES))
    lanes = torch.zeros_like(steps[..., 0, :])
    for step in steps.unbind(-2):
        lanes = lanes + step
    sums = torch.zeros_like(lanes[..., 0])
    for lane in lanes.unbind(-1):
        sums = sums + lane
    total = sums[..., 0]
    for part in sums.unbind(-1)[1:]:
        total = total + part
    return total


def _gram(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    doubles = [delta.to(torch.float64) for delta in element.deltas]
    return [("sum", a * b) for i, a in enumerate(doubles) for b in doubles[i:]]


def _dots(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    gradient = element.models[-1].to(torch.float64)
    return [("sum", gradient * delta.to(torch.float64)) for delta in element.deltas[:-1]]


def _sparse(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    pairs = [(delta, kept_values(delta, k, kept)) for k, delta in enumerate(element.deltas)]
    return [("sum", values.abs()) for pair in pairs for values in pair]


def _statistics(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    rows: list[Row] = []
    for delta in element.deltas:
        double = delta.to(torch.float64)
        rows += [("min", delta), ("max", delta), ("sum", delta.abs()), ("sum", double * double)]
    return rows


def _ram_counts(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    active = [delta.abs() > scalar(reals[0], delta) for delta in element.deltas]
    count = torch.stack(active).sum(dim=0)
    masks = [mask for own in active for mask in (own & (count == 1), own & (count > 1))]
    return [("sum", mask.to(torch.float64)) for mask in masks]


def _emr(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    positive, largest = element.unified()
    own = element.deltas[int(reals[0])]
    agrees = torch.where(positive, own > 0, own < 0)
    return [("sum", own.abs()), ("sum", torch.where(agrees, largest, element.zero))]


def _sce(element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    chosen = keys(element.variance()) >= kept.lo[0]
    deltas = [torch.where(chosen, delta, element.zero) for delta in element.deltas]
    return [("sum", delta.to(torch.float64) * delta.to(torch.float64)) for delta in deltas]


def _pcb(kind: str) -> Rows:
    return lambda element, reals, kept: pcb_rows(kind, element.base, element.models, reals)


# For each kind, the rows: how each is reduced, and its values.
SUMS: dict[str, Rows] = {
    "sparse": _sparse,
    "gram": _gram,
    "pcb_extremes": _pcb("pcb_extremes"),
    "pcb_exp": _pcb("pcb_exp"),
    "dots": _dots,
    "statistics": _statistics,
    "ram_counts": _ram_counts,
    "emr": _emr,
    "sce": _sce,
}


def extremes(values: torch.Tensor, how: str, columns: int) -> torch.Tensor:
    """Return the minimum or the maximum of each segment, ignoring NaN; -0 becomes 0."""
    infinity = float("inf") if how == "min" else float("-inf")
    clean = torch.where(values.isnan(), torch.full_like(values, infinity), values)
    chunks = chunks_of(clean, columns, infinity) + 0.0
    return chunks.amin(dim=(-1, -2)) if how == "min" else chunks.amax(dim=(-1, -2))


def chunk_sums(
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    kind: str,
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    """Compute the sums of a kind in a fixed order; SumsArgs in csrc/kernel_table.h defines them."""
    check_kind("chunk_sums_", kind, SUMS, "reference")
    rows = SUMS[kind](Element(base, models, wide), reals, kept)
    if models[0].numel() == 0:
        return
    summed = [number for number, (how, _) in enumerate(rows) if how == "sum"]
    at_once = max(1, _AT_ONCE // models[0].numel())  # rows summed together
    for first in range(0, len(summed), at_once):
        numbers = summed[first : first + at_once]
        stacked = torch.stack([chunks_of(rows[number][1], columns) for number in numbers])
        partials[numbers] = added(stacked)
    for number, (how, values) in enumerate(rows):
        if how != "sum":
            partials[number] = extremes(values, how, columns)
