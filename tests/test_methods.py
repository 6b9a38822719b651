"""The methods beyond the basic three: against plain arithmetic, from files, and at their edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge.merging.tensors import MemorySink
from pymerge.methods import METHODS
from pymerge.methods.directions.passes import karcher_weights, multislerp_weights, slerp_weights
from pymerge.ops.masks import keep_limit, mask_hash, seed_words, words_at
from pymerge.ops.reference.sparse import mask_hash as torch_hash
from tests import models
from tests.conftest import BACKEND_IDS

# What each method needs beside models to run.
REQUIRED: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {"semantics": "exact"},  # the one that has kernels
}
DENSE = {"dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"}
BASIC = ("linear", "task_arithmetic", "ties")
# Those that need files or data have tests of their own.
NEW = [
    name
    for name, spec in METHODS.items()
    if name not in BASIC and name not in models.NEED_FILES and spec.statistics is None
]


def number_of_models(name: str) -> int:
    return min(METHODS[name].max_models or 3, 3)


def parameters_of(name: str) -> dict[str, Any]:
    parameters = dict(REQUIRED.get(name, {}))
    if name in DENSE:
        parameters["density"] = 0.6
    if name.startswith("della"):
        parameters["epsilon"] = 0.1
    return parameters


@pytest.mark.parametrize("name", NEW)
def test_files_and_tensors_give_the_same(name: str, tmp_path: Path) -> None:
    """And neither shards, nor memory, nor threads change a byte."""
    count = number_of_models(name)
    base, tuned = models.llama(count, torch.float32)
    for root, files in ((tmp_path / "one", 1), (tmp_path / "many", 4)):
        models.save_family(root, base, tuned, files=files)
    parameters = parameters_of(name)
    spec = METHODS[name]
    yaml = {**spec.yaml_defaults, **parameters}
    origin = base if spec.needs_base else None
    expected = pymerge.merge(name, origin, tuned, **yaml)
    for root, options in (("one", {}), ("many", {"memory": "300MiB", "threads": 3})):
        config = models.config(tmp_path / root, name, count, **parameters)
        if not spec.needs_base:
            config.pop("base_model", None)
        out = tmp_path / f"out-{root}"
        report = pymerge.merge_checkpoints(config, out, shard_size="1GB", **options)
        assert report.method == name
        merged = load_file(out / "model.safetensors")
        assert merged.keys() == expected.keys()
        for key, tensor in merged.items():
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    "density", [0.05, 0.3, 1.0, 0.0, [0.5, 0.1, 1.0], [0.0, 0.2, 1e-9]], ids=str
)
@pytest.mark.parametrize("levels", [0, 3])
def test_localize_and_stitch_is_that_of_the_paper(density: Any, levels: int) -> None:
    """Compares with sorting; levels: few magnitudes, so that ties must be broken."""
    generator = torch.Generator().manual_seed(levels)
    shapes = {"b": (301, 257), "a": (40,), "c.10": (3, 5), "c.9": (7,), "e": (0, 4)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = []
    for _ in range(3):
        deltas = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if levels:
            base = {name: tensor.round() for name, tensor in base.items()}
            deltas = {name: delta.mul(levels).round() for name, delta in deltas.items()}
        tuned.append({name: base[name] + deltas[name] for name in base})
    flat = torch.cat([base[name].flatten() for name in sorted(base)])
    total, count = torch.zeros_like(flat), torch.zeros_like(flat)
    for k, model in enumerate(tuned):
        delta = torch.cat([model[name].flatten() for name in sorted(base)]) - flat
        share = density[k] if isinstance(density, list) else density
        kept = delta.abs().argsort(descending=True, stable=True)[: int(share * len(flat))]
        total[kept] += delta[kept]
        count[kept] += 1
    expected = flat + total / count.clamp(min=1)
    merged = pymerge.localize_and_stitch(base, tuned, density=density)
    assert torch.equal(torch.cat([merged[name].flatten() for name in sorted(base)]), expected)


def test_localize_and_stitch_over_tensors_of_different_dtypes() -> None:
    """All are computed in float64 if one is of it; each result is rounded to its dtype."""
    generator = torch.Generator().manual_seed(5)
    names = {"a": torch.float32, "b": torch.float64}
    base, *tuned = (
        {
            name: torch.randn(500, generator=generator, dtype=torch.float64).to(dtype)
            for name, dtype in names.items()
        }
        for _ in range(4)
    )
    merged = pymerge.localize_and_stitch(base, tuned, density=0.3)
    base, *tuned = ({n: t.double() for n, t in state.items()} for state in (base, *tuned))
    expected = pymerge.localize_and_stitch(base, tuned, density=0.3)
    for name, dtype in names.items():
        assert torch.equal(merged[name], expected[name].to(dtype)), name


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_medians(count: int, identifier: str, use_backend: Callable[[str], str]) -> None:
    """Of models or of task vectors, of an even number the mean of the middle two."""
    how: dict[str, Any] = {"scale": 0.5, "backend": use_backend(identifier)}
    rows = np.random.default_rng(count).integers(-64, 64, (count + 1, 99)) / 8
    base, *tuned = torch.from_numpy(rows).float()
    middle = torch.from_numpy(np.median(rows[1:], axis=0)).float()
    assert torch.equal(pymerge.median(tuned, **how), middle / 2)
    assert torch.equal(pymerge.median(tuned, base=base, **how), base + (middle - base) / 2)
    tuned[0][5] = math.nan
    merged = pymerge.median(tuned, nan="keep", **how)
    assert merged.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("sce", {"select_topk": 0.3, "mask": "weights"}),
        ("sce", {"select_topk": 0.3, "mask": "everywhere"}),
        ("dare_ties", {"density": 0.5, "rescale": "inv_keep", "trim": 0.2}),
        (
            "dare_ties",
            {"density": 0.5, "rescale": "inv_keep", "trim": 0.2, "trim_scope": "global"},
        ),
        ("localize_and_stitch", {"density": 0.3}),
        ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1, "scope": "row"}),
        ("della", {"density": 0.5, "epsilon": 0.1, "rescale": "l1"}),
        ("della_linear", {"density": 0.5, "epsilon": 0.1, "rescale": "per_element"}),
        ("model_stock", {"filter_wise": True}),
        ("emr", {"task": 1}),
        ("tall_masks", {"task": 2, "threshold": 0.3}),
        ("ramplus_tl", {"epsilon": 1e-3, "r": 0.5, "alpha": 0.5}),
        ("pcb", {"variant": "vision_es", "scope": "tensor"}),
    ],
    ids=str,
)
def test_ways_of_a_method_from_files(
    method: str, parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files give what tensors give; pieces may end anywhere in a row."""
    base, tuned = models.llama(3, torch.float32)
    models.save_family(tmp_path, base, tuned, files=3)
    expected = pymerge.merge(method, base, tuned, **parameters)
    config = models.config(tmp_path, method, 3, **parameters)
    report = pymerge.merge_checkpoints(config, tmp_path / "out", threads=2)
    assert report.method == method
    merged = load_file(tmp_path / "out" / "model.safetensors")
    monkeypatch.setattr(MemorySink, "pieces", in_small_pieces)
    pieced = pymerge.merge(method, base, tuned, **parameters)
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor), key
        assert torch.equal(pieced[key], tensor), key


