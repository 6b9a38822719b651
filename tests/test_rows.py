"""Methods that rank or measure rows, and trims after random drops: against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pymerge
from pymerge.engine import sums
from pymerge.methods.sparse import passes as sparse
from pymerge.ops.masks import mask_hash, seed_words
from tests.conftest import BACKEND_IDS

TensorList = list[torch.Tensor]


def inputs(*shape: int, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, TensorList]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]


def hashes(seed: int, name: str, count: int, numel: int) -> list[np.ndarray]:
    words = seed_words(seed, name, count)
    index = np.arange(numel, dtype=np.uint32)
    return [mask_hash(index, *words[2 * k : 2 * k + 2]) for k in range(count)]


def ranks_in_rows(delta: torch.Tensor) -> torch.Tensor:
    """Return ranks from 0, one element at a time."""
    rows = delta.abs().reshape(-1, delta.shape[-1])
    ranks = torch.zeros(rows.shape, dtype=torch.int64)
    for r, row in enumerate(rows):
        for place, i in enumerate(sorted(range(len(row)), key=lambda i: (float(row[i]), i))):
            ranks[r, i] = place
    return ranks.reshape(delta.shape)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("rescale", ["per_element", "l1", "none"])
def test_della(identifier: str, rescale: str, use_backend: Callable[[str], str]) -> None:
    """Kept with a probability that grows with the rank in the row; divided by it, or rescaled."""
    backend = use_backend(identifier)
    base, tuned = inputs(37, 20)
    density, epsilon = [0.5, 0.6, 0.4], 0.2
    merged = pymerge.della_linear(
        {"w": base},
        [{"w": model} for model in tuned],
        density=density,
        epsilon=epsilon,
        rescale=rescale,
        seed=3,
        backend=backend,
    )["w"]
    expected = base.double()
    for k, drawn in enumerate(hashes(3, "w", 3, base.numel())):
        delta = tuned[k] - base
        chance = density[k] - epsilon + ranks_in_rows(delta).double() * 2 * epsilon / 19
        kept = torch.from_numpy((drawn >> 8) / 2.0**24).reshape(base.shape) < chance
        sparse = torch.where(kept, delta.double(), 0.0)
        if rescale == "per_element":
            sparse = sparse / chance
        elif rescale == "l1":
            sparse = sparse * float(delta.double().abs().sum() / sparse.abs().sum())
        expected = expected + sparse
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_what_is_dropped_as_a_whole_is_not_rescaled(method: str) -> None:
    base, tuned = inputs(3, 4)
    given = {"density": 1e-9, "rescale": "l1"} | ({"epsilon": 0.0} if "della" in method else {})
    assert torch.equal(pymerge.merge(method, base, tuned, **given), base)


def test_della_with_election_divides_by_what_agrees() -> None:
    base, tuned = inputs(11, 13, count=2)
    whole = pymerge.della(base, tuned, density=1.0)
    first, second = (model - base for model in tuned)
    agree = torch.sign(first) == torch.sign(second)
    mean = (first + second) / 2
    larger = torch.where(first.abs() >= second.abs(), first, second)
    torch.testing.assert_close(whole, base + torch.where(agree, mean, larger), atol=1e-6, rtol=0)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_by_rows(
    identifier: str, method: str, use_backend: Callable[[str], str]
) -> None:
    """The authors' code: of each row, the int(n gamma) largest go, the int(n density) next stay."""
    backend = use_backend(identifier)
    base, tuned = inputs(9, 7, 30)
    merged = pymerge.merge(
        method, base, tuned, density=0.4, gamma=0.1, scope="row", backend=backend
    )
    deltas = []
    for model in tuned:
        delta = model - base
        ranks = ranks_in_rows(delta)
        deltas.append(torch.where((ranks < 27) & (ranks >= 15), delta, 0.0))
    total = deltas[0] + deltas[1] + deltas[2]
    if method == "breadcrumbs_ties":
        sign = torch.where(total >= 0, 1.0, -1.0)
        agrees = [torch.where(delta * sign > 0, delta, 0.0) for delta in deltas]
        total = agrees[0] + agrees[1] + agrees[2]
    torch.testing.assert_close(merged, base + total, atol=1e-6, rtol=0)
    number = torch.tensor(2.0)  # no rows: kept as it is
    assert float(pymerge.breadcrumbs(number, [torch.tensor(2.5)], scope="row")) == 2.5


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_dare_with_the_trim_of_ties(
    identifier: str, scope: str, use_backend: Callable[[str], str]
) -> None:
    """Drop and rescale, keep the largest of what is left, elect signs, add up (MergeLM's order)."""
    backend = use_backend(identifier)
    names = {"a": (300, 41), "b": (77,), "c": (400, 170)}
    base, tuned = {}, [{}, {}, {}]
    for number, (name, shape) in enumerate(names.items()):
        base[name], models = inputs(*shape, seed=number)
        for model, tensor in zip(tuned, models, strict=True):
            model[name] = tensor * (1 + number)
    merged = pymerge.dare_ties(
        base, tuned, density=0.5, trim=0.2, trim_scope=scope, seed=11, backend=backend
    )
    sparse: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name in names:
        for k, drawn in enumerate(hashes(11, name, 3, base[name].numel())):
            kept = torch.from_numpy(drawn <= np.uint32(2**31 - 1)).reshape(base[name].shape)
            delta = tuned[k][name] - base[name]
            sparse[k][name] = torch.where(kept, 2.0 * delta, 0.0)
    for model in sparse:
        everything = torch.cat([model[name].abs().flatten() for name in names])
        for name in names:
            own = everything if scope == "global" else model[name].abs().flatten()
            count = int(0.2 * own.numel())
            threshold = own.sort(descending=True).values[count - 1]
            model[name] = torch.where(model[name].abs() >= threshold, model[name], 0.0)
    for name in names:
        total = sparse[0][name] + sparse[1][name] + sparse[2][name]
        sign = torch.where(total >= 0, 1.0, -1.0)
        agrees = [torch.where(model[name] * sign > 0, model[name], 0.0) for model in sparse]
        expected = base[name] + (agrees[0] + agrees[1] + agrees[2])
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("trim", [0.01, 0.5, 0.9])
def test_equal_magnitudes_in_the_trim_of_dare(
    trim: float, identifier: str, use_backend: Callable[[str], str]
) -> None:
    """Over the whole model all at the threshold are kept, of one tensor as of several; tensor by
    tensor exactly so many, those of the lowest indices."""
    backend = use_backend(identifier)
    ones = {"a": torch.ones(100), "b": torch.ones(10, 10)}
    for names in (["a", "b"], ["a"]):
        model = {name: ones[name] for name in names}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        for scope in ("global", "tensor"):
            merged = pymerge.dare_ties(
                zeros, [model], density=1.0, trim=trim, trim_scope=scope, backend=backend
            )
            for name in names:
                kept = 100 if scope == "global" else int(trim * 100)
                assert merged[name].flatten().tolist() == [1.0] * kept + [0.0] * (100 - kept)


