"""The reference of `compare_`: see ComparisonArgs in csrc/kernel_table.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.ops.comparison import BINS, EVERY, LOWEST, PARTS, Comparison
from pymerge.ops.constants import HOT_CHUNK, SUM_CHUNK, SUM_GROUP, SUM_LANES
from pymerge.ops.reference.sums import added, chunks_of
from pymerge.ops.reference.value import Element, keys

__all__ = ["compare"]


def compare(
    sums: Tensor,
    counts: Tensor,
    base: Tensor,
    models: Sequence[Tensor],
    thresholds: Sequence[int],
    start: int,
    every: int,
    wide: bool,
) -> None:
    """Write the sums of segments, and add to the counts."""
    shape = Comparison(len(models), len(thresholds) // len(models))
    shape.check(sums, counts, base.numel(), thresholds, start, every, "reference")
    if base.numel() == 0:
        return
    element = Element(base, models, wide)
    deltas = element.deltas
    magnitudes = [keys(delta) for delta in deltas]
    largest = 2**63 - 1 if wide else 2**31 - 1
    levels = [[key >= 1 for key in magnitudes]]
    for level in range(shape.levels):
        own = thresholds[level * shape.models : (level + 1) * shape.models]
        levels.append(
            [key >= min(least, largest) for key, least in zip(magnitudes, own, strict=True)]
        )

    doubles = [delta.to(torch.float64) for delta in deltas]
    whole = element.base.to(torch.float64)
    rows = [_plain(whole * whole), *(_grouped(delta.abs()) for delta in deltas)]
    rows += [_grouped((deltas[i] - deltas[j]).abs()) for i, j in shape.pairs]
    rows += [_plain(a * b) for i, a in enumerate(doubles) for b in doubles[i:]]
    for k, delta in enumerate(deltas):
        squares = delta * delta
        rows += [_grouped(torch.where(own[k], squares, element.zero)) for own in levels[1:]]
    for number, row in enumerate(rows):
        sums[number] = _segments(row)

    found = [number for level in levels for number in _level(level, deltas, shape)]
    found += [int(_equal(element.models[i], element.models[j]).sum()) for i, j in shape.pairs]
    looked_at = _looked_at(base.numel(), start, every, base.device)
    for key in magnitudes:
        found += _magnitudes(key[looked_at], wide)
    counts += torch.tensor(found, dtype=torch.int64, device=counts.device)


def _plain(values: Tensor) -> Tensor:
    """Return the values as doubles [chunks, 1, elements of a chunk]."""
    return chunks_of(values, 0)


def _grouped(values: Tensor) -> Tensor:
    """Return sums over SUM_GROUP steps of all lanes, computed in the compute type, as doubles
    [chunks, 1, sums of a chunk]."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % SUM_CHUNK))
    steps = padded.view(-1, SUM_GROUP, SUM_LANES)
    total = torch.zeros_like(steps[:, 0])
    for step in steps.unbind(1):
        total = total + step
    return total.to(torch.float64).view(-1, 1, SUM_CHUNK // SUM_GROUP)


def _segments(values: Tensor) -> Tensor:
    """Return the sums of each segment: over each chunk, then over its chunks, in order."""
    chunks = added(values)
    per_segment = HOT_CHUNK // SUM_CHUNK
    table = torch.nn.functional.pad(chunks, (0, -len(chunks) % per_segment)).view(-1, per_segment)
    total = torch.zeros_like(table[:, 0])
    for part in table.unbind(1):
        total = total + part
    return total


def _level(kept: Sequence[Tensor], deltas: Sequence[Tensor], shape: Comparison) -> list[int]:
    """Return the counts of one level."""
    negative = [delta < 0 for delta in deltas]
    found = [int(own.sum()) for own in kept]
    both = [(kept[i] & kept[j], negative[i] ^ negative[j]) for i, j in shape.pairs]
    found += [int(own.sum()) for own, _ in both]
    found += [int((own & opposite).sum()) for own, opposite in both]
    less = torch.stack([own & sign for own, sign in zip(kept, negative, strict=True)]).sum(dim=0)
    many = torch.stack(list(kept)).sum(dim=0)
    fewer = torch.minimum(less, many - less)
    found += [int(((many == n) & (fewer == m)).sum()) for n, m in shape.splits]
    return found


def _equal(first: Tensor, second: Tensor) -> Tensor:
    """Return where two models have the same bits, or zeros of either sign."""
    kind = torch.int64 if first.dtype == torch.float64 else torch.int32
    return (first.view(kind) == second.view(kind)) | ((first == 0) & (second == 0))


def _looked_at(numel: int, start: int, every: int, device: torch.device) -> Tensor:
    """Return a mask of the elements whose magnitudes are counted."""
    if every == 1:
        return torch.ones(numel, dtype=torch.bool, device=device)
    index = torch.arange(numel, device=device)
    chunk = (start + index) // SUM_CHUNK
    part = ((chunk * 2654435761) & 0xFFFFFFFF) >> 28
    return index % SUM_CHUNK // (SUM_CHUNK // EVERY) == part


def _magnitudes(keys: Tensor, wide: bool) -> list[int]:
    shift, bias = (49, 1023) if wide else (20, 127)
    bins = ((keys >> shift) - (bias + LOWEST) * PARTS).clamp(0, BINS - 1)
    bins = torch.where(keys == 0, BINS, bins)
    return [int(count) for count in torch.bincount(bins.to(torch.int64), minlength=BINS + 1)]
