"""AdaMerging: coefficients as tables and pictures, merged models and coefficients as files."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pymerge
from pymerge import AdaMerging, RequestError, adapters
from tests.adapter_files import factors, save_lora
from tests.test_adamerging import Net, make


def test_table_and_heat_maps(tmp_path: Path) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, names=["<a>", "b", "c"], init=[0.1, 0.2, 0.3])
    table = ada.coefficients
    assert table.of("second.bias") == pytest.approx([0.1, 0.2, 0.3])
    assert table.to_dict()["b"]["first.weight"] == pytest.approx(0.2)
    assert "first.weight" in str(table)
    assert "0.3000" in str(table)
    table.save_png(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    table.save_html(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    assert "&lt;a&gt;" in page
    assert "0.3000" in page
    assert "<script" not in page
    with pytest.raises(RequestError, match=r"layer: there is no merged tensor 'second.bia'"):
        table.of("second.bia")


def checkpoints(folder: Path) -> tuple[Net, str, list[str]]:
    net, base, models = make(dtype=torch.float32)
    paths = []
    for name, state in [("base", base), *((f"m{k}", m) for k, m in enumerate(models))]:
        (folder / name).mkdir()
        kept = {n: t.bfloat16().contiguous() for n, t in state.items() if n != "tied.weight"}
        save_file(kept, folder / name / "model.safetensors")
        paths.append(str(folder / name))
    return net, paths[0], paths[1:]


@pytest.mark.parametrize("trimmed", [False, True])
def test_saving_checkpoints_streams_the_same_bytes(tmp_path: Path, trimmed: bool) -> None:
    net, base, models = checkpoints(tmp_path)
    ada = AdaMerging(net, base, models, trimmed=trimmed, dtype=torch.bfloat16, fixed="base")
    with torch.no_grad():
        ada.raw_coefficients.uniform_(-0.2, 1.3, generator=torch.Generator().manual_seed(0))
    report = ada.save(tmp_path / "out")
    assert report is not None
    assert report.method == "adamerging"
    written = load_file(tmp_path / "out" / "model.safetensors")
    state = ada.merged_state_dict()
    assert set(written) == set(state) - {"tied.weight"}
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name]), name
    # The coefficients alone repeat the merge.
    config = {
        "merge_method": "adamerging",
        "base_model": base,
        "models": [{"model": path} for path in models],
        "parameters": {"coefficients": str(tmp_path / "out.coefficients.safetensors")},
    }
    pymerge.merge_checkpoints(config, tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_pass_that_writes_to_buffers_changes_nothing(tmp_path: Path, mapped: bool) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    torch.manual_seed(0)
    states = [net().state_dict() for _ in range(3)]
    kept = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    given: list[Any] = list(states)
    if mapped:
        given = []
        for number, state in enumerate(states):
            (tmp_path / str(number)).mkdir()
            save_file(state, tmp_path / str(number) / "model.safetensors")
            given.append(tmp_path / str(number))
    ada = AdaMerging(net().train(), given[0], given[1:])
    x = torch.randn(5, 4)
    first = ada(x)
    ada.fit([[x], [x]], steps=2, lr=1e-9, progress=False)
    assert torch.allclose(ada(x), first, atol=1e-6)
    merged = ada.merged_state_dict()
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(merged[name], kept[0][name])
    if not mapped:
        for state, before in zip(states, kept, strict=True):
            assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("preset", ["official", "fusion_bench"])
def test_checkpoints_of_another_dtype_than_the_architecture(preset: str) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    torch.manual_seed(0)
    base = net().bfloat16().state_dict()
    models = [base | {"2.weight": torch.randn(3, 6).bfloat16()} for _ in range(2)]
    architecture = net().eval()
    architecture[0].requires_grad_(False)
    ada = AdaMerging(architecture, base, models, preset=preset)
    state = ada.merged_state_dict()
    for name, tensor in architecture.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
    torch.testing.assert_close(state["0.weight"], base["0.weight"].float())
    x = torch.randn(5, 4)
    expected = torch.func.functional_call(architecture, state, (x,))
    torch.testing.assert_close(ada(x), expected)
    assert ada.double()(x).dtype == torch.float32  # the architecture's, whatever ada is cast to


def test_models_may_be_a_base_with_adapters(tmp_path: Path) -> None:
    net, base, _ = checkpoints(tmp_path)
    shapes = {"first": (16, 8), "second": (5, 16)}
    paths = []
    for seed in range(2):
        save_lora(tmp_path / f"lora{seed}", factors(shapes, seed=seed))
        adapters.fold(base, tmp_path / f"lora{seed}", tmp_path / f"folded{seed}")
        paths.append(f"{base}+{tmp_path / f'lora{seed}'}")
    folded = [str(tmp_path / f"folded{seed}") for seed in range(2)]
    made = []
    for models in (paths, folded):
        ada = AdaMerging(net, base, models, dtype=torch.bfloat16, init=[0.3, 0.6])
        out = tmp_path / f"out{len(made)}"
        ada.save(out)
        made.append((ada, (out / "model.safetensors").read_bytes()))
    assert made[0][0].names == ("lora0", "lora1")
    assert made[0][1] == made[1][1]
    state, other = (ada.merged_state_dict() for ada, _ in made)
    assert all(torch.equal(state[name], other[name]) for name in other)
    with pytest.raises(RequestError, match=r"models\[0\].*expected MODEL\+ADAPTER, two paths"):
        AdaMerging(net, base, [f"{base}+"])


def test_saving_tensors(tmp_path: Path) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    assert ada.save(tmp_path / "out") is None
    written = load_file(tmp_path / "out" / "model.safetensors")
    state = ada.merged_state_dict()
    assert set(written) == set(state) - {"tied.weight"}
    assert all(torch.equal(written[name], state[name]) for name in written)
    with pytest.raises(RequestError, match="out"):
        ada.save(tmp_path / "out")


# What has no effect where there are no checkpoints.
WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"coefficients": "c.safetensors"},
    {"device": "cpu"},
    {"backend": None},
    {"memory": "1GiB"},
    {"device_memory": "1GiB"},
    {"threads": 1},
    {"seed": 1},
    {"report": "report.json"},
    {"quiet": False},
    {"checksums": True},
    {"search": {}},
]


@pytest.mark.parametrize("how", WITHOUT_EFFECT, ids=str)
def test_saving_tensors_takes_no_arguments_of_files(how: dict[str, Any], tmp_path: Path) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    with pytest.raises(RequestError, match=f"^save: {next(iter(how))}: has no effect"):
        ada.save(tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_saving_takes_what_merging_files_takes() -> None:
    of_save = dict(inspect.signature(AdaMerging.save).parameters)
    assert list(of_save)[:3] == ["ada", "out", "coefficients"]
    assert of_save.pop("coefficients").default is None
    of_files = inspect.signature(pymerge.merge_checkpoints).parameters
    named = {name: p.default for name, p in of_save.items() if p.kind is p.KEYWORD_ONLY}
    assert named == {n: p.default for n, p in of_files.items() if p.kind is p.KEYWORD_ONLY}
    assert {next(iter(how)) for how in WITHOUT_EFFECT} == {
        "coefficients",
        *(named.keys() - {"force", "shard_size"}),
    }


def test_every_argument_reaches_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, base, models = checkpoints(tmp_path)
    taken: dict[str, Any] = {}
    monkeypatch.setattr(
        "pymerge.merging.files.merge_checkpoints", lambda config, out, **how: taken.update(how)
    )
    how: dict[str, Any] = {name: value for one in WITHOUT_EFFECT for name, value in one.items()}
    how |= {"force": True, "shard_size": "1GB", "coefficients": tmp_path / "c.safetensors"}
    AdaMerging(net, base, models, fixed="base").save(tmp_path / "out", **how)
    assert how.pop("coefficients").exists()
    assert taken == how


@pytest.mark.parametrize("later", [0, 1])
def test_coefficients_that_are_written_again_are_read_again(later: int, tmp_path: Path) -> None:
    """Of the same size, under the same name, even within one tick of the file system's clock."""
    net, base, models = make()
    path = tmp_path / "lam.safetensors"
    sizes = set()
    for number, init in enumerate((0.25, 0.75, 0.5)):
        ada = AdaMerging(net, base, models, init=init)
        ada.save_coefficients(path)
        os.utime(path, ns=(10**18, 10**18 + number * later))
        sizes.add(path.stat().st_size)
        merged = pymerge.merge("adamerging", base, models, coefficients=str(path))
        for name in ("first.weight", "second.bias"):
            tau = sum(model[name] - base[name] for model in models)
            torch.testing.assert_close(merged[name], base[name] + init * tau)
    assert len(sizes) == 1


