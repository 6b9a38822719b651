"""Methods on singular vectors, against numpy code written from the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pymerge
from pymerge.methods import METHODS

SHAPES = [(24, 40), (40, 24), (7, 7), (3, 2)]


def draw(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    """A base, and models with task vectors of a common and an own part."""
    generator = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(shape, generator=generator) for _ in range(2))
    own = [0.3 * torch.randn(shape, generator=generator) for _ in range(count)]
    return [base, *(base + 0.1 * (common + one) for one in own)]


def polar(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal factor, by the inverse square root of the Gram matrix."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    values, vectors = np.linalg.eigh(tall.T @ tall)
    factor = tall @ (vectors / np.sqrt(values)) @ vectors.T
    return factor if tall is matrix else factor.T


def common_size(rank: int, count: int, fraction: float) -> int:
    left = rank - int(rank * fraction)
    return max(rank - round(left / count) * count, rank % count)


def oracle(deltas: list[np.ndarray], fraction: float) -> np.ndarray:
    """Iso-CTS, by algorithm 2 of the paper, in doubles; with fraction 1 it is Iso-C."""
    total = np.sum(deltas, axis=0)
    rank = min(total.shape)
    size = common_size(rank, len(deltas), fraction)
    each = (rank - size) // len(deltas)
    u, s, v = np.linalg.svd(total, full_matrices=False)
    us, ss, vs = [u[:, :size]], [s[:size]], [v[:size]]
    projector = np.eye(len(total)) - u[:, :size] @ u[:, :size].T
    for delta in deltas:
        a, b, c = np.linalg.svd(projector @ delta, full_matrices=False)
        us, ss, vs = [*us, a[:, :each]], [*ss, b[:each]], [*vs, c[:each]]
    values = np.concatenate(ss)
    return values.mean() * polar(np.hstack(us)) @ polar(np.vstack(vs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8, 1.0])
def test_iso(shape: tuple[int, int], count: int, fraction: float) -> None:
    base, *tuned = draw(shape, count)
    deltas = [(model - base).double().numpy() for model in tuned]
    merged = pymerge.iso_cts(base, tuned, common_fraction=fraction, scale=0.7)
    expected = base.double().numpy() + 0.7 * oracle(deltas, fraction)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=0, atol=2e-5)
    if fraction == 1.0:
        one = pymerge.iso_c(base, tuned, scale=0.7)
        torch.testing.assert_close(one, merged, rtol=0, atol=2e-6)


def test_the_spectrum_is_uniform() -> None:
    base, *tuned = draw((30, 20), 3)
    merged = pymerge.iso_c(base, tuned)
    values = torch.linalg.svdvals(merged - base)
    total = torch.linalg.svdvals(sum(model - base for model in tuned))
    torch.testing.assert_close(values, total.mean().expand(20), rtol=1e-4, atol=0)


METHODS_ON_MATRICES: list[Callable[..., Any]] = [pymerge.iso_c, pymerge.iso_cts, pymerge.tsv_m]


@pytest.mark.parametrize("method", METHODS_ON_MATRICES)
def test_what_is_no_matrix_gets_the_mean(method: Callable[..., Any]) -> None:
    """Vectors, convolutions, numbers, CLIP's text projection, as the authors' codes do."""
    shapes = {"norm.weight": (16,), "conv.weight": (4, 3, 2, 2), "logit_scale": ()}
    shapes |= {"text_projection": (6, 5), "empty.weight": (0, 4)}
    base = {name: draw(shape, 0, i)[0] for i, (name, shape) in enumerate(shapes.items())}
    tuned = [{n: t + 0.1 * k * torch.ones_like(t) for n, t in base.items()} for k in (1, 2)]
    merged = method(base, tuned, scale=0.5)
    for name, tensor in base.items():
        torch.testing.assert_close(merged[name], tensor + 0.075, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS_ON_MATRICES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(method: Callable[..., Any], threads: int) -> None:
    base, *tuned = draw((65, 80), 2)
    expected = method(base, tuned)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(method(base, tuned), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS_ON_MATRICES)
def test_models_equal_to_the_base_give_the_base(method: Callable[..., Any]) -> None:
    base, *_ = draw((9, 12), 0)
    assert torch.equal(method(base, [base, base]), base)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_singular_vectors(name: str, value: float) -> None:
    base, model = draw((4, 5), 1)
    model[1, 2] = value
    with pytest.raises(pymerge.NonFiniteError, match="flat index 7"):
        pymerge.merge(name, base, [model])
    with pytest.raises(pymerge.RequestError, match=f"{name}: .*no singular vectors"):
        pymerge.merge(name, base, [model], nan="keep")


def test_bad_requests() -> None:
    base, model = draw((4, 5), 1)
    with pytest.raises(pymerge.RequestError, match=r"common_fraction: expected a finite number in"):
        pymerge.iso_cts(base, [model], common_fraction=1.5)
    with pytest.raises(pymerge.RequestError, match="has no kernels for iso_c"):
        pymerge.iso_c(base, [model], backend="cpu")
    parameter = METHODS["iso_cts"].parameter("common_space_fraction")
    assert parameter is not None
    assert parameter.name == "common_fraction"
