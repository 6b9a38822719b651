"""Order statistics: exact against a sort, whatever the sample, the bins and the parts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pymerge.engine import select
from pymerge.engine.select import Cut, Part, order_statistics
from pymerge.engine.trim import TrimTarget
from pymerge.ops.constants import HOT_CHUNK

Tensors = list[torch.Tensor]


class Scope:
    """Tensors whose thresholds are wanted; counts how often they are gone through."""

    def __init__(self, bases: Tensors, models: list[Tensors], numbers: Sequence[int] = ()) -> None:
        self.bases = bases
        self.models = models  # of each base
        self.numbers = numbers or range(len(bases))
        self.total = sum(base.numel() for base in bases)
        self.walks = 0

    def parts(self) -> Iterator[Part]:
        self.walks += 1
        yield from zip(self.numbers, self.bases, self.models, strict=True)

    def deltas(self, k: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat(
            [
                (models[k].to(dtype) - base.to(dtype)).abs()
                for base, models in zip(self.bases, self.models, strict=True)
            ]
        )

    def kept(self, k: int, cut: Cut, dtype: torch.dtype) -> torch.Tensor:
        """Return what a cut keeps, stretch by stretch, as the merge sees it."""
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        keys = self.deltas(k, dtype).view(bits)
        kept, begin = [], 0
        for number, base in zip(self.numbers, self.bases, strict=True):
            start = 0
            for stop, key in cut.thresholds(number, base.numel()):
                least = min(key, torch.iinfo(bits).max)
                part = keys[begin + start : begin + stop] >= least
                # KEEP_NONE is above every key
                kept.append(part & (key != select.KEEP_NONE))
                start = stop
            assert start == base.numel()
            begin += base.numel()
        return torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool)


def expected(scope: Scope, k: int, target: TrimTarget, dtype: torch.dtype) -> torch.Tensor:
    if target.keep != "rank":
        return torch.full((scope.total,), target.keep == "all")
    deltas = scope.deltas(k, dtype).numpy()
    limit = np.partition(deltas, target.rank - 1)[target.rank - 1]
    if not target.exact:
        return torch.from_numpy(deltas >= limit)
    kept = deltas > limit
    equal = np.flatnonzero(deltas == limit)
    kept[equal[: scope.total - target.rank + 1 - int(kept.sum())]] = True
    return torch.from_numpy(kept)


def check(scope: Scope, targets: list[TrimTarget], *, wide: bool = False, **options: Any) -> int:
    """Compare the cuts with a sort; return the number of counting passes."""
    cuts, passes = order_statistics(scope.parts, targets, scope.total, wide=wide, **options)
    dtype = torch.float64 if wide else torch.float32
    for k, (target, cut) in enumerate(zip(targets, cuts, strict=True)):
        got = scope.kept(k, cut, dtype)
        assert torch.equal(got, expected(scope, k, target, dtype)), (k, target, cut)
    return passes


def draw(
    sizes: Sequence[int], count: int, dtype: torch.dtype, seed: int, spread: float = 1e-3
) -> Scope:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bases = [(torch.randn(n, generator=generator) * 0.02).to(dtype) for n in sizes]
    models = [
        [
            (base.to(wide) + torch.randn(base.shape, generator=generator) * spread).to(dtype)
            for _ in range(count)
        ]
        for base in bases
    ]
    return Scope(bases, models)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_random_scopes(dtype: torch.dtype, backend: str) -> None:
    """Any number and size of parts, any ranks, generous and absurdly small samples and bins."""
    chance = random.Random(f"{dtype} {backend}")
    for trial in range(6 if backend == "cpu" else 3):
        sizes = [
            chance.choice([0, 1, 5, 31, 32, 100, 3000, 70_000, 90_000])
            for _ in range(chance.choice([1, 1, 3, 7]))
        ]
        scope = draw(sizes, chance.choice([1, 2, 4]), dtype, trial, chance.choice([1e-3, 3e-5]))
        if scope.total == 0:
            continue
        targets = [
            chance.choice([TrimTarget("all"), TrimTarget("none")])
            if chance.random() < 0.2
            else TrimTarget("rank", chance.randint(1, scope.total), chance.random() < 0.6)
            for _ in scope.models[0]
        ]
        check(
            scope,
            targets,
            wide=dtype == torch.float64,
            bins=chance.choice([1 << 8, 1 << 12, 1 << 18]),
            sample=chance.choice([100, 1 << 14, 1 << 20]),
            backend=backend,
        )


SIZE = 100_000


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rank", [1, 2, SIZE // 2, SIZE - 1, SIZE])
def test_first_and_last_ranks(rank: int, exact: bool) -> None:
    cases: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {}),
        (torch.bfloat16, {"bins": 1 << 8, "sample": 100}),
    ]
    for dtype, options in cases:
        scope = draw([40_000, 60_000], 1, dtype, seed=1)
        check(scope, [TrimTarget("rank", rank, exact)], **options)


def test_the_usual_case_takes_one_pass() -> None:
    """The first bracket holds, and its bins are single keys where there are enough of them."""
    scope = draw([700_000, 300_000], 1, torch.float32, seed=2)
    (cut,), passes = order_statistics(
        scope.parts, [TrimTarget("rank", 800_000)], scope.total, bins=1 << 20
    )
    assert passes == 1
    assert scope.walks == 2  # the sample, and one pass
    keys = scope.deltas(0, torch.float32).numpy().view(np.int32)
    assert cut == Cut(int(np.partition(keys, 799_999)[799_999]), Cut.END)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("lie", ["low", "high", "zero", "infinite"])
def test_a_sample_that_misleads_costs_passes_only(lie: str, wide: bool) -> None:
    """The bracket that it gives lies above or below the rank that is wanted."""
    dtype = torch.float64 if wide else torch.float32
    scope = draw([80_000, 20_000], 2, dtype, seed=3)
    value = {"low": 1e-6, "high": 10.0, "zero": 0.0, "infinite": float("inf")}[lie]
    fake = [(torch.zeros(4, 32, dtype=dtype), [torch.full((4, 32), value, dtype=dtype)] * 2)]
    for exact in (False, True):
        targets = [TrimTarget("rank", rank, exact) for rank in (30_000, 90_000)]
        passes = check(scope, targets, wide=wide, samples=fake)
        assert passes >= 2
        assert check(scope, targets, wide=wide, samples=[]) >= 1


@pytest.mark.parametrize("bins", [1 << 18, 16], ids=["one pass", "several"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_guess_that_misses_its_neighbour(backend: str, bins: int) -> None:
    """A few hundred neighbouring magnitudes, each hundreds of times: the sample's guess is most
    often a key or some beside the threshold, and what was counted of it says nothing about that.
    """
    chance = random.Random(f"neighbours {backend} {bins}")
    missed = 0
    for seed in range(20 if backend == "cpu" else 6):
        generator = np.random.default_rng(seed)
        # Of more than a chunk and of less, so that a position has a part, a chunk and an index.
        sizes = chance.sample([70_000, 9, 140_000, 1_000], 4)
        keys = np.float32(chance.choice([1.0, 1e-3, 0.0])).view(np.int32)
        models = []
        for n in sizes:
            steps = generator.integers(0, 400, (2, n), dtype=np.int32)
            signs = generator.choice(np.float32([-1, 1]), (2, n))
            models.append(list(torch.from_numpy((steps + keys).view(np.float32) * signs)))
        scope = Scope([torch.zeros(n) for n in sizes], models)
        ranks = [chance.randint(scope.total // 5, scope.total * 4 // 5) for _ in range(2)]
        targets = [TrimTarget("rank", rank, True) for rank in ranks]
        samples = select.sample_parts(scope.parts, scope.total, 1 << 17)
        wrong = 0
        for k, rank in enumerate(ranks):
            bracket = select.sample_brackets(samples, k, rank, scope.total, False)
            assert bracket is not None
            ordered = np.sort(scope.deltas(k, torch.float32).numpy().view(np.int32))
            wrong += int(bracket[1] != ordered[rank - 1])
        passes = check(scope, targets, backend=backend, bins=bins)
        # Of a key that was not guessed, few bins take a second pass to count single keys, and its
        # position takes one more.
        assert passes == 1 + wrong + (bins < 400 and wrong > 0)
        missed += wrong
    assert missed > (20 if backend == "cpu" else 6)  # of two for each seed


def of_keys(keys: np.ndarray) -> Scope:
    """Return a scope whose magnitudes have these keys."""
    magnitudes = torch.from_numpy(keys.astype(np.int32)).view(torch.float32)
    return Scope([torch.zeros(len(keys))], [[magnitudes]])


@pytest.mark.parametrize("exact", [False, True])
def test_brackets_next_to_the_rank(exact: bool) -> None:
    """A bracket may begin one key above the one that is wanted, or end one below it."""
    first, keys = 0x3F800000, np.random.default_rng(10).permutation(SIZE)
    scope = of_keys(first + keys)
    rank = SIZE // 2  # its key is first + rank - 1
    for low in (-3, -2, -1, 0, 1):
        for high in range(low, 3):
            ends = [first + rank - 1 + end for end in (low, high)]
            sample = (
                torch.tensor(ends, dtype=torch.int32).view(torch.float32).repeat_interleave(2048)
            )
            fake = [(torch.zeros(4096), [sample])]
            passes = check(scope, [TrimTarget("rank", rank, exact)], samples=fake)
            assert (passes == 1) == (low <= 0 <= high), (low, high)


def test_no_key_of_a_bin_takes_more_passes() -> None:
    """Two passes without a sample: over all keys, and over those of a bin, the last included."""
    chance = np.random.default_rng(11)
    scope = of_keys((chance.integers(0x7000, 0x7F00, SIZE) << 15) + 0x7FFF)
    for rank in (1, 40_000, SIZE):
        assert check(scope, [TrimTarget("rank", rank)], samples=[], bins=1 << 17) == 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [0.0, 0.5, 1e-45, 3e38])
def test_all_equal(value: float, backend: str) -> None:
    """One magnitude: all or, exactly, the first ones, over the borders of parts and chunks."""
    sizes = [0, 65_536, 1, 70_000, 0, 10]
    scope = Scope(
        [torch.zeros(n) for n in sizes],
        [[torch.full((n,), value), torch.full((n,), -value)] for n in sizes],
    )
    for wanted in (1, 65_537, scope.total - 5):
        rank = scope.total - wanted + 1
        targets = [TrimTarget("rank", rank, True), TrimTarget("rank", rank, False)]
        check(scope, targets, backend=backend)
    for wanted in (65_536, 65_538, scope.total):
        targets = [TrimTarget("rank", scope.total - wanted + 1, True)] * 2
        check(scope, targets, backend=backend, sample=64, bins=1 << 8)


@pytest.mark.parametrize("sample", [100, 1 << 20])
def test_atoms(sample: int) -> None:
    """A few magnitudes that each occur thousands of times, in parts that differ."""
    generator = torch.Generator().manual_seed(4)
    sizes = [30_000, 1_000, 90_000, 65_536]
    atoms = torch.tensor([0.0, 0.25, 0.5, -0.5, 1.0, 2.0])
    models = [
        [atoms[torch.randint(0, 3 + part, (n,), generator=generator).clamp(max=5)]]
        for part, n in enumerate(sizes)
    ]
    scope = Scope([torch.zeros(n) for n in sizes], models)
    chance = random.Random(4)
    for _ in range(6):
        rank = chance.randint(1, scope.total)
        check(scope, [TrimTarget("rank", rank, True)], sample=sample)
        check(scope, [TrimTarget("rank", rank, False)], sample=sample, bins=1 << 8)


def test_small_scopes_are_sorted() -> None:
    """Below 65536 elements: one walk, no sample."""
    for sizes in ([1], [7, 0, 5], [65_536], [1] * 50):
        scope = draw(sizes, 2, torch.float32, seed=5)
        for rank in {1, scope.total // 2 + 1, scope.total}:
            scope.walks = 0
            assert check(scope, [TrimTarget("rank", rank, exact) for exact in (True, False)]) == 1
            assert scope.walks == 1


def test_part_numbers_are_the_flat_order() -> None:
    scope = draw([50_000, 40_000], 1, torch.bfloat16, seed=6)
    numbered = Scope(scope.bases, scope.models, numbers=[3, 8])
    check(numbered, [TrimTarget("rank", 45_000, True)])


def test_nothing_wanted_counts_nothing() -> None:
    scope = draw([100_000], 2, torch.float32, seed=7)
    cuts, passes = order_statistics(
        scope.parts, [TrimTarget("all"), TrimTarget("none")], scope.total
    )
    assert (passes, scope.walks) == (0, 0)
    assert [cut.key for cut in cuts] == [select.KEEP_ALL, select.KEEP_NONE]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_counters_never_overflow(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of 32 bits are added up before they could overflow: with a limit of two chunks."""
    monkeypatch.setattr(select, "_COUNTED_AT_ONCE", 2 * HOT_CHUNK)
    scope = draw([300_000, 1000, 140_000], 2, torch.bfloat16, seed=8)
    for exact in (False, True):
        targets = [TrimTarget("rank", rank, exact) for rank in (100_000, 400_000)]
        check(scope, targets, backend=backend)
    equal = Scope([torch.zeros(300_000)] * 2, [[torch.ones(300_000)]] * 2)
    check(equal, [TrimTarget("rank", 150_000, True)], backend=backend)
    assert select._COUNTED_AT_ONCE % HOT_CHUNK == 0