def in_small_pieces(self: MemorySink, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    flat = self.tensors[name].view(-1)
    for start in range(0, flat.numel(), 1009):
        yield start, flat[start : start + 1009]


@pytest.mark.parametrize("name", NEW)
def test_backends_give_the_same_bits(name: str) -> None:
    if "cpu" not in METHODS[name].backends:
        pytest.skip("runs on torch only")
    count = number_of_models(name)
    base, tuned = models.llama(count)
    origin = base if METHODS[name].needs_base else None
    first = pymerge.merge(name, origin, tuned, backend="reference", **parameters_of(name))
    again = pymerge.merge(name, origin, tuned, backend="cpu", **parameters_of(name))
    for key in first:
        assert torch.equal(first[key], again[key]), key


@pytest.mark.parametrize("name", NEW)
def test_models_that_equal_the_base_change_nothing(name: str) -> None:
    base = torch.linspace(-1, 1, 300).reshape(15, 20)
    count = number_of_models(name)
    origin = base if METHODS[name].needs_base else None
    merged = pymerge.merge(name, origin, [base.clone()] * count, **parameters_of(name))
    torch.testing.assert_close(merged, base, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (5, 1), (0, 4), (3, 0)], ids=str)
def test_shapes_at_the_edge(name: str, shape: tuple[int, ...]) -> None:
    base = torch.full(shape, 0.5)
    count = number_of_models(name)
    tuned = [base + 0.125 * (k + 1) for k in range(count)]
    origin = base if METHODS[name].needs_base else None
    merged = pymerge.merge(name, origin, tuned, **parameters_of(name))
    assert merged.shape == base.shape
    assert bool(merged.isfinite().all())


