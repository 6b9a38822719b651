"""SCE's CPU kernel decides by a bound which elements vary enough, and by the variance itself where
the bound is too near: the merge is the reference's, bit for bit, wherever the threshold lies."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
from tests.conftest import NATIVE, check_same

NUMEL = 3 * 4096 + 77  # pieces that the kernel checks at once, and a tail
WEIGHTS = [0.2, 0.3, 0.15, 0.35]
Inputs = tuple[torch.Tensor, list[torch.Tensor]]


def run(method: str, inputs: Inputs, reals: list[float], backend: str) -> torch.Tensor:
    base, models = inputs
    out = torch.full_like(base, math.nan)
    stats = torch.zeros(3, dtype=torch.int64)
    torch.ops.pymerge.pointwise_(out, stats, base, models, method, reals, backend=backend)
    # How often NaN and infinity were seen is counted by pieces, which backends choose.
    return torch.cat([out.double(), (stats > 0).double()])


def check(inputs: Inputs, reals: list[float], use_backend: Callable[[str], str]) -> torch.Tensor:
    expected = run("sce", inputs, reals, "reference")
    for identifier in NATIVE:
        check_same(run("sce", inputs, reals, use_backend(identifier)), expected, identifier)
    return expected


def inputs_of(
    count: int, dtype: torch.dtype = torch.float32, size: float = 1e-3, offset: float = 0.0
) -> Inputs:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(NUMEL, generator=generator) * 0.02
    base[::50] = -0.0
    deltas = torch.randn(count, NUMEL, generator=generator) * size + offset
    deltas[:, 7::50] = 0
    deltas[:, 8::50] = deltas[:1, 8::50]  # models that agree: no variance
    base = base.to(dtype)
    return base, [(base.float() + delta).to(dtype) for delta in deltas]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_thresholds_at_variances(
    dtype: torch.dtype, count: int, use_backend: Callable[[str], str]
) -> None:
    """An element's variance is the threshold, and is next to it on either side."""
    inputs = inputs_of(count, dtype)
    wide = inputs[0].float(), [model.float() for model in inputs[1]]
    variances = run("variance", wide, [], "reference")[:NUMEL].float()
    for place in (0, 4097, NUMEL - 1):
        exact = variances[place]
        for threshold in (
            exact,
            torch.nextafter(exact, torch.tensor(math.inf)),
            torch.nextafter(exact, torch.tensor(0.0)),
        ):
            check(inputs, [1.0, float(threshold), *([0.3] * count)], use_backend)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_all_elements_next_to_the_threshold(
    offset: float, use_backend: Callable[[str], str]
) -> None:
    """Task vectors that share most of their length: their squares cancel."""
    inputs = inputs_of(4, size=1e-3, offset=offset)
    kept = []
    for threshold in (1e-8, 4e-7, 6e-7, 1e-4):
        merged = check(inputs, [1.0, threshold, *WEIGHTS], use_backend)
        kept.append(float((merged[:NUMEL].float() != inputs[0] + 0.0).float().mean()))
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("weights", [WEIGHTS, [0.0, -0.3, 1e-38, 0.5], [math.inf, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("threshold", [0.0, -1.0, 1e-40, 2e-7, 1e32, math.inf, math.nan])
def test_numbers_at_the_edges(
    threshold: float, weights: list[float], use_backend: Callable[[str], str]
) -> None:
    check(inputs_of(4), [1.0, threshold, *weights], use_backend)


@pytest.mark.parametrize("where", [0, 4096, NUMEL - 1])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e20, 1e-20, 1e-42]
)
def test_elements_that_are_not_ordinary(
    value: float, where: int, use_backend: Callable[[str], str]
) -> None:
    for model in (-1, 0, 3):
        base, models = inputs_of(4)
        (base if model < 0 else models[model])[where] = value
        found = check((base, models), [1.0, 5e-7, *WEIGHTS], use_backend)
        assert bool(found[-3:].any()) == (not math.isfinite(value))
