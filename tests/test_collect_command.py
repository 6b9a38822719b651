"""`pymerge collect`: files that merge as what Python collects, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import pymerge
from pymerge.cli import main
from pymerge.data_driven.command import CollectSetup, run_collect
from tests import models

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

Tensor = torch.Tensor
HERE = "tests.test_collect_command"


class Net(nn.Module):
    """A convolution, a buffer of either kind, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, Tensor)
        return self.head(torch.tanh(self.norm(self.conv(x))).mean(2) * self.scale)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def data(seed: int, batches: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 2, 5, generator=generator), torch.randint(4, (4,), generator=generator))
        for _ in range(batches)
    ]


def setup(count: int = 2, form: str = "list", **more: Any) -> Any:
    """The entry point of most tests."""
    torch.manual_seed(9)
    loaders: Any = [data(k) for k in range(count)]
    if form == "names":
        loaders = {f"m{k}": loader for k, loader in enumerate(loaders)}
    return {"model": Net(), "loaders": loaders, **more}


def nets(count: int = 2) -> list[Net]:
    made = []
    for k in range(count):
        torch.manual_seed(20 + k)
        net = Net()
        with torch.no_grad():
            net.norm.weight.add_(0.1 * (k + 1))
        net.norm.running_mean = torch.randn(3)
        made.append(net.eval())
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, net in enumerate(nets()):
        (tmp_path / f"m{k}").mkdir()
        save_file(dict(net.state_dict()), tmp_path / f"m{k}" / "model.safetensors")
    return tmp_path


def config(folder: Path, **more: Any) -> Path:
    """Write a configuration; None leaves a key out."""
    values = {
        "kind": "fisher",
        "models": [str(folder / "m0"), str(folder / "m1")],
        "entry": f"{HERE}:setup",
    } | more
    path = folder / "collect.yml"
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path