@pytest.mark.parametrize("name", NEW)
def test_nan_is_an_error_that_names_it(name: str) -> None:
    base = torch.ones(4, 30)
    count = number_of_models(name)
    tuned = [base + 0.25 for _ in range(count)]
    tuned[-1][2, 5] = math.nan
    origin = base if METHODS[name].needs_base else None
    with pytest.raises(pymerge.NonFiniteError, match=rf"models\[{count - 1}\].*index 65"):
        pymerge.merge(name, origin, tuned, **parameters_of(name))


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_dare(identifier: str, use_backend: Callable[[str], str]) -> None:
    """What is kept is the delta times 1 / density, at the elements whose hash is small."""
    backend = use_backend(identifier)
    base = torch.zeros(100_003)
    tuned = torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    merged = pymerge.dare_linear({"w": base}, [{"w": tuned}], density=0.25, seed=7, backend=backend)
    first, second = seed_words(7, "w", 1)
    index = np.arange(base.numel(), dtype=np.uint32)
    kept = torch.from_numpy(mask_hash(index, first, second) <= np.uint32(keep_limit(0.25)))
    assert torch.equal(merged["w"], torch.where(kept, 4.0 * tuned, torch.zeros(())))
    assert abs(float(kept.float().mean()) - 0.25) < 0.01


def test_masks_of_models_tensors_and_seeds_are_independent() -> None:
    index = np.arange(1 << 18, dtype=np.uint32)
    drawn = {}
    for seed in (0, 1):
        for name in ("a", "b"):
            words = seed_words(seed, name, 2)
            for model in range(2):
                drawn[seed, name, model] = (
                    mask_hash(index, *words[2 * model : 2 * model + 2]) < 2**31
                )
    every = list(drawn.values())
    for i, first in enumerate(every):
        assert abs(first.mean() - 0.5) < 0.005
        assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.005
        for second in every[i + 1 :]:
            assert abs((first == second).mean() - 0.5) < 0.005
            assert abs((first[1:] == second[:-1]).mean() - 0.5) < 0.005


def test_the_hash_is_the_same_everywhere_and_goes_on_beyond_32_bits() -> None:
    index = np.array([0, 1, 77, 2**31, 2**32 - 1], dtype=np.uint32)
    mine = mask_hash(index, 123456789, 4000000000)
    other = torch_hash(torch.from_numpy(index.astype(np.int64)), 123456789, 4000000000)
    assert mine.tolist() == other.tolist()
    words = seed_words(0, "w", 1)
    assert words_at(words, 5) == words
    assert words_at(words, 2**32) == words_at(words, 2**33 - 1) != words


def test_densities_0_and_1() -> None:
    base, tuned = torch.zeros(1000), torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pymerge.dare_linear(base, [tuned], density=0.0), base)
    for rescale in ("inv_keep", "l1", "none"):
        assert torch.equal(pymerge.dare_linear(base, [tuned], density=1.0, rescale=rescale), tuned)
    assert torch.equal(pymerge.breadcrumbs(base, [tuned], density=1.0), tuned)
    assert torch.equal(pymerge.breadcrumbs(base, [tuned], density=0.0, gamma=0.5), base)


