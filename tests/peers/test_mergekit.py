"""Agreement with mergekit's in-memory API over random tensors and parameters, in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import pymerge

mergekit = pytest.importorskip("mergekit.merge_methods")

SHAPES = [(7,), (64,), (33, 47), (128, 96), (1, 50), (50, 1)]


def draw(shape: tuple[int, ...], count: int, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models; within a model, no two deltas have the same magnitude.

    All are multiples of one power of two, so that deltas are exact: among equal magnitudes,
    mergekit's choice is not defined.
    """
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    unit = 2.0 ** random.Random(seed).choice([-22, -18, -14])
    base = torch.randint(-(2**22), 2**22, shape, generator=generator) * unit
    models = []
    for _ in range(count):
        order = torch.randperm(numel, generator=generator).reshape(shape) + 1
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        models.append(base + order * sign * (unit * 64))
    return base, models


def theirs(
    method: str,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    shared: dict[str, Any],
    each: dict[str, list[float]],
) -> torch.Tensor:
    tensors = models if base is None else [base, *models]
    first = len(tensors) - len(models)
    parameters = dict(shared)
    for name, values in each.items():
        parameters[name] = {first + k: value for k, value in enumerate(values)}
    index = None if base is None else 0
    return mergekit.merge_tensors(tensors, method, parameters=parameters, base_index=index)


