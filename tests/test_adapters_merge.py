"""Arithmetic on adapters and merges of adapters, against dense matrices in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pymerge
from pymerge.adapters import Adapter, add, analogy, load, merge_adapters, negate, scale
from pymerge.adapters.config import run_merge_adapters
from pymerge.checkpoint.peft.build import ia3, lora
from pymerge.commands.main import main
from pymerge.errors import RequestError
from tests import models
from tests.adapter_files import PREFIX, exact, factors, save_adapter, save_lora

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting

SHAPES = {"h.0.q": (12, 20), "h.0.k": (16, 20), "h.1.q": (12, 20)}
WEIGHTS = [0.7, -1.3]


@pytest.fixture
def two(tmp_path: Path) -> list[Adapter]:
    """Two rsLoRA adapters of different ranks, which differ in a module."""
    one = factors(SHAPES, 4, seed=1)
    other = factors({name: SHAPES[name] for name in ("h.0.q", "h.0.k")}, 3, seed=2)
    save_lora(tmp_path / "a", one, use_rslora=True, lora_alpha=6, alpha_pattern={"k": 2})
    save_lora(tmp_path / "b", other, r=3)
    return [load(tmp_path / name) for name in "ab"]


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the deltas in float64, zero where the adapter has no module."""
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, module in adapter.modules.items():
        b, a = (torch.from_numpy(factor) for factor in adapter.factors(name))
        found[name] = exact(b, a, module.scaling)
    return found


