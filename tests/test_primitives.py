"""The public operations under the methods, against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pymerge
from pymerge import primitives
from tests.conftest import BACKEND_IDS


def draw(
    *shape: int, count: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator).to(dtype)
    noise = [0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    return base, [(base + one).to(dtype) for one in noise]


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_thresholds_trim_and_merge_make_ties(
    identifier: str, dtype: torch.dtype, use_backend: Callable[[str], str]
) -> None:
    backend = use_backend(identifier)
    base, tuned = draw(50, 70, dtype=dtype)
    keys = primitives.magnitude_thresholds(base, tuned, 0.3, backend=backend)
    trimmed = primitives.trim(base, tuned, keys, backend=backend)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for model, own in zip(tuned, trimmed, strict=True):
        delta = model.to(compute) - base.to(compute)
        assert torch.equal(primitives.task_vector(base, model, backend=backend), delta)
        least = delta.abs().flatten().sort(descending=True).values[int(0.3 * delta.numel()) - 1]
        assert torch.equal(own, torch.where(delta.abs() >= least, delta, torch.zeros_like(delta)))
    signs = primitives.elect_signs(base, tuned, keys, backend=backend)
    assert torch.equal(signs, torch.sign(trimmed[0] + trimmed[1] + trimmed[2]))
    merged = primitives.disjoint_merge(base, tuned, keys, backend=backend)
    whole = pymerge.ties_merge(
        base, tuned, density=0.3, semantics="peft", exact_k=False, backend=backend
    )
    assert torch.equal(merged, whole)


def test_thresholds_over_several_tensors() -> None:
    first, second = draw(300), draw(4, 90)
    base = [first[0], second[0]]
    models = [[a, b] for a, b in zip(first[1], second[1], strict=True)]
    keys = primitives.magnitude_thresholds(base, models, [0.0, 0.5, 1.0])
    every = torch.cat([(m - b).abs().flatten() for m, b in zip(models[1], base, strict=True)])
    middle = every.sort(descending=True).values[int(0.5 * 660) - 1]
    assert keys[1] == int(middle.view(torch.int32))
    assert keys[0] > 0x7F800000  # nothing is kept


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_weighted_sum_and_its_adjoint(identifier: str, use_backend: Callable[[str], str]) -> None:
    """<g, A c> - <g, base> = <A* g, c>, and both are what plain torch computes."""
    backend = use_backend(identifier)
    layers = [draw(9, 31), draw(2000), draw(3, 5, 7)]
    base = [origin for origin, _ in layers]
    models = [[tuned[k] for _, tuned in layers] for k in range(3)]
    coefficients = torch.tensor([[0.3, -0.1, 1.0], [0.2, 0.0, 0.5], [0.4, 2.0, 0.1]])
    merged = primitives.weighted_sum(base, models, coefficients, backend=backend)
    gradients = [torch.randn_like(origin) for origin in base]
    dots = primitives.dots(gradients, base, models, backend=backend)
    assert dots.shape == (3, 3)
    for layer, origin in enumerate(base):
        expected = origin.double()
        for k, model in enumerate(models):
            delta = model[layer] - origin
            expected = expected + float(coefficients[k, layer]) * delta.double()
            exact = (gradients[layer].double() * delta.double()).sum()
            torch.testing.assert_close(dots[k, layer], exact)
        torch.testing.assert_close(merged[layer].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("rows", [False, True])
def test_statistics(identifier: str, rows: bool, use_backend: Callable[[str], str]) -> None:
    backend = use_backend(identifier)
    base, tuned = draw(7, 2500)
    found = primitives.statistics(tuned, base, rows=rows, backend=backend)
    for k, model in enumerate(tuned):
        delta = (model - base).double()
        delta = delta if rows else delta.reshape(1, -1)
        shape = found.l1[k].shape
        torch.testing.assert_close(found.least[k], delta.amin(-1).reshape(shape), rtol=0, atol=0)
        torch.testing.assert_close(found.largest[k], delta.amax(-1).reshape(shape), rtol=0, atol=0)
        torch.testing.assert_close(found.l1[k], delta.abs().sum(-1).reshape(shape))
        torch.testing.assert_close(found.l2[k], delta.norm(dim=-1).reshape(shape))
    stacked = torch.stack([(model - base).double().flatten() for model in tuned])
    grams = primitives.gram(tuned, base, backend=backend)
    torch.testing.assert_close(grams, stacked @ stacked.T)


def test_row_ranks_and_masks() -> None:
    base, tuned = draw(5, 40, count=2)
    ranks = primitives.row_ranks(base, tuned)
    for k, model in enumerate(tuned):
        order = (model - base).abs().argsort(dim=1)
        assert torch.equal(ranks[k].gather(1, order), torch.arange(40).int().expand(5, 40))
    mask = primitives.random_mask((300, 400), 0.25, seed=5, name="w", model=1)
    merged = pymerge.dare_linear(
        {"w": torch.zeros(300, 400)},
        [{"w": torch.zeros(300, 400)}, {"w": torch.ones(300, 400)}],
        density=0.25,
        seed=5,
    )
    assert torch.equal(mask, merged["w"] != 0)
    assert not primitives.random_mask((3,), 0.0).any()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda b, m: primitives.trim(b, m, [0]), "thresholds: expected 3, one per model; got 1"),
        (lambda b, m: primitives.trim(b, [b[:2]], [0]), r"models\[0\]: expected shape \(5, 40\)"),
        (lambda b, m: primitives.gram([]), "models"),
        (lambda b, m: primitives.magnitude_thresholds(b, m, 1.5), r"density: .*\[0, 1\]"),
        (lambda b, m: primitives.disjoint_merge(b, m, merge="median"), "one of mean, sum, max"),
        (lambda b, m: primitives.weighted_sum([b], [[m[0]]], [[1.0, 2.0]]), "coefficients"),
        (lambda b, m: primitives.task_vector(b.int(), m[0]), "floating-point"),
        (lambda b, m: primitives.dots([b[:2]], [b], [[m[0]]]), r"gradients\[0\]: expected shape"),
        (lambda b, m: primitives.dots([b.int()], [b], [[m[0]]]), r"gradients\[0\]: .*floating"),
        (lambda b, m: primitives.statistics([b[:, :0]], rows=True), "rows: expected"),
    ],
)
def test_bad_arguments(run: Callable[..., object], message: str) -> None:
    base, tuned = draw(5, 40)
    with pytest.raises((pymerge.RequestError, IndexError), match=message):
        run(base, tuned)