def close(ours: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == other.shape
    size = float(other.abs().max()) + 1e-12
    assert float((ours - other).abs().max()) <= tolerance * max(1.0, size)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    base, models = draw(shape, count, seed)
    weights = [round(rng.uniform(-0.5, 1.5), 3) for _ in range(count)]
    scale, normalize = round(rng.uniform(0.1, 2), 2), rng.random() < 0.5 and abs(sum(weights)) > 0.1
    ours = pymerge.merge("linear", None, models, weights=weights, normalize=normalize)
    other = theirs("linear", None, models, {"normalize": normalize}, {"weight": weights})
    close(ours, other, 1e-6)
    ours = pymerge.merge(
        "task_arithmetic", base, models, weights=weights, scale=scale, normalize=normalize
    )
    shared = {"lambda": scale, "normalize": normalize}
    close(ours, theirs("task_arithmetic", base, models, shared, {"weight": weights}), 1e-6)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties(shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    base, models = draw(shape, count, seed)
    weights = [round(rng.uniform(0.1, 1.5), 3) for _ in range(count)]
    densities = [round(rng.uniform(0, 1), 2) for _ in range(count)]
    scale, normalize = round(rng.uniform(0.1, 2), 2), rng.random() < 0.5
    ours = pymerge.merge(
        "ties",
        base,
        models,
        weights=weights,
        density=densities,
        scale=scale,
        normalize=normalize,
        semantics="mergekit",
    )
    shared = {"lambda": scale, "normalize": normalize}
    close(
        ours, theirs("ties", base, models, shared, {"weight": weights, "density": densities}), 1e-6
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(method: str, shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    base, models = draw(shape, count, seed)
    weights = [round(rng.uniform(0.1, 1.5), 3) for _ in range(count)]
    densities = [round(rng.uniform(0, 1), 2) for _ in range(count)]
    gammas = [rng.choice([0.0, 0.01, 0.1, 0.6]) for _ in range(count)]
    scale, normalize = round(rng.uniform(0.1, 2), 2), rng.random() < 0.5
    each = {"weight": weights, "density": densities, "gamma": gammas}
    ours = pymerge.merge(
        method,
        base,
        models,
        weights=weights,
        density=densities,
        gamma=gammas,
        scale=scale,
        normalize=normalize,
    )
    shared = {"lambda": scale, "normalize": normalize}
    close(ours, theirs(method, base, models, shared, each), 1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_1(method: str, seed: int) -> None:
    """Masks are each tool's own; without one, the rest of the arithmetic must agree."""
    rng = random.Random(seed)
    base, models = draw((40, 30), 3, seed)
    weights = [round(rng.uniform(0.1, 1.5), 3) for _ in range(3)]
    for rescale, name in ((True, "l1"), (False, "none")):
        ours = pymerge.merge(method, base, models, weights=weights, density=1.0, rescale=name)
        shared = {"rescale": rescale, "lambda": 1.0}
        other = theirs(method, base, models, shared, {"weight": weights, "density": [1.0] * 3})
        close(ours, other, 2e-6)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geometry(shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    base, models = draw(shape, 4, seed)
    t = round(rng.uniform(0, 1), 2)
    weights = [round(rng.uniform(0.1, 1.5), 3) for _ in range(4)]
    close(
        pymerge.merge("slerp", base, models[:1], t=t),
        theirs("slerp", base, models[:1], {"t": t}, {}),
        2e-6,
    )
    close(
        pymerge.merge("model_stock", base, models),
        theirs("model_stock", base, models, {}, {}),
        5e-6,
    )
    close(
        pymerge.merge("model_stock", base, models, filter_wise=True),
        theirs("model_stock", base, models, {"filter_wise": True}, {}),
        5e-6,
    )
    # Angles of nearly parallel models are noise in float32, in which mergekit computes them.
    close(pymerge.merge("karcher", None, models), theirs("karcher", None, models, {}, {}), 1e-4)
    for origin in (None, base):
        close(
            pymerge.merge("nuslerp", origin, models[:2], weights=weights[:2]),
            theirs("nuslerp", origin, models[:2], {}, {"weight": weights[:2]}),
            5e-6,
        )
        close(
            pymerge.merge("nuslerp", origin, models[:2], weights=weights[:2], flatten=False),
            theirs(
                "nuslerp",
                origin,
                models[:2],
                {"nuslerp_flatten": False},
                {"weight": weights[:2]},
            ),
            5e-6,
        )
        close(
            pymerge.merge("multislerp", origin, models, weights=weights),
            theirs("multislerp", origin, models, {}, {"weight": weights}),
            5e-6,
        )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pointwise(shape: tuple[int, ...], seed: int) -> None:
    base, models = draw(shape, 3, seed)
    close(
        pymerge.merge("nearswap", base, models[:1], t=0.01),
        theirs("nearswap", base, models[:1], {"t": 0.01}, {}),
        1e-6,
    )
    close(
        pymerge.merge("ram", base, models, epsilon=0.01),
        theirs("ram", base, models, {"epsilon": 0.01}, {}),
        1e-6,
    )
    close(
        pymerge.merge("passthrough", None, models[:1], scale=0.7),
        theirs("passthrough", None, models[:1], {}, {"scale": [0.7]}),
        1e-6,
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_tensors(shape: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    base, models = draw(shape, 3, seed)
    topk = rng.choice([1.0, 0.5, 0.2])
    ours = pymerge.merge("sce", base, models, select_topk=topk, mask="everywhere")
    close(ours, theirs("sce", base, models, {"select_topk": topk}, {}), 2e-6)
    ours = pymerge.merge("ramplus_tl", base, models, r=0.3, alpha=0.5)
    close(ours, theirs("ramplus_tl", base, models, {"r": 0.3, "alpha": 0.5}, {}), 2e-6)
    generator = torch.Generator().manual_seed(seed)
    # The nearer two models are, the more of a divergence is rounding: the same is needed.
    for change in (1.0, 1e-2, 1e-4):
        pair = [torch.randn(shape, generator=generator)]
        pair.append(pair[0] + change * torch.randn(shape, generator=generator))
        ours = pymerge.merge("arcee_fusion", pair[0], pair[1:])
        assert torch.equal(ours, theirs("arcee_fusion", pair[0], pair[1:], {}, {}))
    weights = [round(rng.uniform(0.1, 1.5), 3) for _ in range(3)]
    for method in ("della", "della_linear"):
        ours = pymerge.merge(method, base, models, weights=weights, density=1.0, rescale="l1")
        each = {"weight": weights, "density": [1.0] * 3}
        close(ours, theirs(method, base, models, {}, each), 2e-6)
