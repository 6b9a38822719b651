"""`pymerge ada`: its configuration, what it writes, and what it refuses."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pymerge import AdaMerging, RequestError
from pymerge.adamerging import fit as fit_of_ada
from pymerge.adamerging.arguments import model_names
from pymerge.adamerging.config import read_config
from pymerge.adamerging.run import run_ada
from pymerge.commands.main import main
from tests.adapter_files import factors, save_lora
from tests.test_adamerging_save import checkpoints

_ENTRY = """
import torch
from tests.test_adamerging import Net
def setup(width):
    torch.manual_seed(5)
    y = torch.randint(0, 5, (6,))
    x = [[(torch.randn(6, width) + k, y) for _ in range(3)] for k in range(3)]
    return {"model": Net(width), "loaders": x, "labelled": x}
def joined(width):
    join = lambda batches: (torch.cat([x for x, _ in batches]), None)
    return setup(width) | {"join": join, "labelled": None}
def counted(width):
    labels = lambda batch: batch[1].masked_fill(batch[1] == 0, -100)
    return setup(width) | {"labels": labels}
def heads(width):
    return setup(width) | {"heads": 3}
def batches(width):
    return setup(width) | {"loaders": 3}
def model(width):
    return setup(width) | {"model": "x"}
def lacking(width):
    return {"model": Net(width)}
def nothing(width):
    pass
def leave(width):
    raise SystemExit(3)
"""


def ada_config(folder: Path, **more: Any) -> Path:
    _, base, models = checkpoints(folder)
    config = {
        "base_model": base,
        "models": [models[0], {"model": models[1], "name": "second"}, models[2]],
        "entry": "ada_entry:setup",
        "arguments": {"width": 8},
        "fixed": "base",
        "fit": {"steps": 5, "lr": 0.01},
    } | more
    path = folder / "ada.yml"
    path.write_text(json.dumps(config))
    return path


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config, out = ada_config(tmp_path), tmp_path / "out"
    assert main(["ada", str(config), str(out)]) == 0
    assert "5 steps: mean entropy" in capsys.readouterr().out
    side = tmp_path / "out.ada"
    assert len(json.loads((side / "history.json").read_text())) == 5
    assert list(json.loads((side / "coefficients.json").read_text())) == ["m0", "second", "m2"]
    assert len(json.loads((side / "correlations.json").read_text())) == 3
    assert {"coefficients.html", "coefficients.png", "state.safetensors"} <= {
        p.name for p in side.iterdir()
    }
    assert "first.weight" in load_file(out / "model.safetensors")
    assert main(["ada", str(config), str(out), "--quiet"]) == 2  # OUT is there
    assert main(["ada", str(config), str(out), "--quiet", "--force"]) == 0


def test_command_goes_on_without_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config, out = ada_config(tmp_path), tmp_path / "out"
    seconds = []
    for more in ((), (), ("--restart",)):
        assert main(["ada", str(config), str(out), "--quiet", "--force", *more]) == 0
        history = json.loads((tmp_path / "out.ada" / "history.json").read_text())
        seconds.append([row["seconds"] for row in history])
    assert seconds[0] == seconds[1] != seconds[2]


def test_command_with_an_entry_point_that_lacks_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is a failure and no bad request."""
    (tmp_path / "ada_lost.py").write_text("def setup(*_, **__):\n    open('nowhere.csv')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ada_config(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"entry": "ada_lost:setup"}))
    assert main(["ada", str(config), str(tmp_path / "out")]) == 1
    assert "No such file or directory: 'nowhere.csv'" in capsys.readouterr().err


def test_command_joins_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    tables = []
    config, out = ada_config(tmp_path), tmp_path / "out"
    plain = json.loads(config.read_text())
    fit = plain["fit"] | {"join": "concatenate"}
    for more in ({}, {"fit": fit}, {"entry": "ada_entry:joined"}):
        config.write_text(json.dumps(plain | more))
        assert main(["ada", str(config), str(out), "--quiet", "--force", "--restart"]) == 0
        tables.append(load_file(tmp_path / "out.ada" / "state.safetensors")["coefficients"])
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=0, atol=1e-4)
    config.write_text(json.dumps(plain | {"fit": {"join": "pad"}}))
    assert main(["ada", str(config), str(tmp_path / "bad")]) == 2
    assert "join: expected concatenate or a function, got 'pad'" in capsys.readouterr().err