def test_a_trim_of_equal_magnitudes_may_end_anywhere() -> None:
    """Exactly so many are kept, the first ones, wherever the engine cuts a long tensor."""
    base, ones = torch.zeros(600_000), torch.ones(600_000)
    for count in (1, 262_144, 262_145, 480_000):
        merged = pymerge.dare_ties(base, [ones, ones], density=1.0, trim=count / 600_000)
        assert torch.equal(merged, 2 * (torch.arange(600_000) < count).float()), count


def test_a_trim_over_tensors_of_different_dtypes() -> None:
    """All are compared in float64 if one is of it."""
    base = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.float64)}
    tuned = {"a": torch.tensor([1.0, 5.0, 3.0, 7.0]), "b": torch.tensor([2.0, 6.0, 4.0, 8.0])}
    tuned["b"] = tuned["b"].double()
    merged = pymerge.dare_ties(base, [tuned], density=1.0, trim=0.5, trim_scope="global")
    assert merged["a"].tolist() == [0, 5, 0, 7]
    assert merged["b"].tolist() == [0, 6, 0, 8]


def test_a_trim_over_all_tensors_needs_one_factor() -> None:
    base, tuned = inputs(4, 4)
    with pytest.raises(pymerge.RequestError, match="trim_scope global"):
        pymerge.dare_ties(base, tuned, trim=0.2, trim_scope="global", rescale="l1")


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp_by_rows(
    identifier: str, with_base: bool, use_backend: Callable[[str], str]
) -> None:
    backend = use_backend(identifier)
    base, (a, b) = inputs(40, 33, count=2)
    origin = base if with_base else torch.zeros_like(base)
    merged = pymerge.nuslerp(
        [a, b],
        base=base if with_base else None,
        weights=[1.0, 3.0],
        flatten=False,
        backend=backend,
    )
    x, y = (a - origin).double(), (b - origin).double()
    cosine = (x * y).sum(-1, keepdim=True) / (x.norm(dim=-1) * y.norm(dim=-1)).unsqueeze(-1)
    angle = torch.acos(cosine)
    arc = (torch.sin(0.25 * angle) * x + torch.sin(0.75 * angle) * y) / torch.sin(angle)
    torch.testing.assert_close(merged.double(), origin + arc, atol=2e-6, rtol=0)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_model_stock_by_rows(identifier: str, use_backend: Callable[[str], str]) -> None:
    backend = use_backend(identifier)
    base, tuned = inputs(5, 8, 33)
    merged = pymerge.model_stock(base, tuned, filter_wise=True, backend=backend)
    deltas = [(model - base).double() for model in tuned]
    norms = [delta.norm(dim=-1) for delta in deltas]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [(deltas[i] * deltas[j]).sum(-1) / (norms[i] * norms[j]) for i, j in pairs]
    cosine = sum(cosines) / 3  # type: ignore[arg-type]
    ratio = (3 * cosine / (1 + 2 * cosine)).unsqueeze(-1)
    expected = base + ratio * (deltas[0] + deltas[1] + deltas[2]) / 3
    torch.testing.assert_close(merged.double(), expected, atol=2e-6, rtol=0)


def test_rows_do_not_care_about_pieces() -> None:
    """Results of files come in pieces that end anywhere in a row."""
    from pymerge.methods.directions.passes import whole_rows

    for start in range(25):
        for stop in range(start + 1, 26):
            at = start
            for begin, end, columns in whole_rows(start, stop, 5):
                assert begin == at < end
                assert (end - begin) % columns == 0
                assert columns == 5 or begin // 5 == (end - 1) // 5
                at = end
            assert at == stop


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_linear", {"density": 0.4, "rescale": "l1"}),
        ("della_linear", {"density": 0.4, "epsilon": 0.2, "rescale": "l1"}),
        ("nuslerp", {"flatten": False}),
        ("model_stock", {"filter_wise": True}),
        ("slerp", {"t": 0.3}),
    ],
)
def test_long_tensors_are_summed_in_parts(
    method: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random masks and rows go on where the part before has ended."""
    base, tuned = inputs(900, 257, count=1 if method == "slerp" else 2)
    whole = pymerge.merge(method, base, tuned, **parameters)
    monkeypatch.setattr(sums, "_AT_ONCE", 1 << 16)
    monkeypatch.setattr(sparse, "_RANKED_AT_ONCE", 5000)
    assert torch.equal(pymerge.merge(method, base, tuned, **parameters), whole)
