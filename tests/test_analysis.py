"""`pymerge.analyze`: every statistic against float64 computations that share nothing with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pymerge
from pymerge.analysis import Analysis, Group, passes
from pymerge.analysis.names import layer_order, places
from tests import models as checkpoints
from tests.conftest import BACKEND_IDS, NATIVE

State = dict[str, torch.Tensor]

LARGE = 70_001  # more than a segment: magnitudes are sampled
SHAPES = {
    "model.embed.weight": (LARGE,),
    "model.layers.0.mlp.up.weight": (33, 31),
    "model.layers.0.mlp.up.bias": (31,),
    "model.layers.1.mlp.up.weight": (64, 104),
    "model.layers.10.attn.q.weight": (5,),
    "model.norm.weight": (),
    "model.none.weight": (0, 3),
}
DTYPES = {
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "f32": (torch.float32,),
    "f64": (torch.float64, torch.float32),
    "mixed": (torch.float32, torch.bfloat16, torch.float16),
}
DENSITIES = (0.1, 0.5)


def family(dtypes: Sequence[torch.dtype], count: int = 3) -> tuple[State, list[State]]:
    """A base and models with unchanged and equal weights, and correlated task vectors."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: draw(shape) * 0.02 for name, shape in SHAPES.items()}
    tuned: list[State] = []
    for k in range(count):
        state = {}
        for name, shape in SHAPES.items():
            delta = draw(shape) * 1e-3
            if k > 0:
                delta = 0.7 * delta + 0.5 * (tuned[0][name].float() - base[name])
            delta[torch.rand(shape, generator=generator) < 0.2] = 0.0
            state[name] = base[name] + delta
            if k == 1:
                same = torch.rand(shape, generator=generator) < 0.1
                state[name] = torch.where(same, tuned[0][name], state[name])
        tuned.append(state)
    states = [
        {name: tensor.to(dtypes[k % len(dtypes)]) for name, tensor in state.items()}
        for k, state in enumerate((base, *tuned))
    ]
    return states[0], states[1:]


class Oracle:
    """Statistics of some tensors, in numpy and float64."""

    def __init__(self, base: State, tuned: list[State], names: Sequence[str], wide: bool) -> None:
        kind = torch.float64 if wide else torch.float32

        def flat(state: State) -> torch.Tensor:
            return torch.cat([state[name].to(kind).reshape(-1) for name in names])

        self.base = flat(base).double().numpy()
        self.models = [flat(state).double().numpy() for state in tuned]
        self.tau = [(flat(state) - flat(base)).double().numpy() for state in tuned]

    def pairs(self, value: Callable[[int, int], Any]) -> list[list[float | None]]:
        count = range(len(self.tau))
        return [[value(i, j) for j in count] for i in count]

    def conflict(self, kept: list[np.ndarray]) -> list[list[float | None]]:
        def of(i: int, j: int) -> float | None:
            both = kept[i] & kept[j]
            opposite = np.sign(self.tau[i]) != np.sign(self.tau[j])
            return (both & opposite).sum() / both.sum() if both.any() else None

        return self.pairs(of)

    def agreement(self, kept: list[np.ndarray]) -> float:
        signs = np.stack([np.sign(t) * mask for t, mask in zip(self.tau, kept, strict=True)])
        many = (signs != 0).sum(axis=0)
        ratio = np.where(many > 0, np.abs(signs.sum(axis=0)) / np.maximum(many, 1), 1.0)
        return float(ratio.mean()) if ratio.size else 1.0