def merge_config(folder: Path, method: str, statistics: list[Path], **more: Any) -> Path:
    entries = [
        {"model": str(folder / f"m{k}"), "parameters": {"statistics": str(path)}}
        for k, path in enumerate(statistics)
    ]
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump({"merge_method": method, "models": entries, **more}))
    return path


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("fisher", {}),
    ("fisher", {"labels": "sampled", "seed": 3, "samples": 7, "parameters": "head|conv"}),
    ("fisher", {"estimator": "batch", "labels": "true", "vectorize": False}),
    ("gram", {}),
    ("gram", {"samples": 6, "accumulate": "float32", "convolutions": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_files_merge_as_what_python_collects(
    kind: str, options: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", str(config(folder, kind=kind, options=options))]) == 0
    shown = capsys.readouterr()
    samples = min(options.get("samples", 256), 12)
    assert shown.out.count("collected") == 2
    assert f" {samples} " in shown.out
    assert shown.err.count("up to") == 2
    given = dict(options)
    if "accumulate" in given:
        given["accumulate"] = torch.float32
    collect = pymerge.collect_fisher if kind == "fisher" else pymerge.collect_gram
    own = [collect(net, data(k), **given) for k, net in enumerate(nets())]
    for k, expected in enumerate(own):
        assert sorted(os.listdir(folder / f"m{k}")) == [f"{kind}.safetensors", "model.safetensors"]
        found = pymerge.load_statistics(folder / f"m{k}")
        models.assert_same(dict(found), dict(expected))
        assert (found.record.kind, found.record.examples) == (kind, samples)
        assert found.record.estimator == expected.record.estimator
        # All that it takes to make the file again.
        recorded = found.record.settings
        assert recorded["entry"] == f"{HERE}:setup"
        assert recorded["loader"] == k
        assert options.items() <= recorded["options"].items()
        assert "samples" in recorded["options"]
        assert len(recorded["weights"][0][1]) == 64
    states = [dict(net.state_dict()) for net in nets()]
    method = "fisher" if kind == "fisher" else "regmean"
    merged = folder / "merged"
    more = {"parameters": {"ridge": 1e-6}} if kind == "gram" else {}
    file = merge_config(folder, method, [folder / "m0", folder / "m1"], **more)
    assert main(["merge", str(file), str(merged), "--quiet"]) == 0
    if kind == "fisher":
        expected_state = pymerge.fisher_merge(states, own)
    else:
        expected_state = pymerge.regmean_merge(states, own, ridge=1e-6)
    models.assert_same(models.load(merged), expected_state)


def test_it_goes_on_where_it_was_and_replaces_when_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(folder)
    assert main(["collect", str(file)]) == 0
    first = [folder / f"m{k}" / "fisher.safetensors" for k in (0, 1)]
    stamps = [path.stat().st_mtime_ns for path in first]
    first[1].unlink()
    capsys.readouterr()
    assert main(["collect", str(file)]) == 0
    shown = capsys.readouterr()
    assert "going on: 1 of 2 models are done" in shown.err
    assert re.search(r"m0 .* was there", shown.out)
    assert re.search(r"m1 .* collected", shown.out)
    assert first[0].stat().st_mtime_ns == stamps[0]
    # Other settings: it says which.
    config(folder, options={"samples": 5})
    assert main(["collect", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.count("samples was 256, now 5") == 2
    assert "--force replaces it" in message
    assert first[0].stat().st_mtime_ns == stamps[0]
    assert main(["collect", str(file), "--force"]) == 0
    assert capsys.readouterr().out.count("replaced") == 2
    assert pymerge.load_statistics(folder / "m0").record.examples == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": {"form": "names"}}, r"arguments was \{\}, now \{\"form\": \"names\"\}"),
        ({"entry": f"{HERE}:other"}, "entry was .*:setup', now .*:other'"),
        ({"models": ["m1", "m0"]}, "loader was 1, now 0.*loader was 0, now 1"),
        ({"options": {"labels": "true"}}, "labels was 'expected', now 'true'"),
    ],
)
def test_a_file_with_other_settings_is_not_taken_for_done(
    change: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_collect(config(folder))
    if "models" in change:
        change = {"models": [str(folder / name) for name in change["models"]]}
    assert main(["collect", str(config(folder, **change)), "--quiet"]) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def other() -> Any:
    return setup()


def test_a_file_of_other_weights_or_another_kind_is_not_taken_for_done(folder: Path) -> None:
    file = config(folder)
    run_collect(file)
    target = folder / "m0" / "fisher.safetensors"
    state = load_file(folder / "m0" / "model.safetensors")
    state["head.bias"] += 1
    save_file(state, folder / "m0" / "model.safetensors")
    with pytest.raises(pymerge.RequestError, match="the weights of the model were others"):
        run_collect(file)
    made = pymerge.collect_fisher(nets()[0], data(0))
    pymerge.save_statistics(target, made)
    with pytest.raises(pymerge.RequestError, match="was not made by `pymerge collect`"):
        run_collect(file)
    target.write_bytes(b"half of a file")
    with pytest.raises(pymerge.RequestError, match="it is damaged or no statistics"):
        run_collect(file)
    target.unlink()
    target.mkdir()
    with pytest.raises(pymerge.RequestError, match="is there, but is no file"):
        run_collect(file, force=True)


def test_a_dry_run_says_what_would_be_done(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = config(folder, arguments={"form": "names"}), folder / "new" / "stats"
    assert main(["collect", str(file), "--dry-run", "--out", str(out), "--verbose"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("to collect") == 2
    assert "nothing is written" in shown.err
    assert (
        "fisher of Net with 9 tensors: estimator exact, labels expected, samples 256" in shown.err
    )
    assert not out.parent.exists()
    assert main(["collect", str(file), "--out", str(out), "--verbose"]) == 0
    shown = capsys.readouterr()
    assert "12 examples; statistics of 6 tensors, 3 have none" in shown.err
    assert sorted(os.listdir(out)) == ["m0-fisher.safetensors", "m1-fisher.safetensors"]
    again = run_collect(file, out=out, dry_run=True)
    assert [one.state for one in again] == ["was there"] * 2
    assert [one.examples for one in again] == [12, 12]
    assert again[0].size == (out / "m0-fisher.safetensors").stat().st_size
    states = [one.state for one in run_collect(file, out=out, dry_run=True, force=True)]
    assert states == ["to replace"] * 2
    assert capsys.readouterr().err == ""
    merged = merge_config(folder, "fisher", [one.file for one in again])
    assert main(["merge", str(merged), str(folder / "merged"), "--quiet"]) == 0
    assert main(["collect", str(file), "--out", str(out), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_models_that_are_files_or_have_adapters(tmp_path: Path) -> None:
    from tests import adapter_files

    torch.manual_seed(1)
    tied = Tied()
    state = {name: t for name, t in tied.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "one.safetensors")
    torch.save({**state, "head.weight": state["embed.weight"]}, tmp_path / "two.bin")
    lora = tmp_path / "lora"
    a, b = torch.randn(2, 3), torch.randn(3, 2)
    adapter_files.save_lora(lora, {"inner": (b, a)}, r=2, lora_alpha=2)
    entries = [
        str(tmp_path / "one.safetensors"),
        str(tmp_path / "two.bin"),
        {"model": f"{tmp_path / 'one.safetensors'}+{lora}"},
    ]
    file = config(tmp_path, models=entries, entry=f"{HERE}:tied")
    with pytest.raises(pymerge.RequestError, match=r"is that of models\[0\].*too; give --out DIR"):
        run_collect(file)
    found = run_collect(file, out=tmp_path / "out")
    names = [one.file.name for one in found]
    assert names == [f"{name}-fisher.safetensors" for name in ("one", "two", "lora")]
    ids = [torch.arange(4)]
    plain = pymerge.collect_fisher(tied, ids)
    with torch.no_grad():
        tied.inner.weight += b @ a
    adapted = pymerge.collect_fisher(tied, ids)
    for one, expected in zip(found, (plain, plain, adapted), strict=True):
        read = pymerge.load_statistics(one.file)
        for name in expected:
            torch.testing.assert_close(read[name], expected[name])
        assert torch.equal(read["head.weight"], read["embed.weight"])
    recorded = pymerge.load_statistics(found[2].file).record.settings
    assert [name for name, _ in recorded["weights"]] == [
        "one.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    torch.save({**state, "head.weight": state["embed.weight"] + 1}, tmp_path / "two.bin")
    with pytest.raises(pymerge.RequestError, match=r"'embed.weight' and 'head.weight' differ"):
        run_collect(file, out=tmp_path / "out", force=True)
    # Beside the adapter, not beside the base that it shares.
    own = config(tmp_path, models=entries[2:], entry=f"{HERE}:tied", arguments={"count": 1})
    assert run_collect(own)[0].file == lora / "fisher.safetensors"


def tied(count: int = 3) -> CollectSetup:
    return CollectSetup(Tied(), [[torch.arange(4)]] * count)


# ------------------------------------------------------------------ what is refused


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
            r":\d+: options.parameters: 'haed' is no parameter",
        ),
    ],
)
def test_a_bad_configuration(
    change: dict[str, Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(config(folder, **change), capsys))


def entry_of(what: str) -> Any:
    """An entry point that is wrong in one way or another."""
    good = setup()
    nan = torch.full((4, 2, 5), torch.nan)
    headless = Net()
    headless.head = nn.Linear(3, 5)
    headless.extra = nn.Linear(1, 1)
    made: dict[str, Any] = {
        "nothing": None,
        "module": Net(),
        "no loaders": {"model": Net()},
        "odd key": {**good, "loader": []},
        "no module": {**good, "model": "net"},
        "no parameters": {**good, "model": nn.Tanh()},
        "meta": {**good, "model": Net().to("meta")},
        "one loader": {**good, "loaders": good["loaders"][:1]},
        "tensor": {**good, "loaders": torch.zeros(2, 3)},
        "names": {**good, "loaders": {"m0": [], "x": []}},
        "no function": {**good, "logits": 3},
        "few functions": {**good, "logits": [len]},
        "no functions": {**good, "logits": [len, 3]},
        "empty": {**good, "loaders": [[], []]},
        "no batches": {**good, "loaders": [good["loaders"][0][0][0]] * 2},
        "no tensors": {**good, "loaders": [[{"x": 3}]] * 2},
        "nan": {**good, "loaders": [[nan]] * 2},
        "bad shape": {**good, "loaders": [[torch.zeros(4, 3, 5)]] * 2},
        "misfit": {**good, "model": headless},
        "frozen": {**good, "model": Net().requires_grad_(False)},
    }
    if what == "raises":
        raise KeyError("the data are gone")
    return made[what]


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
    assert "is no folder" in refused(file, capsys, "--out", str(file))
    both = config(folder, models=[str(folder / "m0")] * 2)
    assert "give them names" in refused(both, capsys, "--out", str(folder / "out"))
    assert "cannot be read" in refused(folder / "none.yml", capsys)


# ------------------------------------------------------------------ interruptions


def slow(stop: str, folder: str) -> Any:
    """The second model's data never come."""

    def waiting() -> Iterator[Any]:
        yield data(1)[0]
        if stop == "raise":
            raise KeyboardInterrupt
        Path(folder, "waits").touch()
        while not Path(folder, "go").exists():
            time.sleep(0.02)
        yield data(1)[1]

    return {"model": Net(), "loaders": [data(0), waiting()]}


def test_an_interrupted_run_leaves_whole_files_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"stop": "raise", "folder": str(folder)}
    file = config(folder, entry=f"{HERE}:slow", arguments=arguments)
    assert main(["collect", str(file)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(os.listdir(folder / "m0")) == ["fisher.safetensors", "model.safetensors"]
    assert os.listdir(folder / "m1") == ["model.safetensors"]
    assert pymerge.load_statistics(folder / "m0").record.examples == 12


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_killed_run_leaves_whole_files_and_goes_on(
    name: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"stop": "wait", "folder": str(folder)}
    file = config(folder, entry=f"{HERE}:slow", arguments=arguments)
    command = [sys.executable, "-m", "pymerge", "collect", str(file)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (folder / "waits").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    child.send_signal(getattr(signal, name))
    child.communicate()
    assert child.returncode == code
    assert sorted(os.listdir(folder / "m0")) == ["fisher.safetensors", "model.safetensors"]
    assert os.listdir(folder / "m1") == ["model.safetensors"]
    # What a run that is killed while it writes leaves behind goes with the next.
    (folder / "m1" / ".fisher.safetensors.0123abcd").write_bytes(b"half")
    (folder / "go").touch()
    assert main(["collect", str(file)]) == 0
    assert "going on: 1 of 2" in capsys.readouterr().err
    assert sorted(os.listdir(folder / "m1")) == ["fisher.safetensors", "model.safetensors"]
    assert pymerge.load_statistics(folder / "m1").record.examples == 8


def test_nothing_of_one_model_is_left_in_the_next(folder: Path) -> None:
    """Each alone gives the same as both in a row, whatever the architecture's values."""
    run_collect(config(folder, kind="gram", options={"convolutions": True}))
    both = [load_file(folder / f"m{k}" / "gram.safetensors") for k in (0, 1)]
    one = config(
        folder,
        kind="gram",
        models=[str(folder / "m1")],
        entry=f"{HERE}:second",
        options={"convolutions": True},
    )
    run_collect(one, force=True)
    models.assert_same(load_file(folder / "m1" / "gram.safetensors"), both[1])
    assert not torch.equal(both[0]["head.weight"], both[1]["head.weight"])


def second() -> Any:
    torch.manual_seed(77)
    return {"model": Net(), "loaders": [data(1)]}


def with_functions(kind: str) -> CollectSetup:
    """Functions of both kinds, for all models, by position and by name."""

    def logits(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])[:, :3]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(2 * batch["x"])

    loaders = {f"m{k}": [{"x": x} for x, _ in data(k)] for k in (0, 1)}
    own: Any = {"m0": forward, "m1": None} if kind == "names" else forward
    return CollectSetup(Net(), loaders, logits=[logits, logits], forward=own, mask=lambda _: None)


def test_functions_of_the_entry_point_are_used(folder: Path) -> None:
    first = nets()[0]
    batches = [{"x": x} for x, _ in data(0)]
    for kind in ("fisher", "gram"):
        file = config(
            folder, kind=kind, entry=f"{HERE}:with_functions", arguments={"kind": "one for all"}
        )
        run_collect(file)
    fisher = pymerge.collect_fisher(first, batches, logits=lambda m, b: m(b["x"])[:, :3])
    gram = pymerge.collect_gram(first, batches, forward=lambda m, b: m(2 * b["x"]))
    for kind, expected in (("fisher", fisher), ("gram", gram)):
        models.assert_same(load_file(folder / "m0" / f"{kind}.safetensors"), dict(expected))
    recorded = pymerge.load_statistics(folder / "m1", kind="gram").record.settings
    assert recorded["loader"] == "m1"
    assert json.dumps(recorded)
    # By name, with none for the second: the default does not know batches with "x" alone.
    file = config(folder, kind="gram", entry=f"{HERE}:with_functions", arguments={"kind": "names"})
    found = run_collect(file, out=folder / "out")
    plain = pymerge.collect_gram(nets()[1], [{"x": x} for x, _ in data(1)])
    models.assert_same(load_file(found[1].file), dict(plain))
