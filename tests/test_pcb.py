"""PCB-Merging: the authors' numbers, the paper's formula in float64, the edges, exp and tanh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pymerge
from pymerge.ops.reference.pcb import exp32, tanh32
from tests.case_pcb import pcb_statistics
from tests.conftest import BACKEND_IDS

ROWS = torch.tensor(
    [
        [0.9, -0.1, 0.4, 0.0, 0.3, -0.7, 0.2, 0.05, -0.6, 0.25],
        [-0.2, -0.5, 0.4, 0.15, -0.3, 0.1, 0.8, -0.05, 0.6, 0.35],
        [0.3, 0.2, -0.8, -0.15, 0.0, -0.2, -0.1, 0.55, 0.45, -0.6],
    ]
)


def merged(rows: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return pymerge.pcb_merge(torch.zeros(rows.shape[1]), list(rows), **parameters)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("root", [0.7, 0, 0, 0, 0, -0.7, 0.6, 0.55, 0.554471, 0]),
        ("nlp", [0.7, 0, 0, 0, 0, -0.7, 0.6, 0.55, 0.554471, 0]),
        ("vision_es", [0.7, 0, 0, 0, 0, -0.7, 0.6, 0.55, 0.564449, 0]),
    ],
)
def test_what_the_authors_codes_give(
    variant: str, expected: list[float], identifier: str, use_backend: Callable[[str], str]
) -> None:
    found = merged(ROWS, ratio=0.3, variant=variant, backend=use_backend(identifier))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-6)


def official(rows: torch.Tensor, variant: str, ratio: float) -> torch.Tensor:
    """The authors' formulas in float64, written from their description in docs/methods.md."""
    tau, count = rows.double(), len(rows)
    clip = 1e-4 if variant == "root" else 0.01

    def normalize(x: torch.Tensor) -> torch.Tensor:
        low, high = x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values
        return (x - low) / (high - low)

    def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ordered, d = x.sort(dim=1).values, x.shape[1]
        bottom, top = ordered[:, int(d * low)], ordered[:, int(d * (1 - high) - 1)]
        return torch.minimum(torch.maximum(x, bottom[:, None]), top[:, None])

    size = clamp(tau.abs(), clip, clip)
    n = normalize(size)
    signed = tau.sign() * n
    if variant in ("root", "nlp"):
        inter = torch.tanh(tau * tau.sum(dim=0))
    elif variant == "vision":
        inter = torch.tanh(tau * signed.sum(dim=0))
    else:
        inter = sum(torch.tanh(signed * other) for other in signed)
    scores = torch.exp(count * n**2) * inter
    share = normalize(clamp(scores, 1 - ratio, 0))
    factor = 1.2 if variant == "vision" else 1.0
    return (factor * tau.sign() * size * share).sum(dim=0) / share.sum(dim=0).clamp(min=1e-12)


def paper(rows: torch.Tensor, ratio: float) -> torch.Tensor:
    tau, count = rows.double(), len(rows)

    def softmax(x: torch.Tensor, times: float) -> torch.Tensor:
        return torch.softmax(times * (x - x.min()) / (x.max() - x.min()), dim=0)

    beta = torch.stack(
        [softmax(own * own, count) * sum(softmax(own * other, 1.0) for other in tau) for own in tau]
    )
    index = int(tau.shape[1] * (1 - ratio))
    kept = beta * (beta >= beta.sort(dim=1).values[:, index : index + 1])
    return (kept * tau).sum(dim=0) / kept.sum(dim=0).clamp(min=1e-300)


@pytest.mark.parametrize("identifier", ["reference", BACKEND_IDS[-1]])
@pytest.mark.parametrize("variant", ["paper", "root", "vision", "vision_es", "nlp"])
@pytest.mark.parametrize("numel", [1000, 130_001])
def test_formulas_in_float64(
    numel: int, variant: str, identifier: str, use_backend: Callable[[str], str]
) -> None:
    """But for elements whose score is so near a threshold that float32 puts it beyond it."""
    generator = torch.Generator().manual_seed(numel)
    rows = torch.randn(3, numel, generator=generator) * 1e-2
    backend = use_backend(identifier)
    found = merged(rows, variant=variant, ratio=0.1, backend=backend).double()
    expected = paper(rows, 0.1) if variant == "paper" else official(rows, variant, 0.1)
    wrong = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert int(wrong.sum()) <= max(2, numel // 10_000)


@pytest.mark.parametrize("variant", ["paper", "root", "vision", "vision_es", "nlp"])
def test_scopes_tiles_and_backends_give_the_same_bits(variant: str) -> None:
    generator = torch.Generator().manual_seed(5)
    base = {"a": torch.zeros(70_000), "b": torch.zeros(33, 44), "c": torch.zeros(0, 3)}
    models = [
        {name: torch.randn(t.shape, generator=generator) * 1e-2 for name, t in base.items()}
        for _ in range(2)
    ]
    for scope in ("global", "tensor"):
        first = pymerge.pcb_merge(base, models, variant=variant, scope=scope, backend="reference")
        again = pymerge.pcb_merge(base, models, variant=variant, scope=scope, backend="cpu")
        assert all(torch.equal(first[name], again[name]) for name in base)


@pytest.mark.parametrize("variant", ["paper", "root", "vision", "vision_es", "nlp"])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 192, 64), (70_000, 50)], ids=str)
def test_a_scope_may_have_any_number_of_tensors(variant: str, sizes: tuple[int, ...]) -> None:
    """Its statistics are those of all elements, wherever the largest are."""
    rows = torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(6)) * 1e-2
    rows[:, : sizes[0]] *= 2.0
    whole = merged(rows, variant=variant, ratio=0.4)
    parts = [list(row.split(sizes)) for row in rows]
    apart = pymerge.pcb_merge([torch.zeros(n) for n in sizes], parts, variant=variant, ratio=0.4)
    assert torch.equal(torch.cat(apart), whole)