def test_every_key_of_fit_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    fit = {
        "steps": 3,
        "lr": 0.5,
        "batches_per_task": 3,
        "entropy": "fusion_bench",
        "weights": [1, 2, 3],
        "tokens": 4,
        "autocast": "bfloat16",
        "seed": 5,
        "accumulate": "coefficients",
        "join": "concatenate",
        "patience": 7,
        "min_delta": 0.25,
        "checkpoint_every": 2,
    }
    own = {"inputs", "checkpoint", "resume", "progress"}
    parameters = set(inspect.signature(fit_of_ada).parameters) - {"ada", "loaders"}
    assert set(fit) == parameters - own
    taken: dict[str, Any] = {}

    def spy(ada: Any, loaders: Any, **how: Any) -> Any:
        taken.update(how)
        raise RequestError("enough")

    monkeypatch.setattr(AdaMerging, "fit", spy)
    config = ada_config(tmp_path, fit=fit)
    with pytest.raises(RequestError, match="enough"):
        run_ada(config, tmp_path / "out")
    assert {name: taken[name] for name in fit} == fit | {"autocast": torch.bfloat16}
    assert set(taken) == parameters


def test_a_config_may_have_tables_and_empty_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ada_config(tmp_path, init=[[0.1], [0.2], [0.3]], clamp=[-1, 2], granularity="task")
    config.write_text(config.read_text().replace('"fit": {"steps": 5, "lr": 0.01}', '"fit": null'))
    read = read_config(config)
    assert read.values.init == [[0.1], [0.2], [0.3]]
    assert read.fit["steps"] is None
    config.write_text(config.read_text().replace('"fit": null', '"fit": {"steps": 0}'))
    run_ada(config, tmp_path / "out")
    table = load_file(tmp_path / "out.ada" / "coefficients.safetensors")["coefficients"]
    torch.testing.assert_close(table, torch.tensor([[0.1], [0.2], [0.3]]))


def test_a_config_may_name_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    for seed in range(3):
        pairs = factors({"first": (16, 8), "second": (5, 16)}, seed=seed)
        save_lora(tmp_path / f"lora{seed}", pairs)
    base, loras = str(tmp_path / "base"), [str(tmp_path / f"lora{k}") for k in range(3)]
    mapping = {"model": {"path": base}, "lora": {"path": loras[2]}}
    models = [
        f"{base}+{loras[0]}",
        {"model": f"{base}+{loras[1]}", "name": "b"},
        {"model": mapping},
    ]
    config = ada_config(tmp_path, models=models)
    read = read_config(config)
    assert read.names == ("lora0", "b", "lora2")
    assert read.paths == [f"{base}+{lora}" for lora in loras]
    assert read.files == [base, *(part for lora in loras for part in (base, lora))]
    run_ada(config, tmp_path / "out")
    assert "first.weight" in load_file(tmp_path / "out" / "model.safetensors")
    config.write_text(config.read_text().replace('"lora": {', '"loar": {'))
    with pytest.raises(RequestError, match=r"ada.yml:1: models\[2\]\.model\.loar: unknown key"):
        read_config(config)


def test_models_of_one_name_stay_apart() -> None:
    assert model_names(["a/x", "b/x", Path("c"), {}, {}]) == (
        "a/x",
        "b/x",
        "c",
        "model 3",
        "model 4",
    )
    assert model_names(["m", "m"]) == ("m (0)", "m (1)")
    assert model_names(["a/m", "b/n"], ["n", None]) == ("n", "b/n")
    assert model_names(["n", "b/n/"], [None, "x"]) == ("n", "x")


