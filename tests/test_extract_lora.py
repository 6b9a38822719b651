"""Extraction of LoRAs from fine-tunes: how close, what is left out, on what it depends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge.adapters import ExtractReport, extract_lora, fold, load
from pymerge.adapters.decompose import factor_matrix
from pymerge.commands.main import main
from pymerge.errors import NonFiniteError, RequestError
from tests import models
from tests.adapter_files import projections
from tests.models import CONFIG, State, save

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting


def tuned(base: State, rank: int | None, seed: int = 1, every: bool = False) -> State:
    """Return a model that differs by matrices of a rank (None: full), or in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(base)
    for name, tensor in base.items():
        if tensor.ndim == 2 and ("proj" in name or every):
            change = 0.01 * torch.randn(tensor.shape, generator=generator)
            if rank is not None:
                left = 0.1 * torch.randn(tensor.shape[0], rank, generator=generator)
                change = left @ torch.randn(rank, tensor.shape[1], generator=generator)
            found[name] = (tensor.float() + change).to(tensor.dtype)
        elif every and tensor.is_floating_point() and tensor.numel():
            found[name] = tensor + 0.5
    return found


@pytest.fixture
def base() -> State:
    return models.llama(1, torch.float32, hidden=48, mlp=80, vocabulary=96)[0]


def saved(tmp_path: Path, base: State, model: State, **options: Any) -> None:
    save(tmp_path / "base", base, files=2, **options)
    save(tmp_path / "model", model, **options)


def extract(tmp_path: Path, out: str = "out", **options: Any) -> ExtractReport:
    return extract_lora(tmp_path / "base", tmp_path / "model", tmp_path / out, **options)


