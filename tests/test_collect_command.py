"""`pymerge collect`: files that merge as what Python collects, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.commands.main import main
from pymerge.statistics.run import run_collect
from tests import collect_entries as entries
from tests import models
from tests.collect_entries import HERE, Tied, config, data, nets

folder = entries.folder
no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")


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
    assert shown.err.count(": up to") == 2
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
    with pytest.raises(pymerge.RequestError, match="it is damaged, or not a file of statistics"):
        run_collect(file)
    target.unlink()
    target.mkdir()
    with pytest.raises(pymerge.RequestError, match="exists, but is not a file"):
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
    with pytest.raises(pymerge.RequestError, match=r"also the file of models\[0\].*; give --out"):
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


# ------------------------------------------------------------------ interruptions


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
