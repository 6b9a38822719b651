"""Exact order statistics of |delta| over any number of tensors, streamed.

A threshold of TIES is an order statistic of the magnitudes of one task vector, over a tensor or over the whole
model. It is found without ever holding a task vector: magnitudes are compared by their bits, which are ordered
as they are, and counted in a histogram over a bracket of keys. A sample of the data gives the first bracket, so
that one counting pass nearly always suffices; the counts themselves show whether the wanted rank lies inside, so
the result is exact whatever the sample was. A bracket that missed, or whose bins are wider than one key, is
narrowed and counted again.

Where exactly k elements are to be kept and several equal the threshold, those with the lowest flat index are
kept: a second, cheap count finds the position of the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pymerge.backends import resolve
from pymerge.methods.ties import TrimTarget

__all__ = ["KEEP_ALL", "KEEP_NONE", "Cut", "Part", "order_statistics", "sample_brackets"]

KEEP_ALL = 0
KEEP_NONE = 2**63 - 1

LINE = 32  # elements sampled together: a cache line of bf16
_SPREAD = 6.0  # half-width of a sampled bracket in standard errors; lines are not independent draws
_SMALL = 1 << 16  # below this many elements a first bracket from a sample is not worth its cost
_EQUAL_CHUNK = 4096
_EQUAL_WINDOW = 1 << 22
_COUNTED_AT_ONCE = (1 << 31) - 1  # what 32-bit counters hold

# One tensor of a scope: its number in flat order, the base, the models. All 1-D and contiguous.
Part = tuple[int, torch.Tensor, Sequence[torch.Tensor]]
Parts = Callable[[], Iterable[Part]]


@dataclass(frozen=True)
class Cut:
    """A threshold: keep keys > key everywhere, and keys == key before position (part, index) in flat order.

    part = -1 keeps no equal key, part = END keeps all.
    """

    key: int
    part: int
    index: int = 0

    END = 1 << 62

    def thresholds(self, part: int, numel: int) -> list[tuple[int, int]]:
        """Return `(stop, least key kept)` for the stretches of one part, in order."""
        if part < self.part:
            return [(numel, self.key)]
        if part > self.part or self.index == 0:
            return [(numel, _after(self.key))]
        if self.index >= numel:
            return [(numel, self.key)]
        return [(self.index, self.key), (numel, _after(self.key))]


def _after(key: int) -> int:
    return key if key == KEEP_NONE else key + 1


@dataclass
class _Search:
    """The bracket of keys that holds one model's wanted rank."""

    model: int
    rank: int  # 1-based, from the smallest
    lo: int
    span: int  # keys lo .. lo + span - 1
    hot: int  # the sample's guess, -1 for none
    key: int | None = None
    below: int = 0
    equal: int = 0


def _largest(wide: bool) -> int:
    return (1 << (63 if wide else 31)) - 1