def test_rescaling_to_the_l1_norm() -> None:
    base, tuned = (
        torch.zeros(50_000),
        torch.randn(50_000, generator=torch.Generator().manual_seed(2)),
    )
    merged = pymerge.dare_linear(base, [tuned], density=0.3, rescale="l1")
    norms = merged.double().abs().sum(), tuned.double().abs().sum()
    assert abs(float(norms[0] / norms[1]) - 1) < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_breadcrumbs_keeps_a_band(seed: int) -> None:
    """Also where magnitudes are equal: those of the lowest index count as the larger."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.randint(1, 200, (), generator=generator))
    delta = torch.randint(-5, 6, (numel,), generator=generator) / 4
    density, gamma = (float(x) for x in torch.rand(2, generator=generator))
    merged = pymerge.breadcrumbs(torch.zeros(numel), [delta], density=density, gamma=gamma)
    kept, top = int(density * numel), int(gamma * numel)
    bottom = max(0, numel - kept - top)
    order = sorted(range(numel), key=lambda i: (-abs(float(delta[i])), i))
    expected = torch.zeros(numel)
    for i in order[numel - bottom - kept : numel - bottom]:
        expected[i] = delta[i]
    assert torch.equal(merged, expected)


def test_slerp_and_kin_keep_norms_on_the_sphere() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True) * 3.0
    gram = (rows @ rows.T).numpy()
    a, b = slerp_weights(gram[:2, :2], 0.3, norm_floor=1e-8)
    assert abs(float((a * rows[0] + b * rows[1]).norm()) - 3.0) < 1e-9
    for weights in (
        karcher_weights(gram, 50, 1e-9),
        multislerp_weights(gram, [1.0, 2.0, 1.0, 0.5], True, 1e-12),
    ):
        merged = sum(w * row for w, row in zip(weights, rows, strict=True))
        assert abs(float(merged.norm()) - 3.0) < 1e-6
    scaled = rows * torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    weights = [0.4, 0.3, 0.2, 0.1]
    found = multislerp_weights((scaled @ scaled.T).numpy(), weights, True, 1e-12)
    merged = sum(w * row for w, row in zip(found, scaled, strict=True))
    assert abs(float(merged.norm()) - 3.0 * (0.4 + 0.6 + 0.6 + 0.4)) < 1e-6
    # The Karcher mean is where the log maps add up to nothing.
    mean = (
        sum(w * row for w, row in zip(karcher_weights(gram, 100, 1e-12), rows, strict=True)) / 3.0
    )
    tangent = torch.zeros(5000, dtype=torch.float64)
    for row in rows / 3.0:
        angle = torch.arccos(mean @ row)
        tangent += angle / torch.sin(angle) * (row - (mean @ row) * mean)
    assert float(tangent.norm()) < 1e-8


@pytest.mark.parametrize("seed", range(10))
def test_slerp_and_kin_of_opposite_vectors(seed: int) -> None:
    """No arc is the shortest: SLERP and NuSLERP are linear then, as in mergekit; so is MultiSLERP
    where the directions cancel, and the Karcher mean is the first direction."""
    v = torch.randn(3, 100 + seed, generator=torch.Generator().manual_seed(seed))
    v = (v * 256).round() / 256  # so that 1 + v is exact
    near = 1e-5 * torch.randn(v.shape, generator=torch.Generator().manual_seed(100 + seed))
    for t in (0.0, 0.25, 0.5, 0.9):
        for other in (-v, -2.0 * v, -v + near * v):
            expected = (1 - t) * v + t * other
            got = pymerge.slerp({"w": v}, {"w": other}, t=t)["w"]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        for flatten in (True, False):
            weights = [1 - t, t]
            got = pymerge.nuslerp([v, -v], weights=weights, flatten=flatten)
            torch.testing.assert_close(got, (1 - 2 * t) * v, rtol=0, atol=1e-5)
            got = pymerge.nuslerp([1 + v, 1 - v], base=v * 0 + 1, weights=weights, flatten=flatten)
            torch.testing.assert_close(got, 1 + (1 - 2 * t) * v, rtol=0, atol=1e-5)
    torch.testing.assert_close(pymerge.multislerp([v, -3 * v]), -v, rtol=0, atol=1e-5)
    torch.testing.assert_close(pymerge.multislerp([v, -v], weights=[3.0, 1.0]), v)
    torch.testing.assert_close(pymerge.karcher([v, -3 * v]), 2 * v)
    with pytest.raises(pymerge.RequestError, match="mean of the directions is 0"):
        pymerge.multislerp([v, -v, v, -v])


def test_consensus_and_tall_masks() -> None:
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(500, generator=generator)
    tuned = [base + torch.randn(500, generator=generator) for _ in range(3)]
    total = sum(model - base for model in tuned)
    merged = base + 0.3 * total
    masks = [(model - base).abs() > 0.4 * (merged - model).abs() for model in tuned]
    count = torch.stack(masks).sum(dim=0)
    expected = torch.where(count >= 2, merged, base)
    torch.testing.assert_close(pymerge.consensus_ta(base, tuned), expected)
    own = torch.where(masks[1], merged, base)
    torch.testing.assert_close(pymerge.tall_masks(base, tuned, task=1), own)


def test_emr_rebuilds_a_task() -> None:
    generator = torch.Generator().manual_seed(5)
    base = {"w": torch.zeros(40, 50), "v": torch.zeros(7)}
    tuned = [
        {name: torch.randn(t.shape, generator=generator) for name, t in base.items()}
        for _ in range(2)
    ]
    unified = pymerge.emr(base, tuned)
    for name in base:
        total = tuned[0][name] + tuned[1][name]
        sign = torch.where(total > 0, 1.0, -1.0)
        largest = torch.stack([(m[name] * sign).clamp(min=0) for m in tuned]).amax(dim=0)
        assert torch.equal(unified[name], sign * largest)
    one = pymerge.emr(base, tuned, task=0)
    means = [sum(float(m[name].abs().mean()) for name in base) for m in (tuned[0], one)]
    assert abs(means[0] / means[1] - 1) < 1e-5
    with pytest.raises(pymerge.RequestError, match="0 to 1; got 2"):
        pymerge.emr(base, tuned, task=2)


def test_tsv_m_of_one_low_rank_task_is_that_task() -> None:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(20, 30, generator=generator)
    delta = torch.randn(20, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    torch.testing.assert_close(pymerge.tsv_m(base, [base + delta]), base + delta, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, m: pymerge.slerp(b, [m], t=0.5), "expected a tensor"),
        (lambda b, m: pymerge.merge("slerp", b, [m]), "t: is required"),
        (lambda b, m: pymerge.merge("slerp", b, [m, m], t=0.5), "takes at most 1"),
        (lambda b, m: pymerge.model_stock(b, [m]), "at least 2"),
        (lambda b, m: pymerge.dare_linear(b, [m], density=1.5), r"in \[0, 1\]"),
        (lambda b, m: pymerge.dare_linear(b, [m], rescale="l2"), "one of 'inv_keep'"),
        (lambda b, m: pymerge.della(b, [m], density=0.05, epsilon=0.1), "must lie in"),
        (lambda b, m: pymerge.pcb_merge(b, [m], variant="papr"), "did you mean 'paper'"),
        (lambda b, m: pymerge.multislerp([m, m], weights=[1, -1]), "sum to 0"),
        (lambda b, m: pymerge.dare_linear(b, [m, m], weights=[1, -1], normalize=True), "sum to 0"),
        (lambda b, m: pymerge.merge("magmax", b, [m], weights=2.0), "weights: magmax takes none"),
        (lambda b, m: pymerge.merge("tsv_m", b, [m], backend="cpu"), "has no kernels for tsv_m"),
    ],
)
def test_bad_requests(call: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(pymerge.RequestError, match=message):
        call(torch.zeros(3), torch.ones(3))


def test_the_karcher_mean_of_small_tensors_is_not_zero() -> None:
    small = torch.full((4,), 1e-6)
    torch.testing.assert_close(pymerge.karcher([small]), small, rtol=1e-6, atol=0)
    torch.testing.assert_close(pymerge.karcher([small, 3 * small]), 2 * small, rtol=1e-6, atol=0)
    assert torch.equal(pymerge.karcher([0 * small, 0 * small]), 0 * small)
    half = pymerge.karcher([small, 0 * small])  # no direction, but a norm, which is averaged too
    torch.testing.assert_close(half, small / 2, rtol=1e-6, atol=0)


def test_what_one_model_alone_changed_is_scaled_within_bounds() -> None:
    """RAM+: by 1 + r clip(shared / alone, 0, alpha), of each model."""
    base = torch.zeros(12)
    first, second = base.clone(), base.clone()
    first[:8], second[6:10] = 1.0, 3.0
    merged = pymerge.ramplus_tl(base, [first, second], r=0.5, alpha=0.4)
    # The first changed six alone and two with the second, which changed two alone.
    expected = [1 + 0.5 * (2 / 6)] * 6 + [2.0] * 2 + [3 * (1 + 0.5 * 0.4)] * 2 + [0.0] * 2
    torch.testing.assert_close(merged, torch.tensor(expected))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keep_lets_what_is_not_finite_through(name: str, value: float) -> None:
    """It stays where it is, but in methods whose weights are sums over the whole tensor."""
    generator = torch.Generator().manual_seed(8)
    base = torch.randn(20, 30, generator=generator)
    count = number_of_models(name)
    tuned = [base + torch.randn(20, 30, generator=generator) * 0.01 for _ in range(count)]
    tuned[-1][3, 4] = value
    origin = base if METHODS[name].needs_base else None
    if METHODS[name].run.startswith("pymerge.methods.matrices."):
        with pytest.raises(pymerge.RequestError, match="no singular vectors"):
            pymerge.merge(name, origin, tuned, nan="keep")
        return
    merged = pymerge.merge(name, origin, tuned, nan="keep", **parameters_of(name))
    wrong = ~merged.isfinite()
    wrong[3, 4] = False
    assert not bool(wrong.any()) or name == "sce"