def assert_deltas(got: Adapter, expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert sorted(got.modules) == sorted(expected)
    for name, delta in expected.items():
        error = (got.delta_weight(name).double() - delta).norm()
        assert float(error) <= tolerance * float(delta.norm()), name


def combined(adapters: list[Adapter], weights: list[float]) -> dict[str, torch.Tensor]:
    parts = [dense(adapter) for adapter in adapters]
    return {
        name: sum((w * part[name] for w, part in zip(weights, parts, strict=True)))  # type: ignore[misc]
        for name in SHAPES
    }


# Arithmetic


def test_addition(two: list[Adapter]) -> None:
    assert_deltas(add(two), combined(two, [0.5, 0.5]))
    summed = add(two, WEIGHTS)
    assert_deltas(summed, combined(two, WEIGHTS))
    assert [module.rank for module in summed.modules.values()] == [7, 7, 4]


def test_negation_and_scaling(two: list[Adapter]) -> None:
    first = dense(two[0])
    assert_deltas(negate(two[0]), {name: -delta for name, delta in first.items()})
    assert_deltas(negate(two[0], 0.3), {name: -0.3 * delta for name, delta in first.items()})
    assert_deltas(scale(two[0], 2.5), {name: 2.5 * delta for name, delta in first.items()})
    nothing = add([two[0], negate(two[0])], [1, 1])
    assert all(np.abs(nothing.delta(name)).max() < 1e-6 for name in SHAPES)


def test_analogy(two: list[Adapter]) -> None:
    one, other = two
    expected = combined([one, other, one], [0.5, 0.25, -0.25])
    assert_deltas(analogy(one, other, one, (0.5, 0.25)), expected)


def test_pem_mixes_factors() -> None:
    pairs = [factors({"q": (6, 5)}, 2, seed=k) for k in range(3)]
    made = [lora({name: (b.numpy(), a.numpy()) for name, (b, a) in one.items()}) for one in pairs]
    b, a = zip(*(one["q"] for one in pairs), strict=True)
    mean = ((3 * b[0] + b[1]) / 4) @ ((3 * a[0] + a[1]) / 4)
    assert_deltas(add(made[:2], [3, 1], semantics="pem"), {"q": mean.double()})
    c0, c1 = 0.5, 0.25
    mixed = (c0 * b[0] + c1 * b[1] - c1 * b[2]) @ (c0 * a[0] + c1 * a[1] + c1 * a[2])
    got = analogy(*made, (c0, c1), semantics="pem")
    assert_deltas(got, {"q": mixed.double()})
    with pytest.raises(RequestError, match="needs the same rank and scaling"):
        add([made[0], scale(add(made[:2]), 2.0)], semantics="pem")


def ia3_pair(tmp_path: Path) -> list[Adapter]:
    adapters = []
    for number, names in enumerate((("k", "down"), ("k",))):
        generator = torch.Generator().manual_seed(number)
        tensors = {f"{PREFIX}k.ia3_l": 1 + 0.1 * torch.randn(6, 1, generator=generator)}
        if "down" in names:
            tensors[f"{PREFIX}down.ia3_l"] = 1 + 0.1 * torch.randn(1, 5, generator=generator)
        path = tmp_path / f"ia3_{number}"
        save_adapter(path, tensors, peft_type="IA3", feedforward_modules=["down"])
        adapters.append(load(path))
    return adapters


def test_ia3(tmp_path: Path) -> None:
    one, other = ia3_pair(tmp_path)
    k, k2, down = one.vector("k"), other.vector("k"), one.vector("down")

    def close(got: Adapter, of_k: np.ndarray, of_down: np.ndarray) -> None:
        np.testing.assert_allclose(got.vector("k"), of_k, rtol=1e-6)
        np.testing.assert_allclose(got.vector("down"), of_down, rtol=1e-6)

    close(negate(one), 2 - k, 2 - down)
    close(negate(one, 0.4), 1.4 - 0.4 * k, 1.4 - 0.4 * down)
    close(scale(one, 3.0), 1 + 3 * (k - 1), 1 + 3 * (down - 1))
    close(add([one, other]), (k + k2) / 2, (down + 1) / 2)
    close(add([one, other], [2, 6], semantics="pem"), (k + 3 * k2) / 4, (down + 3) / 4)
    close(analogy(one, other, one), 0.5 + 0.5 * k + 0.5 * (k2 - k), np.ones_like(down))
    close(merge_adapters([one, other], "peft_linear", weights=[2, 3]), 2 * k + 3 * k2, 2 * down + 3)
    close(
        merge_adapters([one, other], "peft_linear", weights=[2, -3]), 2 * k - 3 * k2, 2 * down - 3
    )
    merged = merge_adapters([one, other], "ties", density=1.0, semantics="mergekit")
    vectors = [torch.from_numpy(v) for v in (k, k2)]
    expected = pymerge.ties_merge(torch.ones(6, 1), vectors, density=1.0, semantics="mergekit")
    np.testing.assert_array_equal(merged.vector("k"), expected.numpy())
    vectors = [torch.from_numpy(down), torch.ones(1, 5)]  # what the other lacks changes nothing
    expected = pymerge.ties_merge(torch.ones(1, 5), vectors, density=1.0, semantics="mergekit")
    np.testing.assert_array_equal(merged.vector("down"), expected.numpy())
    merged.save(tmp_path / "out")
    np.testing.assert_array_equal(load(tmp_path / "out").vector("down"), merged.vector("down"))
    with pytest.raises(RequestError, match="svd is for LoRA, got IA3"):
        merge_adapters([one, other], "svd")
    with pytest.raises(RequestError, match="expected adapters of one type"):
        add([one, lora({"k": (np.ones((6, 1)), np.ones((1, 5)))})])
    assert ia3({"k": k}, one).peft_type == "IA3"


# Exact merges


def test_cat_and_svd_are_exact(two: list[Adapter]) -> None:
    expected = combined(two, WEIGHTS)
    cat = merge_adapters(two, "cat", weights=WEIGHTS)
    assert_deltas(cat, expected)
    assert cat.rank == 7
    svd = merge_adapters(two, "svd", weights=WEIGHTS, rank=7)
    assert_deltas(svd, expected)
    assert [module.rank for module in svd.modules.values()] == [7, 7, 4]
    assert all(share == pytest.approx(1) for share in svd.captured.values())


def test_svd_cuts_to_the_best_of_a_rank(two: list[Adapter]) -> None:
    expected = combined(two, WEIGHTS)
    for rank in (None, 2):
        merged = merge_adapters(two, "svd", weights=WEIGHTS, rank=rank)
        cut: dict[str, torch.Tensor] = {}
        for name, delta in expected.items():
            u, s, vh = torch.linalg.svd(delta)
            kept = rank or 4
            cut[name] = u[:, :kept] @ torch.diag(s[:kept]) @ vh[:kept]
            share = float((s[:kept] ** 2).sum() / (s**2).sum())
            assert merged.captured[name] == pytest.approx(share, abs=1e-7)  # factors are float32
        assert_deltas(merged, cut)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy(two: list[Adapter], energy: float) -> None:
    merged = merge_adapters(two, "svd", energy=energy)
    for name, delta in combined(two, [1, 1]).items():
        squares = torch.linalg.svdvals(delta) ** 2
        shares = torch.cumsum(squares, 0) / squares.sum()
        rank = int((shares < energy * (1 - 1e-9)).sum()) + 1
        assert merged.modules[name].rank == rank
        assert merged.captured[name] == pytest.approx(float(shares[rank - 1]))


# PEFT's combinations

# Those that a single adapter passes through as it is.
PLAIN: dict[str, dict[str, Any]] = {
    "peft_linear": {},
    "peft_ties": {"density": 1.0},
    "peft_dare_linear": {"density": 1.0},
    "peft_dare_ties": {"density": 1.0},
    "peft_magnitude_prune": {"density": 1.0},
    "peft_ties_svd": {"density": 1.0},
    "peft_dare_linear_svd": {"density": 1.0},
    "peft_dare_ties_svd": {"density": 1.0},
    "peft_magnitude_prune_svd": {"density": 1.0},
    "peft_cat": {},
    "peft_svd": {},
}


@pytest.mark.parametrize("weight", [-1.7, -1.0, 0.6])
@pytest.mark.parametrize("method", PLAIN)
def test_one_adapter_with_a_weight(two: list[Adapter], method: str, weight: float) -> None:
    """A negative weight negates the delta; it stands once in the product of the factors."""
    expected = {name: weight * delta for name, delta in dense(two[0]).items()}
    assert_deltas(merge_adapters(two[:1], method, weights=[weight], **PLAIN[method]), expected)


@pytest.mark.parametrize("weights", [[0.7, -1.3], [-0.7, 1.3], [-0.7, -1.3]])
def test_peft_linear_with_negative_weights(weights: list[float], tmp_path: Path) -> None:
    """PEFT weighs both factors with sqrt(|w s|), and A with the sign too: a scaling may be
    negative as well."""
    pairs = [factors(SHAPES, 4, seed=seed) for seed in (1, 2)]
    for name, pair, alpha in zip("ab", pairs, (8, -6), strict=True):
        save_lora(tmp_path / name, pair, lora_alpha=alpha)
    own = [weights[0] * 8 / 4, weights[1] * -6 / 4]
    expected = {}
    for name in SHAPES:
        b = sum(abs(w) ** 0.5 * pair[name][0].double() for w, pair in zip(own, pairs, strict=True))
        a = sum(
            (1 if w > 0 else -1) * abs(w) ** 0.5 * pair[name][1].double()
            for w, pair in zip(own, pairs, strict=True)
        )
        expected[name] = b @ a  # type: ignore[operator]
    paths = [tmp_path / name for name in "ab"]
    assert_deltas(merge_adapters(paths, "peft_linear", weights=weights), expected)


# Merge methods on deltas

METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "pcb": {"ratio": 0.2},
    "dare_linear": {"density": 0.5, "seed": 5},
    "dare_ties": {"density": 0.5, "trim": 0.4, "trim_scope": "global"},
    "breadcrumbs": {"density": 0.8, "gamma": 0.1},
    "della": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "consensus_ta": {},
    "magmax": {},
    "task_arithmetic": {"scale": 0.4},
    "linear": {},
    "tsv_m": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods(two: list[Adapter], method: str) -> None:
    """What the method makes of the deltas as tensors: thresholds over the model, masks by name."""
    parameters = METHODS[method]
    states = [
        {
            f"{name}.weight": adapter.delta_weight(name)
            if name in adapter.modules
            else torch.zeros(shape)
            for name, shape in SHAPES.items()
        }
        for adapter in two
    ]
    zero = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    base = None if method == "linear" else zero
    expected = pymerge.merge(method, base, states, **parameters)
    got = merge_adapters(two, method, rank=20, **parameters)
    assert_deltas(got, {name: expected[f"{name}.weight"].double() for name in SHAPES}, 2e-6)


def test_a_merge_is_cut_to_a_rank(two: list[Adapter]) -> None:
    whole = merge_adapters(two, "ties", density=0.3, rank=20)
    assert merge_adapters(two, "ties", density=0.3).rank == 7  # the sum of the ranks
    cut = merge_adapters(two, "ties", density=0.3, rank=3)
    for name in SHAPES:
        s = torch.linalg.svdvals(whole.delta_weight(name).double())
        rest = (cut.delta_weight(name) - whole.delta_weight(name)).double().norm()
        assert float(rest) == pytest.approx(float(s[3:].norm()), rel=1e-4)
        assert cut.captured[name] == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), 1e-6)
    energetic = merge_adapters(two, "ties", density=0.3, energy=0.8)
    assert all(share >= 0.8 for share in energetic.captured.values())


