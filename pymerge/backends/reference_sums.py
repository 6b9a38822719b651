"""The reference of sums in a fixed order: see `pymerge.backends.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pymerge.backends.arguments import Kept
from pymerge.backends.reference_more import Element, kept_values, keys, scalar
from pymerge.backends.reference_pcb import pcb_rows
from pymerge.backends.sizes import SUM_CHUNK, SUM_LANES

__all__ = ["chunk_sums"]

Row = tuple[str, torch.Tensor]  # how ("sum", "min", "max"), values


def _chunked(values: torch.Tensor) -> torch.Tensor:
    """Return values as doubles [chunks, steps, lanes], padded with zeros."""
    chunks = -(-values.numel() // SUM_CHUNK)
    padded = torch.zeros(chunks * SUM_CHUNK, dtype=torch.float64, device=values.device)
    padded[: values.numel()] = values.to(torch.float64)
    return padded.view(chunks, SUM_CHUNK // SUM_LANES, SUM_LANES)


def _chunk_sums(values: torch.Tensor) -> torch.Tensor:
    """Add up chunks of doubles, each lane in order, then the lanes: the order of all backends."""
    steps = _chunked(values)
    lanes = torch.zeros_like(steps[:, 0])
    for step in steps.unbind(1):
        lanes = lanes + step
    total = torch.zeros_like(lanes[:, 0])
    for lane in lanes.unbind(1):
        total = total + lane
    return total


def _sum_rows(kind: str, element: Element, reals: Sequence[float], kept: Kept) -> list[Row]:
    """Return what is added up, row by row: values, and how ("sum", "min", "max")."""
    deltas = element.deltas
    if kind == "gram":
        doubles = [delta.to(torch.float64) for delta in deltas]
        return [("sum", a * b) for i, a in enumerate(doubles) for b in doubles[i:]]
    if kind == "dots":
        gradient = element.models[-1].to(torch.float64)
        return [("sum", gradient * delta.to(torch.float64)) for delta in deltas[:-1]]
    if kind == "sparse":
        pairs = [(delta, kept_values(delta, k, kept)) for k, delta in enumerate(deltas)]
        return [("sum", values.abs()) for pair in pairs for values in pair]
    if kind == "statistics":
        rows: list[Row] = []
        for delta in deltas:
            double = delta.to(torch.float64)
            rows += [("min", delta), ("max", delta), ("sum", delta.abs()), ("sum", double * double)]
        return rows
    if kind == "ram_counts":
        active = [delta.abs() > scalar(reals[0], delta) for delta in deltas]
        count = torch.stack(active).sum(dim=0)
        masks = [mask for own in active for mask in (own & (count == 1), own & (count > 1))]
        return [("sum", mask.to(torch.float64)) for mask in masks]
    if kind == "emr":
        positive, largest = element.unified()
        own = deltas[int(reals[0])]
        agrees = torch.where(positive, own > 0, own < 0)
        return [("sum", own.abs()), ("sum", torch.where(agrees, largest, element.zero))]
    assert kind == "sce"
    chosen = keys(element.variance()) >= kept.lo[0]
    masked = [torch.where(chosen, delta, element.zero).to(torch.float64) for delta in deltas]
    return [("sum", values * values) for values in masked]


def chunk_extremes(values: torch.Tensor, how: str) -> torch.Tensor:
    """Return the least or the largest value of each chunk; NaN counts for nothing, -0 is 0."""
    infinity = float("inf") if how == "min" else float("-inf")
    clean = torch.where(values.isnan(), torch.full_like(values, infinity), values)
    chunks = -(-values.numel() // SUM_CHUNK)
    room = torch.full((chunks * SUM_CHUNK,), infinity, dtype=torch.float64, device=values.device)
    room[: values.numel()] = clean.to(torch.float64) + 0.0
    steps = room.view(chunks, SUM_CHUNK)
    return steps.amin(dim=1) if how == "min" else steps.amax(dim=1)


def _row_sums(how: str, values: torch.Tensor, columns: int) -> torch.Tensor:
    reduce = _chunk_sums if how == "sum" else lambda part: chunk_extremes(part, how)
    if columns == 0 or values.numel() == 0:
        return reduce(values)
    # Each row is filled up to whole chunks; what a row's chunks give is added up in order.
    rows = values.view(-1, columns)
    room = -(-columns // SUM_CHUNK) * SUM_CHUNK
    filling = rows.new_full((len(rows), room - columns), 0.0 if how == "sum" else float("nan"))
    chunks = reduce(torch.cat([rows, filling], dim=1).view(-1)).view(len(rows), -1)
    if how != "sum":
        return chunks.amin(dim=1) if how == "min" else chunks.amax(dim=1)
    total = chunks[:, 0]
    for part in chunks.unbind(1)[1:]:
        total = total + part
    return total


def chunk_sums(
    kind: str,
    partials: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    reals: Sequence[float],
    kept: Kept,
    columns: int,
    wide: bool,
) -> None:
    """Sums in a fixed order: SumsArgs in csrc/kernel_table.h says of what."""
    if kind.startswith("pcb"):
        rows = pcb_rows(kind, base, models, reals)
    else:
        rows = _sum_rows(kind, Element(base, models, wide), reals, kept)
    for number, (how, values) in enumerate(rows):
        partials[number] = _row_sums(how, values, columns)