def _width(span: int, bins: int) -> int:
    """Return the least shift for which `bins` bins of 2**shift keys cover `span` keys."""
    return max(0, (-(-span // bins) - 1).bit_length()) if span > bins else 0


def magnitude_keys(base: torch.Tensor, model: torch.Tensor, wide: bool) -> np.ndarray:
    """Return bits(|model - base|) of a small sample, as int64."""
    dtype = torch.float64 if wide else torch.float32
    delta = (model.to(dtype) - base.to(dtype)).abs().cpu().numpy()
    return delta.view(np.int64 if wide else np.int32).astype(np.int64, copy=False).reshape(-1)


def sample_lines(tensor: torch.Tensor, stride: int, lines: int) -> torch.Tensor:
    """Return a view [lines, LINE] of every stride-th stretch of a 1-D tensor."""
    return tensor.as_strided((lines, LINE), (stride, 1), tensor.storage_offset())


def sample_size(total: int, most: int) -> int:
    """Return how many elements to sample of `total`: about total^(2/3), the cheapest (docs/design.md)."""
    return int(min(most, max(4096, total ** (2 / 3))))


def sample_parts(parts: Parts, total: int, most: int) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return small samples (base, models) spread evenly over all parts."""
    # An odd stride does not keep hitting the same columns of a matrix.
    stride = max(LINE, total * LINE // sample_size(total, most)) | 1
    samples = []
    for _, base, models in parts():
        numel = base.numel()
        lines = (numel - LINE) // stride + 1 if numel >= LINE else 0
        if lines == 0:
            continue
        samples.append(
            (
                sample_lines(base, stride, lines),
                [sample_lines(model, stride, lines) for model in models],
            )
        )
    return samples


def sample_brackets(
    samples: Sequence[tuple[torch.Tensor, Sequence[torch.Tensor]]],
    model: int,
    rank: int,
    total: int,
    wide: bool,
) -> tuple[int, int, int] | None:
    """Return keys (lo, guess, hi) that very likely enclose the order statistic, or None without a sample."""
    if not samples:
        return None
    keys = np.concatenate([magnitude_keys(base, models[model], wide) for base, models in samples])
    size = len(keys)
    share = rank / total
    middle = share * size
    half = _SPREAD * math.sqrt(size * share * (1 - share)) + 2
    low, high = math.floor(middle - half), math.ceil(middle + half)
    wanted = [min(max(index, 0), size - 1) for index in (low, math.floor(middle), high)]
    ordered = np.partition(keys, sorted(set(wanted)))
    lo = 0 if low < 0 else int(ordered[wanted[0]])
    hi = _largest(wide) if high >= size else int(ordered[wanted[2]])
    return lo, int(ordered[wanted[1]]), hi


def order_statistics(
    parts: Parts,
    targets: Sequence[TrimTarget],
    total: int,
    *,
    bins: int = 1 << 18,
    sample: int = 1 << 20,
    wide: bool = False,
    backend: str = "auto",
    samples: Sequence[tuple[torch.Tensor, Sequence[torch.Tensor]]] | None = None,
) -> tuple[list[Cut], int]:
    """Find the threshold of every model exactly; return the cuts and the number of counting passes.

    parts: called for each pass; yields the tensors of the scope in flat order.
    targets: what to keep of each model.
    total: number of elements in the scope.
    bins: bins of a histogram, a power of two; only the memory and the number of passes depend on it.
    sample: most elements to sample; as above.
    wide: deltas and keys are of float64.
    """
    cuts = [Cut(KEEP_ALL if t.keep == "all" else KEEP_NONE, Cut.END) for t in targets]
    ranked = [k for k, target in enumerate(targets) if target.keep == "rank"]
    if not ranked:
        return cuts, 0
    if total < _SMALL:
        bins = min(bins, 1 << 11)
    if samples is None and total >= _SMALL:
        samples = sample_parts(parts, total, sample)
    searches = []
    for k in ranked:
        bracket = sample_brackets(samples or (), k, targets[k].rank, total, wide)
        lo, hot, hi = bracket if bracket is not None else (0, -1, _largest(wide))
        searches.append(_Search(k, targets[k].rank, lo, hi - lo + 1, hot))

    passes = 0
    while any(search.key is None for search in searches):
        open_ = [search for search in searches if search.key is None]
        counts = _count(parts, open_, bins, wide, backend)
        passes += 1
        for search, row in zip(open_, counts, strict=True):
            _narrow(search, row, _width(search.span, bins), wide)

    for search in searches:
        assert search.key is not None
        target = targets[search.model]
        end = Cut.END
        cuts[search.model] = Cut(search.key, end)
        if target.exact:
            above = total - search.below - search.equal
            wanted = total - target.rank + 1 - above
            if wanted < search.equal:
                part, index = _position(parts, search.model, search.key, wanted, wide, backend)
                cuts[search.model] = Cut(search.key, part, index)
                passes += 1
    return cuts, passes


def _count(
    parts: Parts, searches: Sequence[_Search], bins: int, wide: bool, backend: str
) -> np.ndarray:
    """Make one pass: return int64 counts [searches, 1 + bins + 1] of keys below, in and above each bracket."""
    shifts = [_width(search.span, bins) for search in searches]
    # No more bins than the widest bracket needs: clearing and adding them up costs too.
    used = max(-(-search.span // (1 << shift)) for search, shift in zip(searches, shifts, strict=True))
    slots = resolve(backend).slots()
    counts = torch.zeros(slots, len(searches), used + 2, dtype=torch.int32)
    totals = np.zeros((len(searches), used + 2), dtype=np.int64)
    counted = 0
    for _, base, models in parts():
        for start in range(0, base.numel(), _COUNTED_AT_ONCE):
            stop = min(start + _COUNTED_AT_ONCE, base.numel())
            if counted + stop - start > _COUNTED_AT_ONCE:
                totals += counts.numpy().sum(axis=0, dtype=np.int64)
                counts.zero_()
                counted = 0
            counted += stop - start
            torch.ops.pymerge.magnitude_histogram_(
                counts,
                base[start:stop],
                [models[search.model][start:stop] for search in searches],
                [search.lo for search in searches],
                shifts,
                [search.hot for search in searches],
                wide=wide,
                backend=backend,
            )
    return totals + counts.numpy().sum(axis=0, dtype=np.int64)


def _narrow(search: _Search, row: np.ndarray, shift: int, wide: bool) -> None:
    """Take one pass's counts: finish the search, or set its next bracket."""
    below = int(row[0])
    sums = below + np.cumsum(row[1:-1])
    if search.rank <= below:  # the bracket lies too high
        search.lo, search.span, search.hot = 0, search.lo, -1
    elif search.rank > sums[-1]:  # too low
        lo = search.lo + (len(sums) << shift)
        search.lo, search.span, search.hot = lo, _largest(wide) - lo + 1, -1
    else:
        found = int(np.searchsorted(sums, search.rank))
        lo = search.lo + (found << shift)
        if shift == 0:
            search.key = lo
            search.equal = int(row[1 + found])
            search.below = int(sums[found]) - search.equal
        else:
            search.lo, search.span = lo, 1 << shift


def _position(
    parts: Parts, model: int, key: int, wanted: int, wide: bool, backend: str
) -> tuple[int, int]:
    """Return (part, index) just past the wanted-th element, in flat order, whose key equals `key`."""
    if wanted == 0:
        return -1, 0
    left = wanted
    for part, base, models in parts():
        tensor = models[model]
        for start in range(0, base.numel(), _EQUAL_WINDOW):
            stop = min(start + _EQUAL_WINDOW, base.numel())
            counts = torch.zeros(-(-(stop - start) // _EQUAL_CHUNK), dtype=torch.int64)
            torch.ops.pymerge.magnitude_equal_counts_(
                counts,
                base[start:stop],
                tensor[start:stop],
                key,
                _EQUAL_CHUNK,
                wide=wide,
                backend=backend,
            )
            sums = counts.numpy().cumsum()
            if sums[-1] < left:
                left -= int(sums[-1])
                continue
            chunk = int(np.searchsorted(sums, left))
            left -= int(sums[chunk] - counts[chunk])
            begin = start + chunk * _EQUAL_CHUNK
            end = min(begin + _EQUAL_CHUNK, stop)
            equal = magnitude_keys(base[begin:end], tensor[begin:end], wide) == key
            return part, begin + int(np.flatnonzero(equal)[left - 1]) + 1
    raise AssertionError("the counts of equal magnitudes changed between two passes over the inputs")