def test_a_workspace_is_used_again() -> None:
    workspace = select.Workspace()
    first = workspace.zeros(2, 100)
    first.fill(7)
    assert not workspace.zeros(3, 10).any()
    assert workspace.zeros(5).ctypes.data == first.ctypes.data
    for seed in range(3):
        check(
            draw([70_000 + seed], 2, torch.float32, seed=seed),
            [TrimTarget("rank", 60_000)] * 2,
            workspace=workspace,
        )


def test_stretches_of_a_cut() -> None:
    """Before its part the key itself is kept, after it only what is larger."""
    cut = Cut(5, part=2, index=3)
    assert cut.thresholds(1, 10) == [(10, 5)]
    assert cut.thresholds(2, 10) == [(3, 5), (10, 6)]
    assert cut.thresholds(2, 3) == [(3, 5)]
    assert cut.thresholds(3, 10) == [(10, 6)]
    assert Cut(5, part=-1).thresholds(0, 4) == [(4, 6)]
    assert Cut(5, part=2, index=0).thresholds(2, 4) == [(4, 6)]
    assert Cut(5, Cut.END).thresholds(9, 4) == [(4, 5)]
    assert Cut(select.KEEP_NONE, -1).thresholds(0, 4) == [(4, select.KEEP_NONE)]


def test_samples_are_spread_over_all_parts() -> None:
    scope = draw([1_000_000, 5, 300_000], 1, torch.float32, seed=9)
    samples = select.sample_parts(scope.parts, scope.total, 1 << 20)
    counts = [base.numel() for base, _ in samples]
    assert len(counts) == 2  # the tiny part is shorter than a line
    assert 2.5 < counts[0] / counts[1] < 4.5
    assert 4096 <= sum(counts) <= 1 << 17
    seen = np.sort(samples[0][0].numpy())
    assert np.isin(seen, scope.bases[0].numpy()).all()