def test_command_takes_labels_of_the_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    counts = []
    config = ada_config(tmp_path)
    plain = config.read_text()
    for name in ("setup", "counted"):
        config.write_text(plain.replace("ada_entry:setup", f"ada_entry:{name}"))
        run_ada(config, tmp_path / name)
        rows = json.loads((tmp_path / f"{name}.ada" / "correlations.json").read_text())
        counts.append([row["examples"] for row in rows])
    assert counts[0] == [18, 18, 18]
    assert counts[1][0] < 18


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"entry": "nothing"}, "entry: expected package.module:function"),
        ({"entry": "no_such_module_at_all:f"}, "module 'no_such_module_at_all' cannot be imported"),
        ({"entry": "ada_entry:setpu"}, "has no 'setpu'; did you mean 'setup'"),
        ({"entry": "ada_entry:Net.widht"}, "has no 'Net.widht'"),
        ({"entry": "ada_entry:torch"}, "is not callable"),
        ({"entry": "ada_broken:setup"}, "'ada_broken' cannot be imported: ZeroDivisionError"),
        ({"arguments": {}}, r"arguments: .*setup: missing a required argument: 'width'"),
        ({"arguments": {"widht": 8}}, "arguments: ada_entry:setup: missing a required argument"),
        ({"arguments": {"width": "8"}}, "entry: ada_entry:setup raised TypeError"),
        ({"entry": "ada_entry:heads"}, "heads: expected a list, one per model; got 3"),
        ({"entry": "ada_entry:batches"}, "loaders: expected a list, one loader per task; got 3"),
        ({"entry": "ada_entry:model"}, "model: expected a module, got str"),
        ({"entry": "ada_entry:leave"}, "entry: ada_entry:leave raised SystemExit: 3"),
        ({"entry": "ada_entry:lacking"}, "with model and loaders, and perhaps .*the keys model"),
        ({"entry": "ada_entry:nothing"}, "must return an AdaSetup or a dictionary.*got NoneType"),
        ({"entry": "builtins:dict"}, "must return a dictionary with model and loaders"),
        ({"steps": 3}, "steps: unknown key"),
        ({"fit": {"step": 3}}, "fit.step: unknown key.*steps"),
        ({"fit": {"autocast": "int8"}}, "fit.autocast: expected one of bfloat16"),
        (
            {"fit": {"autocast": "bfloat"}},
            "fit.autocast: expected one of .*did you mean 'bfloat16'",
        ),
        ({"fit": [1]}, "fit: expected a mapping, got a list"),
        ({"fit": {"steps": "5"}}, "fit.steps: expected an integer, got '5'"),
        ({"fit": {"steps": -2}}, "fit.steps: expected an integer >= 0, got -2"),
        ({"fit": {"lr": True}}, "fit.lr: expected a number, got True"),
        ({"fit": {"weights": ["x"]}}, r"fit.weights\[0\]: expected a number, got 'x'"),
        ({"fit": {"weights": [1]}}, "fit.weights: expected 3 positive numbers"),
        ({"models": []}, "models: expected a list of at least one model, got an empty list"),
        ({"models": "m0"}, "models: expected a list of at least one model, got 'm0'"),
        (
            {"models": [{"model": "m0", "nmae": "x"}]},
            r"models\[0\].nmae: unknown key; did you mean 'name'",
        ),
        ({"models": [{"name": "x"}]}, r"models\[0\].model: is missing"),
        ({"models": ["nowhere"]}, r"models\[0\]: no such file or directory"),
        (
            {"models": [{"model": m, "name": "x"} for m in ("a", "b")]},
            "names: expected unique names",
        ),
        ({"base_model": 3}, "base_model: expected a path, got 3"),
        ({"models": ["a\0b"]}, r"models\[0\]: expected a path, or {model: .*got 'a.x00b'"),
        (
            {"init": "0.3"},
            "init: expected a number, a list with one number or list per model.*, got '0.3'",
        ),
        ({"init": [[0.1], ["x"]]}, "init: expected a number, .*, got a list"),
        ({"init": True}, "init: expected a number, .*, got True"),
        ({"init": [0.1]}, r"init: expected a number, 3 numbers .*got shape \(1,\)"),
        ({"granularity": 3}, "granularity: expected layer, module, task or a list .*, got 3"),
        ({"granularity": "tensor"}, "granularity: expected 'layer', 'module', .*, got 'tensor'"),
        ({"granularity": ["("]}, r"granularity\[0\]: expected a regular expression"),
        ({"clamp": [1, 0]}, r"clamp: expected \(lowest, highest\) or None"),
        ({"clamp": [0, "x"]}, r"clamp\[1\]: expected a number, got 'x'"),
        ({"trimmed": "yes"}, "trimmed: expected true or false, got 'yes'"),
        ({"density": 2}, r"density: expected a number in \[0, 1\], got 2"),
        ({"preset": "offical"}, "preset: expected one of .*did you mean 'official'"),
        ({"fixed": "x"}, "fixed: expected 'equal' or 'base', got 'x'"),
    ],
)
def test_command_with_a_bad_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "ada_entry.py").write_text(_ENTRY)
    (tmp_path / "ada_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["ada", str(ada_config(tmp_path, **more)), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert re.search(r"ada.yml:\d+: ", shown)
    assert "problems:" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "ada.yml: no such file; expected an AdaMerging configuration in YAML"),
        (b"", "ada.yml: expected an AdaMerging configuration, got an empty file"),
        (b"- 3\n", r"ada.yml:1: expected a mapping \(base_model: ..., .*, got a list"),
        (b"entry: a:b\nbase_model: \xff\n", "ada.yml:2: expected UTF-8 text"),
        (b"\xef\xbb\xbfentry: a:b\n", "(?s)ada.yml: base_model: is missing.*models: is missing"),
    ],
)
def test_command_with_a_file_that_is_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "ada.yml"
    if content is not None:
        path.write_bytes(content)
    assert main(["ada", str(path), str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