@pytest.mark.parametrize("variant", ["root", "vision", "vision_es", "nlp"])
def test_thresholds_among_negative_scores(variant: str) -> None:
    """With a large share kept, the threshold of a score is below 0."""
    rows = torch.randn(3, 1001, generator=torch.Generator().manual_seed(7)) * 1e-2
    found = merged(rows, variant=variant, ratio=0.9).double()
    expected = official(rows, variant, 0.9)
    wrong = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert int(wrong.sum()) <= 2


@pytest.mark.parametrize("variant", ["paper", "root", "vision", "vision_es", "nlp"])
def test_edges_are_finite(variant: str) -> None:
    numel = 200
    same = torch.linspace(-1, 1, numel)
    constant = torch.full((numel,), 0.5)
    for rows in (
        torch.stack([same, same]),
        torch.stack([same]),
        torch.stack([constant, same]),
        torch.stack([constant, -constant]),
        torch.zeros(2, numel),
        torch.stack([same, torch.zeros(numel)]),
    ):
        for ratio in (0.0, 0.05, 0.5, 1.0):
            found = merged(rows, variant=variant, ratio=ratio)
            assert bool(found.isfinite().all()), (rows[:, 0], ratio)
            assert float(found.abs().max()) <= 1.2 * float(rows.abs().max()) + 1e-6
    assert torch.equal(merged(torch.zeros(3, 7), variant=variant), torch.zeros(7))


def test_coefficients_and_scale() -> None:
    once = merged(ROWS, ratio=0.3, variant="root")
    torch.testing.assert_close(merged(ROWS, ratio=0.3, variant="root", scale=2.0), 2 * once)
    doubled = merged(ROWS, ratio=0.3, variant="root", coefficients=[2.0, 2.0, 2.0])
    torch.testing.assert_close(doubled, 2 * once)


def test_nan_is_an_error() -> None:
    rows = ROWS.clone()
    rows[1, 3] = math.nan
    with pytest.raises(pymerge.NonFiniteError, match=r"models\[1\].*flat index 3"):
        merged(rows, variant="paper")


def ulps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest distance in units in the last place of float32."""
    unit = torch.nextafter(exact.float().abs(), torch.tensor(math.inf)) - exact.float().abs()
    return float(((found.double() - exact).abs() / unit.double()).max())


def test_exp_and_tanh_are_within_2_ulp() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(300_000, generator=generator) * s for s in (1, 10, 80)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 86.9, -86.9])])
    assert ulps(exp32(x), torch.exp(x.double())) <= 2
    x = torch.cat([x / 8, x * 1e-3, x * 1e-8])
    assert ulps(tanh32(x), torch.tanh(x.double())) <= 2
    assert torch.equal(tanh32(torch.tensor([30.0, -30.0, 0.0])), torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_sums_of_exp_do_not_depend_on_the_order(
    identifier: str, use_backend: Callable[[str], str]
) -> None:
    # exp of what lies in [0, 4] is a multiple of 2^-23, and doubles add up 1024 of these exactly
    backend = use_backend(identifier)
    generator = torch.Generator().manual_seed(5)
    chunk, count = 1024, 4
    base = torch.randn(8 * chunk, generator=generator)
    models = [base + 1e-3 * torch.randn(base.numel(), generator=generator) for _ in range(count)]
    pairs = count * (count + 1) // 2
    statistics = pcb_statistics(0, base, models, 0.1)[: 2 * pairs]

    def sums(of: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(pairs + count, 8, dtype=torch.float64)
        torch.ops.pymerge.chunk_sums_(
            found, base[of], [model[of] for model in models], "pcb_exp", reals=statistics,
            backend=backend,
        )  # fmt: skip
        return found

    order = torch.arange(base.numel())
    mixed = torch.cat(
        [part[torch.randperm(chunk, generator=generator)] for part in order.split(chunk)]
    )
    expected = sums(order)
    assert (expected >= chunk).all()
    assert torch.equal(sums(mixed), expected)
