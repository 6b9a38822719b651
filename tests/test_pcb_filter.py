"""PCB's CPU kernels score only elements that may have a share: whatever is left out, and however
many, the merge is the reference's, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
from tests.case_pcb import pcb_statistics
from tests.conftest import NATIVE, check_same

NUMEL = 2048 + 77  # a block of the kernel and a tail
VARIANTS = {"paper": 0, "root": 1, "vision": 2, "vision_es": 3}
Inputs = tuple[torch.Tensor, list[torch.Tensor]]


def merge(inputs: Inputs, variant: int, reals: list[float], backend: str) -> torch.Tensor:
    base, models = inputs
    out = torch.full_like(base, math.nan)
    stats = torch.zeros(3, dtype=torch.int64)
    torch.ops.pymerge.pcb_merge_(out, stats, base, models, variant, reals, backend=backend)
    # How often NaN and infinity were seen is counted by pieces, which backends choose.
    return torch.cat([out.double(), (stats > 0).double()])


def check(
    inputs: Inputs,
    variant: int,
    reals: list[float],
    use_backend: Callable[[str], str],
    identifiers: list[str] = NATIVE,
) -> None:
    expected = merge(inputs, variant, reals, "reference")
    for identifier in identifiers:
        check_same(merge(inputs, variant, reals, use_backend(identifier)), expected, identifier)


def normal(
    count: int, numel: int = NUMEL, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(numel, generator=generator) * 0.02
    base[::50] = -0.0
    deltas = torch.randn(count, numel, generator=generator) * 1e-3
    deltas[:, 7::50] = 0
    deltas *= 1 + torch.arange(count)[:, None]  # models of different sizes
    base = base.to(dtype)
    return base, [(base.float() + delta).to(dtype) for delta in deltas]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shares_of_few_or_all(variant: str, count: int, use_backend: Callable[[str], str]) -> None:
    """Thresholds are scores: one element of each model lies exactly at it."""
    # Of many models no element is filtered out.
    many = count > 16
    for dtype in (torch.float32,) if many else (torch.bfloat16, torch.float32):
        inputs = normal(count, dtype=dtype, seed=count)
        for ratio in (0.1,) if many else (0.0, 0.01, 0.1, 0.5, 1.0):
            reals = pcb_statistics(VARIANTS[variant], *inputs, ratio)
            check(inputs, VARIANTS[variant], reals, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_thresholds_next_to_scores(variant: str, use_backend: Callable[[str], str]) -> None:
    """A bound that is too low by little would lose the elements at a threshold."""
    code, count = VARIANTS[variant], 3
    inputs = normal(count, dtype=torch.float32, seed=9)
    reals = pcb_statistics(code, *inputs, 0.1)
    place = 3 * 6 + 3 if code == 0 else 3 * count  # of q
    scores = torch.empty(count, NUMEL + 64 - NUMEL % 64)
    torch.ops.pymerge.pcb_scores_(
        scores,
        torch.zeros(3, dtype=torch.int64),
        *inputs,
        code,
        [*reals[:-1], 1.0],
        backend="reference",
    )
    for share in (0.5, 0.7, 0.85, 0.93, 0.97, 0.99, 0.999):
        q = [float(row[:NUMEL].sort().values[int(share * NUMEL)]) for row in scores]
        for step in (0.0, math.inf, -math.inf):
            moved = torch.nextafter(torch.tensor(q), torch.tensor(step)).tolist() if step else q
            reals[place : place + count] = moved
            check(inputs, code, reals, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_task_vectors_that_are_not_random(variant: str, use_backend: Callable[[str], str]) -> None:
    base, (first, second) = normal(2, dtype=torch.float32, seed=3)
    outlier = first.clone()
    outlier[::100] += 5.0
    for models in (
        [base, base],  # no task vector
        [first, base],
        [first, first],  # the same
        [first, 2 * base - first],  # opposite ones: scores below 0
        [base + 0.5, second],  # a constant one
        [base + 0.5, base - 0.5],
        [outlier, second],  # far beyond the clipping range
        [base + 1e-6 * (first - base), second],  # one much smaller than the other
        [base + 1e-20 * first, 1e18 * second],
    ):
        for ratio in (0.05, 0.5):
            reals = pcb_statistics(VARIANTS[variant], base, models, ratio)
            check((base, models), VARIANTS[variant], reals, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_infinity(variant: str, use_backend: Callable[[str], str]) -> None:
    """Non-finite elements are never filtered out, and are reported."""
    for dtype in (torch.bfloat16, torch.float32):
        base, models = normal(4, dtype=dtype, seed=4)
        reals = pcb_statistics(VARIANTS[variant], base, models, 0.1)
        special = [math.nan, -math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e-45]
        for index, value in enumerate(special):
            tuned = [model.clone() for model in models]
            tuned[index % 4][5 + index] = value
            check((base, tuned), VARIANTS[variant], reals, use_backend)
            tuned[(index + 1) % 4][5 + index] = -value
            check((base, tuned), VARIANTS[variant], reals, use_backend)
            shifted = base.clone()
            shifted[1500 + index] = value
            check((shifted, tuned), VARIANTS[variant], reals, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_that_no_bound_holds_for(variant: str, use_backend: Callable[[str], str]) -> None:
    """Any number of a call may be anything: at each place once."""
    count = 2
    inputs = normal(count, numel=1024 + 33, dtype=torch.float32, seed=5)
    reals = pcb_statistics(VARIANTS[variant], *inputs, 0.1)
    numbers = (0.0, -0.0, -1.0, 1e-40, 1e-20, 1.0, 1e20, 3e38, math.inf, math.nan)
    # But the clipping range is one: 0 <= lo <= hi, and what is normalised with it is finite.
    ranges = ((0.0, 1e-40, 1e-20), (1.0, 1e4, 1e20), (0.0, 1e-40, 1e-20, 1.0, 1e4, 1e8))
    for place in range(len(reals)):
        clipping = VARIANTS[variant] > 0 and place < 3 * count
        for value in ranges[place // count] if clipping else numbers:
            changed = [*reals[:place], value, *reals[place + 1 :]]
            check(inputs, VARIANTS[variant], changed, use_backend, NATIVE[-1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_and_dtypes(variant: str, use_backend: Callable[[str], str]) -> None:
    base, models = normal(3, dtype=torch.float32, seed=6)
    reals = pcb_statistics(VARIANTS[variant], base, models, 0.1)
    for numel in (1, 15, 16, 17, 31, 33, 63, 511, 512, 513, 1024, 1056, 2047, 2048, 2049, 2079):
        for dtypes in (
            (torch.bfloat16,),
            (torch.float16,),
            (torch.float32,),
            (torch.float32, torch.bfloat16, torch.float64, torch.float16),
        ):
            parts = [
                tensor[:numel].to(dtypes[i % len(dtypes)])
                for i, tensor in enumerate((base, *models))
            ]
            check((parts[0], parts[1:]), VARIANTS[variant], reals, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_all_elements_between_others(
    variant: str, use_backend: Callable[[str], str]
) -> None:
    """Where most of a block is kept, the kernel stops leaving out for a while, and begins again."""
    base, models = normal(4, numel=40 * 2048 + 100, seed=7)
    reals = pcb_statistics(VARIANTS[variant], base, models, 0.1)
    tuned = [model.clone() for model in models]
    for start in (3 * 2048, 30 * 2048):
        for k in range(4):
            delta = models[k][start : start + 3000].float() - base[start : start + 3000].float()
            tuned[k][start : start + 3000] = base[start : start + 3000] + 3 * delta.abs()
    check((base, tuned), VARIANTS[variant], reals, use_backend)