def changes(base: State, model: State) -> dict[str, torch.Tensor]:
    return {
        name: model[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        for name in projections(base)
    }


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_change_of_low_rank_comes_back(method: Any, tmp_path: Path, base: State) -> None:
    model = tuned(base, 3)
    saved(tmp_path, base, model)
    report = extract(tmp_path, rank=3, method=method)
    adapter = load(tmp_path / "out")
    assert sorted(report.modules) == sorted(adapter.modules) == sorted(projections(base))
    for name, change in changes(base, model).items():
        error = float((adapter.delta_weight(name) - change).norm() / change.norm())
        assert error < 2e-6
        assert report.modules[name].error < 2e-6
        assert report.modules[name].exact == (method == "exact")
    assert report.captured == pytest.approx(1.0)
    fold(tmp_path / "base", tmp_path / "out", tmp_path / "folded")
    for name, tensor in models.load(tmp_path / "folded").items():
        torch.testing.assert_close(tensor, model[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_errors_are_what_the_report_says(
    dtype: torch.dtype, method: Any, tmp_path: Path, base: State
) -> None:
    base = {n: t.to(dtype) if t.is_floating_point() else t for n, t in base.items()}
    model = tuned(base, None)
    saved(tmp_path, base, model)
    name = str(dtype).removeprefix("torch.")
    report = extract(tmp_path, rank=8, method=method, dtype=name)
    adapter = load(tmp_path / "out")
    held = total = 0.0
    for module, change in changes(base, model).items():
        found = report.modules[module]
        rest = float((adapter.delta_weight(module) - change).norm())
        norm = float(change.norm())
        assert found.error == pytest.approx(rest / norm, abs=1e-5)
        assert found.norm == pytest.approx(norm, rel=1e-6)
        squares = torch.linalg.svdvals(change) ** 2
        best = float(squares[:8].sum() / squares.sum())
        assert found.energy <= best + 1e-6
        # random columns with power iterations come close to the best of a flat spectrum, too
        assert found.energy >= best * (0.99 if method == "randomized" else 1 - 1e-6)
        assert found.error**2 == pytest.approx(1 - found.energy, abs=2e-3)
        total, held = total + norm**2, held + norm**2 - rest**2
    assert report.captured == pytest.approx(held / total, abs=1e-4)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("energy", [0.2, 0.9, 1.0])
def test_energy(energy: float, method: Any, tmp_path: Path, base: State) -> None:
    model = tuned(base, None)
    saved(tmp_path, base, model)
    report = extract(tmp_path, energy=energy, method=method)
    for name, change in changes(base, model).items():
        squares = torch.linalg.svdvals(change) ** 2
        shares = torch.cumsum(squares, 0) / squares.sum()
        least = int((shares < energy * (1 - 1e-9)).sum()) + 1
        rank = report.modules[name].rank
        assert report.modules[name].energy >= energy * (1 - 1e-6)
        assert rank == least if method == "exact" else least <= rank <= least + 2
    capped = extract(tmp_path, "capped", energy=0.9, max_rank=2)
    assert {one.rank for one in capped.modules.values()} == {2}


def test_ranks_larger_than_a_matrix(tmp_path: Path, base: State) -> None:
    model = tuned(base, None)
    saved(tmp_path, base, model)
    report = extract(tmp_path, rank=1000)
    for name, (rows, columns) in projections(base).items():
        assert report.modules[name].rank == min(rows, columns)
        assert report.modules[name].error < 1e-5


def test_what_is_left_out_and_what_is_saved(tmp_path: Path, base: State) -> None:
    model = tuned(base, None, every=True)
    frozen = "model.layers.0.self_attn.q_proj"
    model[f"{frozen}.weight"] = base[f"{frozen}.weight"]
    saved(tmp_path, base, model)
    report = extract(tmp_path, rank=4)
    assert report.unchanged == [frozen]
    others = {"model.temperature", "model.norm.weight", "lm_head.weight"}
    assert others < set(report.left_out)
    assert report.left_out["model.norm.weight"] == pytest.approx(0.5 * 48**0.5)
    assert "left out: 8 tensors that changed" in report.summary()
    again = extract(tmp_path, "whole", rank=4, save_changed=True)
    assert list(again.left_out) == ["model.temperature"]  # no module of PEFT's
    assert again.captured > report.captured
    whole = load(tmp_path / "whole")
    assert "model.norm" in whole.config["modules_to_save"]
    fold(tmp_path / "base", tmp_path / "whole", tmp_path / "folded")
    got = models.load(tmp_path / "folded")
    assert torch.equal(got["model.norm.weight"], model["model.norm.weight"])
    assert torch.equal(got["lm_head.weight"], model["lm_head.weight"])
    record = json.loads((tmp_path / "out" / "pymerge_extract.json").read_text())
    assert record["modules"][next(iter(report.modules))]["rank"] == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modules": ["q_proj", "layers.1.mlp.up_proj"]}, {"q_proj", "up_proj"}),
        ({"modules": r".*layers\.0.*_proj", "exclude": ["k_proj"]}, None),
        ({"modules": ["embed_tokens", "lm_head"]}, {"embed_tokens", "lm_head"}),
    ],
)
def test_modules(options: Any, expected: set[str] | None, tmp_path: Path, base: State) -> None:
    model = tuned(base, 2, every=True)
    saved(tmp_path, base, model)
    report = extract(tmp_path, rank=2, **options)
    names = {name.rpartition(".")[2] for name in report.modules}
    if expected is None:
        assert names == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert all(".layers.0." in name for name in report.modules)
    else:
        assert names == expected
    adapter = load(tmp_path / "out")
    for name in report.modules:
        change = model[f"{name}.weight"] - base[f"{name}.weight"]
        assert float((adapter.delta_weight(name) - change).norm()) < 1e-5 * float(change.norm())
    kinds = {module.kind for module in adapter.modules.values()}
    assert kinds == ({"linear", "embedding"} if "embed_tokens" in names else {"linear"})


def test_targets_mean_what_was_extracted(tmp_path: Path, base: State) -> None:
    model = tuned(base, 2)
    saved(tmp_path, base, model)
    extract(tmp_path, rank=2)
    targets = load(tmp_path / "out").config["target_modules"]
    assert targets == sorted({name.rpartition(".")[2] for name in projections(base)})
    extract(tmp_path, "part", rank=2, modules=r".*layers\.0\..*(q|k)_proj")
    assert load(tmp_path / "part").config["target_modules"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.q_proj",
    ]


def test_conv1d(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "transformer.h.0.attn.c_attn.weight": torch.randn(12, 36, generator=generator),
        "transformer.h.0.mlp.c_proj.weight": torch.randn(12, 12, generator=generator),
        "transformer.wte.weight": torch.randn(20, 12, generator=generator),
    }
    model = {n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()}
    saved(tmp_path, base, model, config={"model_type": "gpt2"})
    report = extract(tmp_path, rank=12)
    assert set(report.left_out) == {"transformer.wte.weight"}
    adapter = load(tmp_path / "out")
    assert adapter.config["fan_in_fan_out"] is True
    assert adapter.factors("transformer.h.0.attn.c_attn")[0].shape == (36, 12)
    for name in report.modules:
        change = model[f"{name}.weight"] - base[f"{name}.weight"]
        torch.testing.assert_close(adapter.delta_weight(name), change, rtol=1e-4, atol=1e-5)


def test_bytes_depend_on_the_seed_alone(tmp_path: Path, base: State) -> None:
    saved(tmp_path, base, tuned(base, None))
    threads = torch.get_num_threads()
    contents = []
    try:
        for number, (count, seed) in enumerate(((1, 0), (2, 0), (2, 7))):
            torch.set_num_threads(count)
            torch.manual_seed(number)
            extract(tmp_path, str(number), rank=4, method="randomized", seed=seed)
            file = tmp_path / str(number) / "adapter_model.safetensors"
            contents.append(file.read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert contents[0] == contents[1] != contents[2]


def test_large_matrices_are_projected() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(500, 40, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(700, 40, generator=generator)).Q
    values = 0.8 ** torch.arange(40.0)
    matrix = (left * values) @ right.T
    found = factor_matrix(matrix, 10)
    assert not found.exact
    share = float((values[:10] ** 2).sum() / (values**2).sum())
    assert found.energy == pytest.approx(share, rel=1e-5)
    assert factor_matrix(matrix, 200).exact
    by_energy = factor_matrix(matrix, energy=0.99)
    assert by_energy.rank == int((torch.cumsum(values**2, 0) < 0.99 * (values**2).sum()).sum()) + 1
    # more than the first attempt: the rank is doubled until it is enough
    flat = torch.randn(400, 450, generator=generator)
    doubled = factor_matrix(flat, energy=0.3, method="randomized")
    assert doubled.energy >= 0.3
    assert doubled.rank > 32


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
    "both": ({"rank": 2, "energy": 0.5}, "expected a rank or an energy, got both"),
    "energy": ({"energy": 0}, "energy: expected a number in (0, 1], got 0"),
    "most": ({"max_rank": 4}, "max_rank: is for energy"),
    "method": ({"method": "exakt"}, "method: expected one of auto, exact, randomized, got 'exakt'"),
    "dtype": ({"dtype": "bf16"}, "dtype: expected one of float32, bfloat16, float16, got 'bf16'"),
    "seed": ({"seed": -1}, "seed: expected an integer in [0, 2**32), got -1"),
    "expression": ({"modules": "("}, "modules: expected names, or a regular expression, got '('"),
    "nothing": ({"modules": ["nowhere"]}, "no module is chosen: expected matrices named "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, tmp_path: Path, base: State) -> None:
    options, expected = BAD[case]
    saved(tmp_path, base, tuned(base, 2))
    with pytest.raises(RequestError) as caught:
        extract(tmp_path, **options)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_models(tmp_path: Path, base: State) -> None:
    model = tuned(base, 2)
    save(tmp_path / "base", base)
    name = "model.layers.0.self_attn.q_proj.weight"
    cases: list[tuple[str, State, str]] = [
        (
            "shape",
            {**model, name: torch.ones(3, 3)},
            f"'{name}' has shape (3, 3), expected (48, 48)",
        ),
        ("more", {**model, "x": torch.ones(3)}, "lacks 'x' of model"),
        ("less", {n: t for n, t in model.items() if n != name}, f"lacks '{name}' of base"),
        ("same", base, "none of the chosen modules differs"),
        ("nan", {**model, name: torch.full((48, 48), float("nan"))}, f"'{name}' holds nan at flat"),
    ]
    for case, state, expected in cases:
        save(tmp_path / case, state)
        with pytest.raises(NonFiniteError if case == "nan" else RequestError) as caught:
            extract_lora(tmp_path / "base", tmp_path / case, tmp_path / "out")
        assert expected in str(caught.value)


def test_the_command(tmp_path: Path, base: State, capsys: Any) -> None:
    saved(tmp_path, base, tuned(base, 2), config=CONFIG)
    paths = [str(tmp_path / name) for name in ("base", "model", "out")]
    assert main(["extract-lora", *paths, "--energy", "0.99", "--modules", "q_proj,k_proj"]) == 0
    assert "4 modules of rank 2" in capsys.readouterr().out
    config = load(tmp_path / "out").config
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == paths[0]
    assert main(["extract-lora", *paths, "--modules", "/.*q_proj/", "--force", "--quiet"]) == 0
    assert load(tmp_path / "out").rank == 16
    assert main(["extract-lora", *paths]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["fold", paths[0], paths[2], str(tmp_path / "folded"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
