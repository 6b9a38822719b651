"""What `pymerge collect` refuses: configurations, entry points, models, devices, folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.commands.main import main
from pymerge.statistics.run import run_collect
from tests import collect_entries as entries
from tests import models
from tests.collect_entries import HERE, config

folder = entries.folder
no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")


def refused(file: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["collect", str(file), *more]) == 2
    left = [path for path in file.parent.glob("m*/*") if path.name != "model.safetensors"]
    assert left == []
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "collect.yml: kind: is missing"),
        ({"kind": "hessian"}, r":1: kind: expected fisher or gram, got 'hessian'"),
        ({"modles": []}, r":6: modles: unknown key; did you mean 'models'"),
        ({"models": []}, r":2: models: expected a list of at least one model"),
        ({"models": [3]}, r":3: models\[0\]: expected a path, or \{model: "),
        ({"models": [{"model": "m", "nmae": "x"}]}, r"models\[0\].nmae: unknown key; did you mean"),
        ({"models": [{"model": "m", "name": "a/b"}]}, "a name without slashes, got 'a/b'"),
        ({"models": ["no/such"]}, r":3: models\[0\] \(no/such\): no such file or directory"),
        ({"arguments": [1]}, r":6: arguments: expected a mapping, got a list"),
        ({"options": {"sample": 3}}, r":7: options.sample: unknown option; did you mean 'samples'"),
        ({"options": {"samples": 0}}, r":7: options.samples: expected an integer >= 1, got 0"),
        ({"options": {"samples": "many"}}, r":7: options.samples: .* got 'many'"),
        ({"options": {"labels": "tru"}}, r":7: options.labels: .*did you mean 'true'"),
        ({"options": {"estimator": [1]}}, r":7: options.estimator: expected one of exact, batch"),
        ({"options": {"parameters": 3}}, r":7: options.parameters: expected names, a regular"),
        ({"options": {"vectorize": "yes"}}, r":7: options.vectorize: expected True, False or None"),
        ({"options": {"seed": 1.5}}, r":7: options.seed: expected an integer of 64 bits"),
        ({"options": {"logits": "f"}}, r":7: options.logits: is a function: the entry point"),
        ({"options": {"accumulate": "float32"}}, r"options.accumulate: is of kind gram, not fish"),
        (
            {"kind": "gram", "options": {"accumulate": "float16"}},
            r":7: options.accumulate: expected torch.float64 or torch.float32, got float16",
        ),
        (
            {"kind": "gram", "options": {"convolutions": "some"}},
            r":7: options.convolutions: expected False, True or 'pointwise'",
        ),
        (
            {"options": {"parameters": ["haed"]}},
            r":\d+: options.parameters: 'haed' is not a parameter",
        ),
    ],
)
def test_a_bad_configuration(
    change: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(config(folder, **change), capsys))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("setup", "entry: expected package.module:function, got 'setup'"),
        ("no_such_module:f", "entry: module 'no_such_module' cannot be imported"),
        (f"{HERE}:setpu", "has no 'setpu'; did you mean 'setup'"),
        (f"{HERE}:HERE", "is not callable"),
        (f"{HERE}:entry_of", r"arguments: .*entry_of: missing a required argument: 'what'"),
    ],
)
def test_a_bad_entry_point(
    entry: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refused(config(folder, entry=entry), capsys)
    assert re.search(message, shown)
    assert re.search(r"collect.yml:\d+: (entry|arguments)", shown)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "must return a CollectSetup or a dictionary of model, loaders.*got NoneType"),
        ("module", "got Net"),
        ("no loaders", "a dictionary with model and loaders.*got the keys model"),
        ("odd key", "got the keys model, loaders, loader"),
        ("no module", "model: expected a torch.nn.Module, got str"),
        ("no parameters", "model: expected a module with parameters, got none"),
        ("meta", "model: expected a module in memory"),
        ("one loader", "loaders: expected 2, one for each model; got 1"),
        ("tensor", "loaders: expected a list with one for each of 2 models"),
        ("names", "loaders: has none for the model 'm1'; it has 'm0', 'x'"),
        ("no function", "logits: expected a list .*got int"),
        ("few functions", "logits: expected 2, one for each model; got 1"),
        ("no functions", "logits: expected functions, got int"),
        ("raises", "entry_of raised KeyError: 'the data are gone'"),
        ("empty", r"models\[0\] .*loader: is empty; expected at least one example"),
        ("no batches", r"models\[0\] .*loader: expected batches .*got Tensor"),
        ("no tensors", r"batch 0: expected a tensor in it"),
        ("nan", r"models\[0\] .*batch 0: the logits hold NaN or infinity"),
        ("bad shape", r"models\[0\] .*the model or its data raised RuntimeError: .*channels"),
        ("frozen", r"models\[0\] .*no parameter requires gradients"),
    ],
)
def test_an_entry_point_that_returns_something_else(
    what: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(folder, entry=f"{HERE}:entry_of", arguments={"what": what})
    shown = refused(file, capsys)
    assert re.search(message, shown), shown
    assert re.search(r"collect.yml:5: entry|models\[0\]", shown)


def test_models_that_do_not_fit_are_one_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(folder / "m1" / "model.safetensors")
    state["hed.bias"] = state.pop("head.bias")
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    save_file(state, folder / "m1" / "model.safetensors")
    file = config(folder, entry=f"{HERE}:entry_of", arguments={"what": "misfit"})
    for more in ([], ["--dry-run"]):
        shown = refused(file, capsys, *more)
        assert re.search(r"models\[0\] .*lacks 'extra.weight', 'extra.bias' of its 11 t", shown)
        assert "'head.weight': expected shape (5, 3) like the architecture, got (4, 3)" in shown
        assert re.search(r"models\[1\] .*lacks 'head.bias', 'extra.*; did you mean 'hed.b", shown)
        assert re.search(r"models\[1\] .*which has no 'hed.bias' \(1 of 9 tensors\)", shown)
        assert re.search(r"'norm.num_batches_tracked': expected torch.int64 like .*got F32", shown)


def test_devices_and_folders_that_are_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(folder)
    run_collect(file, device="cpu", dry_run=True)
    with pytest.raises(SystemExit):
        main(["collect", str(file), "--device", "tpu"])
    for device in ("cuda:99", "tpu", "cuda:x"):
        with pytest.raises(pymerge.RequestError, match="device: "):
            run_collect(file, device=device)
    capsys.readouterr()
    assert "is not a folder" in refused(file, capsys, "--out", str(file))
    both = config(folder, models=[str(folder / "m0")] * 2)
    assert "give them names" in refused(both, capsys, "--out", str(folder / "out"))
    shown = refused(folder / "none.yml", capsys)
    assert "none.yml: no such file; expected a collect configuration in YAML" in shown