def close(got: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Equal structures of numbers; None only where None is expected."""
    if isinstance(got, (tuple, list)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            close(a, b, tolerance)
    elif got is None or expected is None:
        assert got is None
        assert expected is None
    else:
        assert got == pytest.approx(float(expected), rel=tolerance, abs=1e-12)


def check(group: Group, own: Oracle, whole: Oracle) -> None:
    """Compare a group with what numpy says."""
    tau, count, numel = own.tau, len(own.tau), own.base.size
    squares = [float(t @ t) for t in tau]

    def cosine(i: int, j: int) -> float | None:
        norms = math.sqrt(squares[i] * squares[j])
        return float(tau[i] @ tau[j]) / norms if norms else None

    assert group.parameters == numel
    close(group.base_l2, np.linalg.norm(own.base))
    close(group.l1, [np.abs(t).sum() for t in tau])
    close(group.l2, [math.sqrt(square) for square in squares])
    close(group.norm_share, [s / (w @ w) for s, w in zip(squares, whole.tau, strict=True)])
    close(group.unchanged, [(t == 0).mean() if numel else None for t in tau])
    close(group.dot, own.pairs(lambda i, j: float(tau[i] @ tau[j])), 1e-9)
    close(group.cosine, own.pairs(cosine), 1e-9)
    close(group.l1_distance, own.pairs(lambda i, j: np.abs(tau[i] - tau[j]).sum()))
    close(group.l2_distance, own.pairs(lambda i, j: np.linalg.norm(tau[i] - tau[j])))
    equal = own.pairs(
        lambda i, j: 1.0 if i == j else (own.models[i] == own.models[j]).mean() if numel else None
    )
    close(group.equal, equal)
    moved = [t != 0 for t in tau]
    diagonal = own.conflict(moved)
    close(group.sign_conflict, diagonal)
    close(group.sign_agreement, own.agreement(moved))
    for trimmed in group.trimmed:
        total = whole.base.size
        rank = total - int(total * trimmed.density)
        least = [np.partition(np.abs(t), rank - 1)[rank - 1] for t in whole.tau]
        assert list(trimmed.threshold) == least
        kept = [(np.abs(t) >= limit) & (t != 0) for t, limit in zip(tau, least, strict=True)]
        close(trimmed.kept, [mask.mean() if numel else None for mask in kept])
        norms = [
            float((t[mask] ** 2).sum()) / s if s else None
            for t, mask, s in zip(tau, kept, squares, strict=True)
        ]
        close(trimmed.kept_norm, norms)
        close(trimmed.sign_conflict, own.conflict(kept))
        close(trimmed.sign_agreement, own.agreement(kept))

        def overlap(i: int, j: int, kept: list[np.ndarray] = kept) -> float | None:
            fewest = min(kept[i].sum(), kept[j].sum())
            return (kept[i] & kept[j]).sum() / fewest if fewest else None

        close(trimmed.overlap, own.pairs(overlap))
    assert len(group.l1) == count


@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_statistic(dtypes: str, use_backend: Callable[[str], str]) -> None:
    base, tuned = family(DTYPES[dtypes])
    wide = dtypes == "f64"
    found = pymerge.analyze(base, tuned, densities=DENSITIES, backend=use_backend(NATIVE[-1]))
    whole = Oracle(base, tuned, list(SHAPES), wide)
    check(found.whole, whole, whole)
    assert [group.name for group in found.layers] == ["0", "1", "10", "other"]
    kinds = ["model.embed", "mlp.up", "attn.q", "model.norm", "model.none"]
    assert [group.name for group in found.module_types] == kinds
    for group in found.layers:
        names = [name for name in SHAPES if f".{group.name}." in name]
        names = names or [name for name in SHAPES if ".layers." not in name]
        assert group.tensors == len(names)
        check(group, Oracle(base, tuned, names, wide), whole)
    up = Oracle(base, tuned, [name for name in SHAPES if "mlp.up" in name], wide)
    check(found.module_types[1], up, whole)
    assert [group.name for group in found.tensors] == list(SHAPES)
    for group in found.tensors:
        check(group, Oracle(base, tuned, [group.name], wide), whole)


@pytest.mark.parametrize("dtypes", ["bf16", "f64"])
def test_quantiles_and_histograms(dtypes: str) -> None:
    base, tuned = family(DTYPES[dtypes])
    found = pymerge.analyze(base, tuned, densities=())
    for group in (*found.tensors, found.whole):
        names = list(SHAPES) if group is found.whole else [group.name]
        tau = Oracle(base, tuned, names, dtypes == "f64").tau
        sampled = group.parameters > 1 << 16
        # What is sampled is within a few standard errors of its share.
        slack = 5 * math.sqrt(0.25 / max(1, group.histogram.counted)) if sampled else 0.0
        for k, own in enumerate(tau):
            magnitudes, histogram = np.abs(own), group.histogram
            if not group.parameters:
                assert group.quantiles.values[k] == (None,) * len(group.quantiles.levels)
                continue
            edges = np.exp2(np.array(histogram.log2_edges))
            total = sum(histogram.counts[k]) + histogram.zeros[k]
            assert total == pytest.approx(group.parameters, abs=len(edges))
            expected = np.histogram(magnitudes[magnitudes > 0], bins=edges * (1 - 1e-9))[0]
            assert np.abs(np.array(histogram.counts[k]) - expected).max() <= (
                slack * group.parameters
            )
            for level, value in zip(group.quantiles.levels, group.quantiles.values[k], strict=True):
                near = [max(0.0, level - slack), min(1.0, level + slack)]
                low, high = np.quantile(magnitudes, near, method="inverted_cdf")
                assert value is not None
                assert low * 0.88 <= value <= high * 1.13 or group.parameters < 10


def bare(analysis: Analysis) -> Analysis:
    """Without what may differ: how long it took, what ran, where the models lie."""
    facts = dataclasses.replace(
        analysis.facts, seconds=0.0, backend="", isa=None, threads=0, peak_anonymous=0
    )
    models = tuple(dataclasses.replace(model, path="") for model in analysis.models)
    base = dataclasses.replace(analysis.base, path="")
    return dataclasses.replace(analysis, facts=facts, models=models, base=base)


def test_numbers_depend_on_nothing_but_the_models(
    tmp_path: Path, use_backend: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, shards, tiles, the backend and the instruction set: the same records."""
    base, tuned = family((torch.bfloat16,))
    names = [f"m{k}" for k in range(3)]
    expected = bare(pymerge.analyze(base, tuned, names=names, backend="reference"))
    for identifier, threads in itertools.product(BACKEND_IDS[1:], (1, 3)):
        backend = use_backend(identifier)
        got = pymerge.analyze(base, tuned, names=names, backend=backend, threads=threads)
        assert bare(got) == expected, (identifier, threads)
    monkeypatch.setattr(passes, "_AT_ONCE", 1 << 16)
    assert bare(pymerge.analyze(base, tuned, names=names)) == expected
    for number, files in enumerate((1, (1, 3, 2, 4))):
        root = tmp_path / str(number)
        checkpoints.save_family(root, base, tuned, files=files)
        got = pymerge.analyze(root / "base", [root / name for name in names])
        # A checkpoint has its tensors by name.
        order = sorted(SHAPES)
        by_name = {group.name: group for group in expected.tensors}
        assert got.labels == tuple(names)
        assert [group.name for group in got.tensors] == order
        assert got.tensors == tuple(by_name[name] for name in order)
        assert (got.whole, got.layers) == (expected.whole, expected.layers)
        assert set(got.module_types) == set(expected.module_types)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_every_number_of_models(count: int) -> None:
    base, tuned = family((torch.float32,), count)
    found = pymerge.analyze(base, tuned, densities=[0.2])
    whole = Oracle(base, tuned, list(SHAPES), False)
    check(found.whole, whole, whole)
    assert Analysis.from_json(found.to_json()) == found


def test_sampled_thresholds_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = family((torch.float32,))
    exact = pymerge.analyze(base, tuned, densities=DENSITIES, thresholds="exact")
    assert exact.facts.thresholds == "exact"
    assert exact.facts.passes > 1
    monkeypatch.setattr(passes, "_EXACT", 0)
    monkeypatch.setattr(passes, "SAMPLE", 1 << 14)
    found = pymerge.analyze(base, tuned, densities=DENSITIES)
    assert (found.facts.thresholds, found.facts.passes) == ("sampled", 1)
    for near, right in zip(found.whole.trimmed, exact.whole.trimmed, strict=True):
        for k in range(3):
            assert near.kept[k] == pytest.approx(right.kept[k], abs=0.04)
            assert near.threshold[k] == pytest.approx(right.threshold[k], rel=0.15)
    again = pymerge.analyze(base, tuned, densities=DENSITIES, thresholds="exact")
    assert again.whole == exact.whole
    assert pymerge.analyze(base, tuned, densities=()).facts.thresholds == "none"


def test_odd_models() -> None:
    """Equal models, models equal to the base, opposite ones; zeros are no signs."""
    base = torch.tensor([1.0, 2.0, -0.0, 4.0])
    up = torch.tensor([1.5, 2.0, 0.0, 3.0])
    found = pymerge.analyze(
        base, [base, up, up, 2 * base - up], names=["same", "a", "b", "minus"], densities=[0.5]
    )
    whole = found.whole
    assert whole.unchanged == (1.0, 0.5, 0.5, 0.5)
    assert whole.cosine[0] == (None, None, None, None)
    assert whole.norm_share == (None, 1.0, 1.0, 1.0)
    assert whole.cosine[1] == (None, 1.0, 1.0, -1.0)
    assert whole.equal[1] == (0.5, 1.0, 1.0, 0.5)
    assert whole.sign_conflict[1] == (None, 0.0, 0.0, 1.0)
    assert whole.l2_distance[1][2] == 0.0
    assert whole.trimmed[0].kept == (0.0, 0.5, 0.5, 0.5)
    assert whole.trimmed[0].overlap[0] == (None, None, None, None)
    assert whole.trimmed[0].kept_norm == (None, 1.0, 1.0, 1.0)
    # Two thirds of the signs agree at two coordinates of four: (2 / 6 + 1) / 2.
    assert whole.sign_agreement == pytest.approx(2 / 3)
    assert "same equals the base: its task vector is zero, and has no angles" in found.notes
    assert "a and b are equal" in found.notes


@pytest.mark.parametrize("size", [1e-140, 1e-30, 1e30, 1e140])
def test_sizes_at_which_squares_overflow(size: float) -> None:
    base = torch.zeros(3, dtype=torch.float64)
    tau = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64) * size
    found = pymerge.analyze(base, [tau, 2 * tau, -tau.flip(0)], densities=[0.5])
    assert found.whole.l2[0] == pytest.approx(5 * size)
    assert found.whole.cosine[0][1] == pytest.approx(1.0)
    assert found.whole.cosine[0][2] == pytest.approx(-16 / 25)
    single = pymerge.analyze(base.float(), [torch.full((3,), 1e30)], densities=[0.5])
    assert single.whole.l2[0] == pytest.approx(math.sqrt(3) * 1e30)
    assert single.whole.trimmed[0].kept_norm == (None,)
    assert Analysis.from_json(single.to_json()) == single