def test_coefficients_of_something_else(tmp_path: Path) -> None:
    net, base, models = checkpoints(tmp_path)
    ada = AdaMerging(net, base, models, fixed="base")
    path = tmp_path / "lam.safetensors"
    ada.save_coefficients(path)
    config: dict[str, Any] = {
        "merge_method": "adamerging",
        "base_model": base,
        "models": [{"model": models[0]}],
        "parameters": {"coefficients": str(path)},
    }
    with pytest.raises(RequestError, match=r"has those of 3 models .*but 1 are given"):
        pymerge.merge_checkpoints(config, tmp_path / "out")
    config["parameters"]["coefficients"] = str(tmp_path / "none.safetensors")
    with pytest.raises(RequestError, match=r"none.safetensors: cannot be read"):
        pymerge.merge_checkpoints(config, tmp_path / "out")
    config["parameters"]["coefficients"] = str(Path(base) / "model.safetensors")
    with pytest.raises(RequestError, match=r"expected a file of AdaMerging.save_coefficients"):
        pymerge.merge_checkpoints(config, tmp_path / "out")
    state = dict(zip("ab", ({"w": torch.ones(2)}, {"w": torch.ones(2)}), strict=True))
    with pytest.raises(RequestError, match="has none for tensor 'w'"):
        pymerge.merge("adamerging", state["a"], [state["b"]] * 3, coefficients=str(path))