def test_zero_votes_take_the_sign_of_all_deltas() -> None:
    """The sign is counted first: no sample of so few elements makes it plain."""
    ones = np.ones((4, 1))
    row = np.array([[1.0, 2.0, -3.0, 0.5, 1.0, 2.0]])
    made = [lora({"q": (ones, row)}), lora({"q": (ones, -row)}), lora({"q": (ones, row / 8)})]
    states = [adapter.delta_weight("q") for adapter in made]
    expected = pymerge.ties_merge(torch.zeros(4, 6), states, density=1.0)
    assert_deltas(merge_adapters(made, "ties", density=1.0), {"q": expected.double()})


@pytest.mark.parametrize("method", ["svd", "ties", "peft_ties_svd"])
def test_bytes_do_not_depend_on_threads(two: list[Adapter], method: str, tmp_path: Path) -> None:
    parameters = {"density": 0.5} if "ties" in method else {}
    threads = torch.get_num_threads()
    contents = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            merge_adapters(two, method, rank=2, **parameters).save(tmp_path / str(count))
            contents.append((tmp_path / str(count) / "adapter_model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert contents[0] == contents[1]


def test_whole_tensors(tmp_path: Path) -> None:
    paths = []
    for number, names in enumerate((("score", "norm"), ("norm",))):
        b, a = factors({"q": (6, 5)}, seed=number)["q"]
        tensors = {f"{PREFIX}q.lora_A.weight": a, f"{PREFIX}q.lora_B.weight": b}
        tensors |= {f"{PREFIX}{name}.weight": torch.full((3,), number + 0.5) for name in names}
        paths.append(save_adapter(tmp_path / f"w{number}", tensors, modules_to_save=list(names)))
    with pytest.raises(RequestError, match=r"several adapters have 'norm.weight' in whole"):
        merge_adapters(paths, "cat")
    merged = merge_adapters(paths, "cat", saved="drop")
    merged.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert list(again.saved) == ["score.weight"]
    assert again.config["modules_to_save"] == ["score"]
    with pytest.raises(
        RequestError, match=r"has 'norm.weight' in whole .* whose delta is unknown without the base"
    ):
        negate(load(paths[0]))


# Configurations

CONFIG = """\
merge_method: ties
models:
  - model: {a}
    parameters: {{weight: 0.5, density: 0.4}}
  - model: {b}
    parameters:
      density: [{{filter: k, value: 0.9}}, {{value: 0.3}}]
parameters: {{normalize: false}}
rank: 5
dtype: bfloat16
"""


def test_a_configuration(two: list[Adapter], tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(CONFIG.format(a=tmp_path / "a", b=tmp_path / "b"))
    report = run_merge_adapters(tmp_path / "c.yml", tmp_path / "out")
    got = load(tmp_path / "out")
    assert report.ranks == [5, 5, 5]
    assert set(report.captured) == set(SHAPES)
    assert (tmp_path / "out" / "pymerge_adapters.json").is_file()
    for name in SHAPES:
        deltas = [
            adapter.delta_weight(name) if name in adapter.modules else torch.zeros(SHAPES[name])
            for adapter in two
        ]
        dense_ = pymerge.ties_merge(
            torch.zeros(SHAPES[name]),
            deltas,
            weights=[0.5, 1.0],
            density=[0.4, 0.9 if "k" in name else 0.3],
            semantics="mergekit",
            normalize=False,
        )
        u, s, vh = torch.linalg.svd(dense_.double())
        best = u[:, :5] @ torch.diag(s[:5]) @ vh[:5]
        assert float((got.delta_weight(name) - best).norm()) < 0.01 * float(best.norm())  # bf16


def test_the_command(two: list[Adapter], tmp_path: Path, capsys: Any) -> None:
    text = (
        f"merge_method: peft_ties\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/a, "
        "parameters: {weight: 2}}]\nparameters: {density: 0.5, weight: 0.5}\n"
    )
    (tmp_path / "c.yml").write_text(text)
    assert main(["merge-adapters", str(tmp_path / "c.yml"), str(tmp_path / "out")]) == 0
    assert "peft_ties: 2 adapters, 3 modules, rank 4" in capsys.readouterr().out
    expected = merge_adapters([two[0], two[0]], "peft_ties", weights=[0.5, 2.0], density=0.5)
    got = load(tmp_path / "out")
    for name in SHAPES:
        assert torch.equal(got.delta_weight(name), expected.delta_weight(name))


BAD_CONFIGS: dict[str, tuple[str, str]] = {
    "method": ("merge_method: tise\nmodels: []\n", "c.yml:1: merge_method: unknown method 'tise'"),
    "no method": ("models: []\n", "'merge_method' is missing"),
    "statistics": ("merge_method: fisher\nmodels: [{model: a}]\n", "fisher does not work on"),
    "parameter": (
        "merge_method: peft_ties\nmodels: [{model: a}]\nparameters: {densty: 1}\n",
        "c.yml:3: parameters.densty: unknown parameter 'densty' of method peft_ties; did you mean",
    ),
    "key": (
        "merge_method: svd\nmodels: [{model: a}]\nrnak: 1\n",
        "c.yml:3: rnak: unknown key 'rnak'; did you mean 'rank'?",
    ),
    "rank": (
        "merge_method: svd\nmodels: [{model: a}]\nrank: 0\n",
        "rank: expected an integer >= 1",
    ),
    "both": (
        "merge_method: ties\nmodels: [{model: a}]\nrank: 1\nenergy: 0.5\n",
        "expected a rank or an energy, got both",
    ),
    "rank of cat": ("merge_method: cat\nmodels: [{model: a}]\nrank: 2\n", "cat takes no rank"),
    "dtype": (
        "merge_method: svd\nmodels: [{model: a}]\ndtype: bf16\n",
        "c.yml:3: dtype: expected one of float32, bfloat16, float16, got 'bf16'",
    ),
    "models": ("merge_method: svd\nmodels: a\n", "c.yml:2: models: expected a list of adapters"),
    "model": ("merge_method: svd\nmodels: [a]\n", "c.yml:2: models[0]: expected {model: an"),
    "missing": ("merge_method: svd\nmodels: [{model: nowhere}]\n", "models[0] (nowhere): expected"),
    "missing, ties": ("merge_method: ties\nmodels: [{model: x}]\n", "models[0] (x): expected"),
    "weight": (
        "merge_method: ties\nmodels: [{model: a, parameters: {weight: x}}]\n",
        "c.yml:2: models[0].parameters.weight: expected a finite number, got 'x'",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(case: str, tmp_path: Path, monkeypatch: Any) -> None:
    text, expected = BAD_CONFIGS[case]
    save_lora(tmp_path / "a", factors({"q": (6, 5)}))
    (tmp_path / "c.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        run_merge_adapters("c.yml", "out")
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


# Onto the base


def onto(two: list[Adapter], tmp_path: Path, method: str, **parameters: Any) -> dict[str, Any]:
    """Write a base of Linear, Conv1D and other tensors; return a configuration."""
    generator = torch.Generator().manual_seed(9)
    base: dict[str, torch.Tensor] = {
        f"{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in SHAPES.items()
    }
    base["h.0.k.weight"] = base["h.0.k.weight"].T.contiguous()
    base |= {"a.norm": torch.randn(7, generator=generator), "z.ids": torch.arange(5)}
    base["i.weight"] = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    models.save(tmp_path / "base", base, files=2)
    entries = [{"model": str(tmp_path / name), "parameters": {"weight": 1.5}} for name in "ab"]
    return {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": entries,
        "parameters": parameters,
    }


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.4, "semantics": "official"}),
        ("dare_linear", {"density": 0.5}),
        ("pcb", {}),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_merge_onto_the_base_rounds_once(
    two: list[Adapter], method: str, parameters: dict[str, Any], threads: int, tmp_path: Path
) -> None:
    config = onto(two, tmp_path, method, **parameters)
    report = run_merge_adapters(config, tmp_path / "out", seed=3, threads=threads, shard_size=900)
    base, got = models.load(tmp_path / "base"), models.load(tmp_path / "out")
    names = {f"{name}.weight": name for name in SHAPES}
    states = [
        {
            weight: (
                adapter.delta_weight(name) if name in adapter.modules else torch.zeros(SHAPES[name])
            )
            for weight, name in names.items()
        }
        for adapter in two
    ]
    for state in states:  # thresholds, masks and orders are those of the base's orientation
        state["h.0.k.weight"] = state["h.0.k.weight"].T.contiguous()
    zero = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    drawn = {"seed": 3, "rescale": "l1"} if method.startswith("dare") else {}
    merged = pymerge.merge(method, zero, states, weights=1.5, **{**parameters, **drawn})
    expected = dict(base)
    for name, delta in merged.items():
        expected[name] = (base[name].float() + delta).bfloat16()
    models.assert_same(got, expected)
    assert len(report.output.shards) > 1
    assert [one.path for one in report.inputs][1:] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert "Models" in (tmp_path / "out" / "README.md").read_text()


def test_a_merge_onto_the_base_may_begin_again(tmp_path: Path) -> None:
    """A sample of the one large module misleads about the sign of zero votes."""
    large, small = 128, [f"s{number:04d}" for number in range(1200)]
    made = [{"large": (np.ones((large, 1)), np.ones((1, large)))} for _ in range(2)]
    for adapter in made:
        adapter |= {name: (np.ones((5, 1)), -np.ones((1, 6))) for name in small}
    for adapter, sign in zip(made, (1.0, -1.0), strict=True):  # votes of zero
        adapter["v"] = np.full((2, 1), sign), np.ones((1, 2))
    for name, factors_ in zip("ab", made, strict=True):
        lora(factors_).save(tmp_path / name)
    deltas = [
        {f"{n}.weight": torch.from_numpy(b @ a).float() for n, (b, a) in one.items()}
        for one in made
    ]
    zero = {name: torch.zeros_like(delta) for name, delta in deltas[0].items()}
    base = {**zero, "a.copied": torch.arange(3.0), "z.copied": torch.arange(4)}
    models.save(tmp_path / "base", base)
    config = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in "ab"],
        "parameters": {"semantics": "official", "density": 1.0},
    }
    run_merge_adapters(config, tmp_path / "out")
    expected = {**base, **pymerge.ties_merge(zero, deltas, density=1.0)}
    assert bool((expected["v.weight"] == -1).all())
    models.assert_same(models.load(tmp_path / "out"), expected)


def test_bad_merges_onto_a_base(two: list[Adapter], tmp_path: Path) -> None:
    config = onto(two, tmp_path, "ties")

    def problem(**changes: Any) -> str:
        with pytest.raises(RequestError) as caught:
            run_merge_adapters({**config, **changes}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "config: rank: applies to an adapter, but with base_model" in problem(rank=3)
    assert "no such file or directory" in problem(base_model=str(tmp_path / "nowhere"))
    models.save(tmp_path / "other", {"h.0.q.weight": torch.ones(3, 3)})
    assert "module 'h.0.k': the base has no tensor" in problem(base_model=str(tmp_path / "other"))
    pair = ia3_pair(tmp_path)
    entries = [{"model": str(adapter.path)} for adapter in pair]
    assert "is IA3, whose deltas depend on the base" in problem(models=entries)
    assert "unknown key 'base_model'" in problem(merge_method="svd")
