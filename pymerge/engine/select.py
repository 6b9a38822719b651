"""Exact order statistics of |delta| over any number of tensors, streamed.

A threshold of TIES is an order statistic of the magnitudes of one task vector, over a tensor or
over the whole model. It is found without ever storing a task vector. Magnitudes are compared by
their bits, which have the same order, and counted in a histogram over a bracket of keys. A sample
of the data gives the first bracket, so that one counting pass nearly always suffices. The counts
themselves show whether the wanted rank lies inside, so the result is exact whatever the sample was.
A bracket that missed, or whose bins are wider than one key, is narrowed and counted again.

If exactly k elements are to be kept and several equal the threshold, those with the lowest flat
index are kept: a second, cheap count finds the position of the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pymerge.engine.trim import TrimTarget
from pymerge.memory import MIN_BINS
from pymerge.ops.array import Array, Flat, as_array, concatenate, sample_lines, widen
from pymerge.ops.call import Counters, call
from pymerge.ops.constants import HOT_CHUNK
from pymerge.ops.runner import Runner, fetched, slots, zeros

__all__ = [
    "KEEP_ALL",
    "KEEP_NONE",
    "Cut",
    "Part",
    "Workspace",
    "magnitude_below",
    "most_passes",
    "order_statistics",
    "sample_parts",
]

KEEP_ALL = 0
KEEP_NONE = 2**63 - 1

LINE = 32  # elements sampled together: a cache line of bf16
_SPREAD = 4.0  # half-width of a sampled bracket in standard errors; a miss costs one more pass
_SMALL = 1 << 16  # with fewer elements than this, a first bracket from a sample is not worth it
_COUNTED_AT_ONCE = (1 << 31) - HOT_CHUNK  # the capacity of 32-bit counters, in whole chunks

# One tensor of a scope: its number in flat order, the base, the models. All 1-D and contiguous.
Part = tuple[int, Flat, Sequence[Flat]]
Parts = Callable[[], Iterable[Part]]


@dataclass(frozen=True)
class Cut:
    """A threshold: keep keys > key everywhere, and keys == key before position (part, index) in
    flat order.

    part = END keeps all equal ones.
    """

    key: int
    part: int
    index: int = 0

    END = 1 << 62

    def thresholds(self, part: int, numel: int) -> list[tuple[int, int]]:
        """Return `(stop, smallest key kept)` for the stretches of one part, in order."""
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
    """The bracket of keys that contains one model's wanted rank."""

    model: int
    rank: int  # 1-based, from the smallest
    lo: int
    span: int  # keys lo .. lo + span - 1
    hot: int  # the sample's guess, -1 for none
    exact: bool
    key: int | None = None
    below: int = 0
    equal: int = 0
    # How often the guess occurs in each chunk of each part; kept once the guess proves right.
    chunks: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def shift(self, bins: int) -> int:
        """Return the log2 width of a bin; moves `lo` so that the guess is the first key of its
        bin."""
        shift = _width(self.span, bins - 1)
        if self.hot >= 0:
            before = (self.lo - self.hot) % (1 << shift)
            if before > self.lo:  # keys are not negative
                before -= 1 << shift
            self.lo, self.span = self.lo - before, self.span + before
        return shift

    def narrow(self, row: np.ndarray, shift: int, wide: bool) -> None:
        """Process one pass's counts (see `magnitude_histogram_`): finish, or set the next
        bracket."""
        below, bins, hot_count = int(row[0]), row[1:-2], int(row[-1])
        sums = np.cumsum(bins, dtype=np.int64)
        sums += below
        guess = (self.hot - self.lo) >> shift if self.hot >= 0 else len(bins)
        sums[guess:] += hot_count
        if self.rank <= below:  # the bracket is too high
            self.lo, self.span, self.hot = 0, self.lo, -1
        elif self.rank > sums[-1]:  # too low
            lo = self.lo + (len(bins) << shift)
            self.lo, self.span, self.hot = lo, _largest(wide) - lo + 1, -1
        else:
            found = int(np.searchsorted(sums, self.rank))
            start = self.lo + (found << shift)
            equal = hot_count if found == guess else int(bins[found])
            before = int(sums[found]) - int(bins[found]) - (hot_count if found == guess else 0)
            if shift == 0 or (found == guess and self.rank <= before + hot_count):
                self.key, self.below, self.equal = start, before, equal
                if found != guess:
                    self.chunks.clear()
                return
            self.lo, self.span, self.hot = start, 1 << shift, -1
        self.chunks.clear()