def test_json_round_trip_and_versions() -> None:
    base, tuned = family((torch.bfloat16,))
    found = pymerge.analyze(base, tuned, spectra=True, rank=3)
    text = found.to_json()
    assert Analysis.from_json(text) == found
    assert json.loads(text)["schema_version"] == 1
    for damaged, message in (
        (text.replace('"schema_version": 1', '"schema_version": 7'), "expected schema_version 1"),
        (text.replace('"whole"', '"hole"', 1), "expected the fields"),
        ("[1]", "expected an object, got list"),
        ("{", "not JSON"),
    ):
        with pytest.raises(pymerge.RequestError, match=message):
            Analysis.from_json(damaged)


def test_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (20, 9)
    base = {"w": torch.zeros(shape), "b": torch.zeros(7)}
    deltas = [torch.randn(shape, generator=generator), torch.zeros(shape)]
    low = torch.randn(20, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    deltas.append(low)
    found = pymerge.analyze(base, [{"w": d, "b": base["b"]} for d in deltas], spectra=True, rank=4)
    (own,) = found.spectra
    assert (own.tensor, own.shape, own.rank) == ("w", shape, 4)
    parts = [np.linalg.svd(delta.double().numpy(), full_matrices=False) for delta in deltas]
    values = [part[1] for part in parts]
    for k in (0, 2):
        shares = values[k][values[k] > 1e-12] / values[k].sum()
        close(own.effective_rank[k], math.exp(-(shares * np.log(shares)).sum()))
        close(own.stable_rank[k], (values[k] ** 2).sum() / values[k][0] ** 2)
        close(own.energy[k], (values[k][:4] ** 2).sum() / (values[k] ** 2).sum())
    close(own.top_singular_values[0], values[0][:4])
    assert own.effective_rank[1] is own.stable_rank[1] is own.energy[1] is None
    left, right = [parts[0][0][:, :4], parts[2][0][:, :2]], [parts[0][2][:4].T, parts[2][2][:2].T]
    close(own.left_overlap[0][2], (left[0].T @ left[1]).__pow__(2).sum() / 2)
    close(own.right_overlap[0][2], (right[0].T @ right[1]).__pow__(2).sum() / 2)
    assert own.left_overlap[0][1] is None
    u, v = np.concatenate(left, axis=1), np.concatenate(right, axis=1)
    s = np.diag(np.concatenate([values[0][:4], values[2][:2]]))
    eye = np.eye(6)
    close(own.interference, np.abs((u.T @ u - eye) @ s @ (v.T @ v - eye)).sum())


def test_names_and_places() -> None:
    names = ["encoder.block.2.layer.0.q.weight", "decoder.block.2.layer.1.q.weight", "shared"]
    found = places(names)
    assert [place.layer for place in found.values()] == ["encoder.block.2", "decoder.block.2", None]
    assert [place.module_type for place in found.values()] == ["layer.*.q", "layer.*.q", "shared"]
    assert places(["0.weight", "1.bias"])["1.bias"].layer == "1"
    assert sorted(["10", "other", "2", "b.1", "a.3"], key=layer_order) == [
        "2",
        "10",
        "a.3",
        "b.1",
        "other",
    ]
