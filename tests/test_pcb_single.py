"""In bf16, the change from one model alone is computed without its score wherever the score cannot
change the rounded result: the merge equals the reference bit for bit, also near where it can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.case_pcb import pcb_statistics
from tests.test_pcb_filter import VARIANTS, check, normal

Backends = Callable[[str], str]
COUNTS = [2, 3, 4]


def with_factors(reals: list[float], weights: list[float], scale: float) -> list[float]:
    return [*reals[: -len(weights) - 1], *weights, scale]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_next_to_the_middle_between_two_numbers(
    variant: str, count: int, use_backend: Backends
) -> None:
    """Half a task vector of an odd number of steps ends in the middle, which a score may miss."""
    inputs = normal(count, seed=20 + count)
    reals = pcb_statistics(VARIANTS[variant], *inputs, 0.1)
    for factor in (0.5, 0.25, -0.5, 1.5, 0.5 + 2**-24, 0.5 - 2**-25):
        for weights, scale in (([factor] * count, 1.0), ([1.0] * count, factor)):
            changed = with_factors(reals, weights, scale)
            check(inputs, VARIANTS[variant], changed, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_thresholds_next_to_scores(variant: str, use_backend: Backends) -> None:
    """A bound that is too high by little would give a share to an element below its threshold."""
    code, count = VARIANTS[variant], 3
    base, models = normal(count, numel=2048 + 100, seed=9)
    reals = pcb_statistics(code, base, models, 0.1)
    place = 3 * 6 + 3 if code == 0 else 3 * count  # of q
    scores = torch.empty(count, base.numel() + 64 - base.numel() % 64)
    torch.ops.pymerge.pcb_scores_(
        scores,
        torch.zeros(3, dtype=torch.int64),
        base,
        models,
        code,
        [*reals[:-1], 1.0],
        backend="reference",
    )
    ordered = [row[: base.numel()].sort().values for row in scores]
    for index in range(-400, -10, 13):
        q = torch.stack([row[index] for row in ordered])
        for moved in (q, torch.nextafter(q, torch.tensor(torch.inf)), q * 1.0005, q * 0.9995):
            reals[place : place + count] = moved.tolist()
            check((base, models), code, reals, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_that_cancel(variant: str, use_backend: Backends) -> None:
    """What is left of base + t is small beside t, or all there is, or nearly 0."""
    count = 2
    base, models = normal(count, numel=12000, seed=30)
    taus = [model.float() - base.float() for model in models]
    for size in (1.0, 2.0**-40, 2.0**-75, 2.0**-120):
        for part in (-0.8, -0.3, 0.0) if size == 1 else (-0.8, 0.0):
            # The base is minus what the first task vector adds, but for its own rounding.
            shifted = (size * part * taus[0]).to(torch.bfloat16)
            tuned = [(shifted.float() + size * tau).to(torch.bfloat16) for tau in taus]
            reals = pcb_statistics(VARIANTS[variant], shifted, tuned, 0.1)
            changed = with_factors(reals, [1.0] * count, -part or 1.0)
            check((shifted, tuned), VARIANTS[variant], changed, use_backend)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_who_has_a_share(variant: str, count: int, use_backend: Backends) -> None:
    """One model in one block and another in the next; all at once; the last only; none."""
    base, models = normal(count, numel=3 * 2048 + 45, seed=40 + count)
    reals = pcb_statistics(VARIANTS[variant], base, models, 0.1)
    place = count * (count + 1) // 2 * 3 + count if variant == "paper" else 3 * count
    only = [model.clone() for model in models]
    for k in range(count):
        for start in range(0, base.numel(), 2048):
            if start // 2048 % count != k:
                only[k][start : start + 2048] = base[start : start + 2048]
    last = [base] * (count - 1) + [models[-1]]
    for tuned in (only, last, [models[0]] * count):
        check((base, tuned), VARIANTS[variant], reals, use_backend)
    for factors in ([1.0] * (count - 1) + [1e3], [1e3] * (count - 1) + [1.0], [1e3] * count):
        high = [q * factor for q, factor in zip(reals[place:], factors, strict=False)]
        changed = [*reals[:place], *high, *reals[place + count :]]
        check((base, models), VARIANTS[variant], changed, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_scales(variant: str, use_backend: Backends) -> None:
    """Also those that a share times a weight times a task vector could overflow or vanish with."""
    count = 3
    inputs = normal(count, seed=50)
    reals = pcb_statistics(VARIANTS[variant], *inputs, 0.1)
    for weights, scale in (
        ([0.0, 1.0, -1.0], 1.0),
        ([0.0] * 3, 1.0),
        ([-0.0, 1e-30, 3.0], -1.0),
        ([1.0, 2e6, 1e14], 1.0),
        ([1.0, 0.5, 2.0], 0.0),
        ([1.0, 0.5, 2.0], -0.0),
        ([1.0, 0.5, 2.0], 1e-38),
        ([1.0, 0.5, 2.0], 2e6),
        ([1e6, -1e6, 1e6], 1e6),
    ):
        changed = with_factors(reals, weights, scale)
        check(inputs, VARIANTS[variant], changed, use_backend)


@pytest.mark.parametrize("variant", VARIANTS)
def test_task_vectors_of_other_shapes(variant: str, use_backend: Backends) -> None:
    """Bounds are good for some and poor for others, and hold for all."""
    count, numel = 3, 2048 + 500
    generator = torch.Generator().manual_seed(60)
    draws = torch.randn(count, numel, generator=generator)
    heavy = draws / torch.rand(count, numel, generator=generator).clamp(min=1e-3)
    alike = draws + 2 * torch.randn(numel, generator=generator)
    sparse = draws * (torch.rand(count, numel, generator=generator) < 0.2)
    scaled = draws * torch.tensor([1e-2, 1.0, 1e2])[:, None]
    constant = torch.stack([draws[0].sign(), *draws[1:]])
    positive = draws.abs() + 1  # the clipping range begins above 0
    base = torch.randn(numel, generator=generator) * 0.02
    for shape in (heavy, alike, sparse, scaled, constant, positive):
        for size in (1e-3, 0.3, 3.0):  # products of large ones have a tanh of nearly 1
            origin = base.to(torch.bfloat16)
            models = [(origin.float() + size * row).to(torch.bfloat16) for row in shape]
            reals = pcb_statistics(VARIANTS[variant], origin, models, 0.1)
            check((origin, models), VARIANTS[variant], reals, use_backend)