class Workspace:
    """Counters that are kept between scopes: allocating fresh memory costs more than clearing
    it."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.int32)

    def zeros(self, *shape: int) -> np.ndarray:
        """Return an int32 array of zeros, valid until the next call."""
        numel = math.prod(shape)
        if self._memory.size < numel:
            self._memory = np.empty(numel, np.int32)
        counts = self._memory[:numel].reshape(shape)
        counts.fill(0)
        return counts


def _largest(wide: bool) -> int:
    return (1 << (63 if wide else 31)) - 1


def _width(span: int, bins: int) -> int:
    """Return the smallest shift for which `bins` bins of 2**shift keys cover `span` keys."""
    return max(0, (-(-span // bins) - 1).bit_length()) if span > bins else 0


def magnitude_keys(base: Flat, model: Flat, wide: bool) -> np.ndarray:
    """Return bits(|model - base|) of a few elements, as int64 if wide, else int32."""
    # Infinity minus infinity is NaN, which counts as the largest; it is reported elsewhere.
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(widen(as_array(model), wide) - widen(as_array(base), wide))
    return delta.view(np.int64 if wide else np.int32)


def magnitude_below(key: int, wide: bool) -> float:
    """Return the largest magnitude below a threshold: exactly what is above it has the key or a
    larger one. -1 if all are kept, infinity if none is."""
    if key in (KEEP_ALL, KEEP_NONE):
        return -1.0 if key == KEEP_ALL else math.inf
    bits = np.array(key - 1, np.int64 if wide else np.int32)
    return float(bits.view(np.float64 if wide else np.float32))


def most_passes(wide: bool, bins: int = MIN_BINS) -> int:
    """Return the largest number of times that a selection reads its scope after its sample: the
    bracket from the sample, those that narrow the side that it missed, and twice for the position
    of the last element that is kept."""
    narrowed = math.ceil((63 if wide else 31) / math.log2(bins - 1))
    return 1 + narrowed + 2


def sample_size(total: int, most: int) -> int:
    """Return how many elements to sample of `total`: about total^(2/3), the cheapest
    (docs/design.md)."""
    return int(min(most, max(4096, 2 * total ** (2 / 3))))


def sample_parts(parts: Parts, total: int, most: int) -> list[tuple[Array, list[Array]]]:
    """Return small samples (base, models), spread evenly over all parts, as copies."""
    # An odd stride does not hit the same columns of a matrix again and again.
    stride = max(LINE, total * LINE // sample_size(total, most)) | 1
    samples = []
    for _, base, models in parts():
        numel = base.numel()
        lines = (numel - LINE) // stride + 1 if numel >= LINE else 0
        if lines == 0:
            continue
        samples.append(
            (
                sample_lines(base, stride, lines, LINE),
                [sample_lines(model, stride, lines, LINE) for model in models],
            )
        )
    return samples


def sample_brackets(
    samples: Sequence[tuple[Array, Sequence[Array]]],
    model: int,
    rank: int,
    total: int,
    wide: bool,
) -> tuple[int, int, int] | None:
    """Return keys (lo, guess, hi) that very likely enclose the order statistic; None without a
    sample."""
    if not samples:
        return None
    keys = concatenate([magnitude_keys(base, models[model], wide) for base, models in samples])
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
    sample: int = 1 << 17,
    wide: bool = False,
    backend: str | Runner = "auto",
    samples: Sequence[tuple[Array, Sequence[Array]]] | None = None,
    workspace: Workspace | None = None,
) -> tuple[list[Cut], int]:
    """Find the threshold of every model exactly; return the cuts and the number of counting passes.

    parts: called for each pass; yields the tensors of the scope in flat order.
    targets: what to keep of each model.
    total: number of elements in the scope.
    bins: bins of a histogram, a power of two; only the memory and the number of passes depend on
        it.
    sample: most elements to sample; same dependence.
    wide: whether deltas and keys are in float64.
    samples: of all parts, from `sample_parts`; by default they are taken here.
    workspace: counters to reuse.
    """
    cuts = [Cut(KEEP_ALL if t.keep == "all" else KEEP_NONE, Cut.END) for t in targets]
    ranked = [k for k, target in enumerate(targets) if target.keep == "rank"]
    if not ranked:
        return cuts, 0
    if total <= min(_SMALL, sample):
        return _order_statistics_at_once(parts, targets, cuts, wide), 1
    if samples is None:
        samples = sample_parts(parts, total, sample)
    searches = []
    for k in ranked:
        bracket = sample_brackets(samples or (), k, targets[k].rank, total, wide)
        lo, hot, hi = bracket if bracket is not None else (0, -1, _largest(wide))
        searches.append(_Search(k, targets[k].rank, lo, hi - lo + 1, hot, targets[k].exact))

    passes = 0
    while any(search.key is None for search in searches):
        open_ = [search for search in searches if search.key is None]
        _count(parts, open_, bins, wide, backend, workspace or Workspace())
        passes += 1

    for search in searches:
        assert search.key is not None
        target = targets[search.model]
        end = Cut.END
        cuts[search.model] = Cut(search.key, end)
        if target.exact:
            above = total - search.below - search.equal
            wanted = total - target.rank + 1 - above
            if wanted < search.equal:
                if not search.chunks:
                    search.chunks = _equal_chunks(parts, search.model, search.key, wide, backend)
                    passes += 1
                part, index = _position(parts, search, wanted, wide)
                cuts[search.model] = Cut(search.key, part, index)
    return cuts, passes


def _order_statistics_at_once(
    parts: Parts, targets: Sequence[TrimTarget], cuts: list[Cut], wide: bool
) -> list[Cut]:
    """Do the same for a scope so small that its magnitudes can simply be held and sorted."""
    held = [(part, base, models) for part, base, models in parts() if base.numel() > 0]
    ends = np.cumsum([base.numel() for _, base, _ in held])
    for k, target in enumerate(targets):
        if target.keep != "rank":
            continue
        keys = concatenate([magnitude_keys(base, models[k], wide) for _, base, models in held])
        key = int(np.partition(keys, target.rank - 1)[target.rank - 1])
        cuts[k] = Cut(key, Cut.END)
        if target.exact:
            wanted = len(keys) - target.rank + 1 - int((keys > key).sum())
            last = int(np.flatnonzero(keys == key)[wanted - 1])
            number = int(np.searchsorted(ends, last, side="right"))
            begin = int(ends[number]) - held[number][1].numel()
            cuts[k] = Cut(key, held[number][0], last - begin + 1)
    return cuts


def _count(
    parts: Parts,
    searches: Sequence[_Search],
    bins: int,
    wide: bool,
    backend: str | Runner,
    workspace: Workspace,
) -> None:
    """Make one pass over all parts, and let every search process its counts."""
    shifts = [search.shift(bins) for search in searches]
    # Use no more bins than the widest bracket needs: clearing and adding them up costs time too.
    used = max(
        -(-search.span // (1 << shift)) for search, shift in zip(searches, shifts, strict=True)
    )
    shape = slots(backend), len(searches), used + 3
    on_host = isinstance(backend, str) or backend.on_host
    counts: Counters = workspace.zeros(*shape) if on_host else zeros(backend, shape, "int32")
    hot: list[tuple[int, Counters]] = []
    totals: np.ndarray | None = None
    counted = 0
    wants_chunks = any(search.exact and search.hot >= 0 for search in searches)
    for part, base, models in parts():
        for start in range(0, base.numel(), _COUNTED_AT_ONCE):
            stop = min(start + _COUNTED_AT_ONCE, base.numel())
            if counted + stop - start > _COUNTED_AT_ONCE:
                totals = _add_slots(fetched(counts), totals)
                counts[...] = 0
                counted = 0
            counted += stop - start
            chunks = -(-(stop - start) // HOT_CHUNK) if wants_chunks else 0
            hot_chunks = zeros(backend, (len(searches), chunks), "int32")
            if chunks > 0:
                hot.append((part, hot_chunks))
            call(
                "magnitude_histogram_",
                counts,
                hot_chunks,
                base[start:stop],
                [models[search.model][start:stop] for search in searches],
                [search.lo for search in searches],
                shifts,
                [search.hot for search in searches],
                wide=wide,
                backend=backend,
            )
    for part, hot_chunks in hot:
        for search, row in zip(searches, fetched(hot_chunks), strict=True):
            search.chunks.append((part, row))
    rows = _add_slots(fetched(counts), totals)
    for search, row, shift in zip(searches, rows, shifts, strict=True):
        search.narrow(row, shift, wide)


def _add_slots(slots: np.ndarray, totals: np.ndarray | None) -> np.ndarray:
    """Return the sum of the slots, in 32 bits as long as that suffices."""
    for slot in slots[1:]:
        slots[0] += slot
    return slots[0].copy() if totals is None else totals + slots[0].astype(np.int64)


def _equal_chunks(
    parts: Parts, model: int, key: int, wide: bool, backend: str | Runner
) -> list[tuple[int, np.ndarray]]:
    """Count the elements whose key equals `key` in every chunk of every part."""
    found: list[tuple[int, Counters]] = []
    for part, base, models in parts():
        counts = zeros(backend, (-(-base.numel() // HOT_CHUNK),), "int64")
        call(
            "magnitude_equal_counts_",
            counts,
            base,
            models[model],
            key,
            HOT_CHUNK,
            wide=wide,
            backend=backend,
        )
        found.append((part, counts))
    return [(part, fetched(counts)) for part, counts in found]


def _position(parts: Parts, search: _Search, wanted: int, wide: bool) -> tuple[int, int]:
    """Return (part, index) just past the wanted-th element, in flat order, whose key is the
    threshold."""
    left, chunk_at = wanted, 0
    for position, (part, counts) in enumerate(search.chunks):
        # A part longer than one call of the histogram has several rows of chunks.
        again = position > 0 and search.chunks[position - 1][0] == part
        chunk_at = chunk_at if again else 0
        sums = counts.cumsum(dtype=np.int64)
        if len(sums) == 0 or sums[-1] < left:
            left -= int(sums[-1]) if len(sums) else 0
            chunk_at += len(sums)
            continue
        chunk = int(np.searchsorted(sums, left))
        left -= int(sums[chunk] - counts[chunk])
        begin = (chunk_at + chunk) * HOT_CHUNK
        base, models = next((b, m) for number, b, m in parts() if number == part)
        end = min(begin + HOT_CHUNK, base.numel())
        keys = magnitude_keys(base[begin:end], models[search.model][begin:end], wide)
        return part, begin + int(np.flatnonzero(keys == search.key)[left - 1]) + 1
    raise AssertionError(
        "the counts of equal magnitudes changed between two passes over the inputs"
    )
