"""Arcee Fusion: both dialects against independent code, and the exact one at its edges."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.config import load_config
from pymerge.merging.tensors import MemorySink
from pymerge.methods.arcee import passes as arcee
from pymerge.plan import make_plan
from tests import models
from tests.conftest import BACKEND_IDS, NATIVE
from tests.test_methods import in_small_pieces


def exact_divergence(x: torch.Tensor, y: torch.Tensor) -> float:
    """KL(softmax(x) || softmax(y)) with 1e-8 added to each probability, with 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        rows = []
        for row in (x, y):
            values = [Decimal(value) for value in row.tolist()]
            most = max(values)
            powers = [(value - most).exp() for value in values]
            total = sum(powers)
            rows.append([power / total + Decimal("1e-8") for power in powers])
        return float(sum(p * (p / q).ln() for p, q in zip(*rows, strict=True)))


def fused(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The exact dialect, from its description, of a matrix in float32."""
    divergences = [exact_divergence(x, y) for x, y in zip(model, base, strict=True)]
    weights = torch.tensor(divergences, dtype=torch.float64).unsqueeze(1)
    delta = model - base
    importance = (delta.abs().double() * weights).float()
    ordered = sorted(importance.flatten().tolist())
    last = len(ordered) - 1
    median, low, high = (
        torch.tensor(ordered[math.floor(share * last)]) for share in (0.5, 0.25, 0.75)
    )
    return torch.where(importance >= median + 1.5 * (high - low), base + delta, base)


def as_mergekit(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """mergekit 0.1.5, up to 10^6 elements, from its description."""
    p = torch.nn.functional.softmax(model, dim=-1) + 1e-8
    q = torch.nn.functional.softmax(base, dim=-1) + 1e-8
    delta = model - base
    importance = delta.abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ordered = importance.flatten().sort().values
    last = len(ordered) - 1
    median, low, high = (ordered[int(share * last)] for share in (0.5, 0.25, 0.75))
    return base + delta * (importance >= median + 1.5 * (high - low))


def pair(
    *shape: int, scale: float = 0.02, change: float = 1e-3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * scale
    return base, base + torch.randn(shape, generator=generator) * change


def divergences(
    base: torch.Tensor, model: torch.Tensor, backend: str, columns: int | None = None
) -> torch.Tensor:
    rows = base.numel() // (columns or base.shape[-1])
    table = torch.full((5, rows), 7.0, dtype=torch.float64)
    wide = base.dtype == torch.float64
    flat = base.reshape(-1), model.reshape(-1)
    op = torch.ops.pymerge.divergence_sums_
    op(table, *flat, "all", columns or base.shape[-1], wide=wide, backend=backend)
    return table[4]


@pytest.mark.parametrize("scale", [0.02, 3.0, 100.0])
@pytest.mark.parametrize("change", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("identifier", NATIVE)
def test_divergences_are_accurate(
    identifier: str, change: float, scale: float, use_backend: Callable[[str], str]
) -> None:
    """However near the rows are to each other, and however much of the sum the floor decides."""
    base, model = (row.double() for row in pair(300, scale=scale, change=change))
    if change > 1e-6:  # as models have it
        base, model = base.float(), model.float()
    (found,) = divergences(base, model, use_backend(identifier)).tolist()
    assert found == pytest.approx(exact_divergence(model, base), rel=1e-14)


def test_divergences_of_wide_rows() -> None:
    """A floor of 1e-8 counts where there are many columns."""
    base, model = pair(200_000, change=0.5)
    (found,) = divergences(base, model, "reference").tolist()
    p, q = torch.softmax(model.double(), -1), torch.softmax(base.double(), -1)
    floored = (p + 1e-8) * ((p + 1e-8) / (q + 1e-8)).log()
    assert found == pytest.approx(math.fsum(floored.tolist()), rel=1e-11)
    assert found != pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("change", [1e-1, 1e-3, 1e-5])
def test_exact_is_as_described(
    identifier: str, change: float, use_backend: Callable[[str], str]
) -> None:
    base, model = pair(12, 70, change=change)
    model[3] = base[3]
    model[4] = base[4] + 0.5  # softmax does not see it
    model[5] *= 100
    merged = pymerge.arcee_fusion(base, model, semantics="exact", backend=use_backend(identifier))
    assert torch.equal(merged, fused(base, model))
    taken = merged != base
    assert 0.02 < float(taken.float().mean()) < 0.5
    assert not taken[3].any()


def test_quartiles_of_few_elements() -> None:
    """Positions are rounded down."""
    for columns in range(1, 13):
        for seed in range(5):
            base, model = pair(1, columns, change=0.5, seed=seed)
            merged = pymerge.arcee_fusion(base, model, semantics="exact")
            assert torch.equal(merged, fused(base, model)), (columns, seed)


def test_golden_values() -> None:
    base = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    model = torch.tensor([[1.0, 0.0, 0.0, -0.5], [1.0, 2.25, 3.0, 4.0]])
    # KL of the rows: 0.1301..., 0.002295...; importances: 0.1301, 0.0651, 0.00057, and 0.
    found = divergences(base, model, "reference")
    expected = [exact_divergence(x, y) for x, y in zip(model, base, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-15)
    # Sorted: 0 0 0 0 0 .0006 .0651 .1301: median 0, quartiles 0 and .0006: from .0009 on.
    wanted = torch.tensor([[1.0, 0.0, 0.0, -0.5], [1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(pymerge.arcee_fusion(base, model, semantics="exact"), wanted)


@pytest.mark.parametrize("shape", [(40, 60), (5, 8, 9), (999,), (1, 1), (7, 1)], ids=str)
@pytest.mark.parametrize("change", [1e-1, 1e-3])
def test_mergekit_is_as_described(shape: tuple[int, ...], change: float) -> None:
    base, model = pair(*shape, change=change)
    torch.testing.assert_close(
        pymerge.arcee_fusion(base, model), as_mergekit(base, model), rtol=0, atol=0
    )


def test_dialects_differ_where_changes_are_small() -> None:
    """In float32 the divergence of near rows is made of rounding errors, some of them negative."""
    base, model = pair(64, 2048, change=1e-4)
    other = pymerge.arcee_fusion(base, model, semantics="mergekit")
    exact = pymerge.arcee_fusion(base, model, semantics="exact")
    assert float((other != exact).float().mean()) > 0.05
    base, model = pair(64, 2048, change=1e-1)
    other = pymerge.arcee_fusion(base, model, semantics="mergekit")
    exact = pymerge.arcee_fusion(base, model, semantics="exact")
    assert float((other != exact).float().mean()) < 0.01


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_edges(identifier: str, use_backend: Callable[[str], str]) -> None:
    backend = use_backend(identifier)

    def merged(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        return pymerge.arcee_fusion(base, model, semantics="exact", backend=backend)

    # Nothing changed: every importance is 0, the threshold too, and all of nothing is taken.
    base, _ = pair(5, 6)
    assert torch.equal(merged(base, base.clone()), base)
    # Rows of one column and constant rows have the same softmax in both: the model is taken.
    base, model = pair(6, 1)
    assert torch.equal(merged(base, model), base + (model - base))
    base, model = torch.full((3, 4), 0.5), torch.full((3, 4), 0.75)
    assert torch.equal(merged(base, model), model)
    # A number has no row.
    assert merged(torch.tensor(0.5), torch.tensor(0.3)) == torch.tensor(0.3)
    assert torch.equal(merged(torch.tensor([0.5]), torch.tensor([0.25])), torch.tensor([0.25]))
    assert merged(torch.zeros(3, 0), torch.zeros(3, 0)).shape == (3, 0)
    # Logits beyond what exp takes.
    base = torch.tensor([[1e4, -1e4, 0.0, 1.0], [1e4, -1e4, 0.0, 1.0]])
    model = torch.tensor([[-1e4, 1e4, 0.0, 1.0], [1e4, -1e4, 0.0, 1.5]])
    found = divergences(base, model, backend)
    expected = [exact_divergence(x, y) for x, y in zip(model, base, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.equal(merged(base, model), fused(base, model))
    base = torch.tensor([3e38, -3e38, 0.0])
    assert divergences(base, base.flip(0), backend)[0].isfinite()


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite(identifier: str, value: str, use_backend: Callable[[str], str]) -> None:
    """An error, or kept from spreading: it decides nothing outside of its row."""
    backend = use_backend(identifier)
    base, model = pair(8, 50, change=1e-2)
    model[2, 7] = float(value)
    with pytest.raises(pymerge.NonFiniteError, match=r"arcee_fusion: models\[0\]"):
        pymerge.arcee_fusion(base, model, semantics="exact", backend=backend)
    kept = pymerge.arcee_fusion(base, model, semantics="exact", nan="keep", backend=backend)
    expected = pymerge.arcee_fusion(base, model, semantics="exact", nan="keep", backend="reference")
    assert torch.equal(kept.nan_to_num(), expected.nan_to_num())
    others = [row for row in range(8) if row != 2]
    assert kept[others].isfinite().all()
    assert (kept[others] != base[others]).any()


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize(
    ("shape", "kept", "scale"),
    [
        ((3, 5000), 1 << 20, 1),
        ((40_000,), 1 << 20, 1),
        ((1111, 7), 100, 1),
        ((9, 1024), 2, 1),
        ((3, 5000), 2, 1),
        ((3, 5000), 2, 1e5),  # exp of twice the largest is infinite
    ],
    ids=str,
)
def test_tiles_do_not_matter(
    shape: tuple[int, ...],
    kept: int,
    scale: float,
    identifier: str,
    use_backend: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows longer than a tile, and more rows than there is room for."""
    backend = use_backend(identifier)
    base, model = (scale * one for one in pair(*shape))
    how: dict[str, Any] = {"semantics": "exact", "backend": backend}
    expected = pymerge.arcee_fusion(base, model, **how)
    monkeypatch.setattr(arcee, "_CACHED", 1 << 11)
    monkeypatch.setattr(arcee, "TILE", 1 << 12)
    monkeypatch.setattr(arcee, "_KEPT", kept)
    monkeypatch.setattr(MemorySink, "pieces", in_small_pieces)
    # A scope that fits into one sample is held; this one is not.
    select = arcee.order_statistics
    monkeypatch.setattr(
        arcee, "order_statistics", lambda *a, **k: select(*a, **{**k, "sample": 1, "bins": 64})
    )
    assert torch.equal(pymerge.arcee_fusion(base, model, **how), expected)


@pytest.mark.parametrize("identifier", NATIVE)
@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 1023, 1025, 16_384, 16_385, 70_000])
def test_rows_of_any_length(
    columns: int, identifier: str, use_backend: Callable[[str], str]
) -> None:
    """Rows that are held, with others or alone, and rows that are read once for each step."""
    base, model = pair(3 if columns > 1000 else 101, columns, change=1e-2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        own = base.to(dtype), model.to(dtype)
        expected = divergences(*own, "reference")
        assert torch.equal(divergences(*own, use_backend(identifier)), expected)


def test_dialect_on_torch_has_no_kernels() -> None:
    base, model = pair(4, 5)
    with pytest.raises(pymerge.RequestError, match="with semantics 'mergekit', which runs on ref"):
        pymerge.arcee_fusion(base, model, backend="cpu")
    with pytest.raises(pymerge.RequestError, match="expected one of 'mergekit', 'exact'"):
        pymerge.arcee_fusion(base, model, semantics="precise")


@pytest.mark.parametrize(("semantics", "passes"), [("mergekit", 1), ("exact", 4)])
def test_plan(semantics: str, passes: int, tmp_path: Path) -> None:
    base, tuned = models.llama(1)
    models.save_family(tmp_path, base, tuned)
    config = models.config(tmp_path, "arcee_fusion", 1, semantics=semantics)
    with make_plan(load_config(config)) as plan:
        assert plan.passes == passes
        assert (plan.memory.histogram_bins > 0) == (passes > 1)
        assert "divergence" in plan.passes_text or passes == 1


@pytest.mark.parametrize("semantics", ["mergekit", "exact"])
def test_files(semantics: str, tmp_path: Path) -> None:
    base, tuned = models.llama(1, torch.float32)
    models.save_family(tmp_path, base, tuned, files=2)
    config = models.config(tmp_path, "arcee_fusion", 1, semantics=semantics)
    report = pymerge.merge_checkpoints(config, tmp_path / "out")
    expected = pymerge.arcee_fusion(base, tuned[0], semantics=semantics)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
    assert report.backend == ("reference" if semantics == "mergekit" else "cpu")
    assert bool(report.warnings) == (semantics == "mergekit")
