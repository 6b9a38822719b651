"""Merges of checkpoints end to end: what may come in, and what lies beside the weights."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import pymerge
from pymerge.commands.main import main
from tests import models

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")


def mean(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    return (tuned[0] + tuned[1]) / 2


def write_two(root: Path, **options: Any) -> tuple[models.State, list[models.State]]:
    base, tuned = models.llama(2, **options)
    models.save_family(root, base, tuned, files=2)
    return base, tuned


# what comes in


def test_buffers_are_copied_and_tiny_tensors_merged(tmp_path: Path) -> None:
    base, tuned = write_two(tmp_path)
    pymerge.merge_checkpoints(models.config(tmp_path, "task_arithmetic", 2), tmp_path / "out")
    merged = models.load(tmp_path / "out")
    for name in models.COPIED_BUFFERS:
        assert torch.equal(merged[name], base[name])
        assert merged[name].dtype == base[name].dtype
    scalar, empty = (merged[name] for name in models.MERGED_BUFFERS)
    origin, first, second = (s[models.MERGED_BUFFERS[0]].float() for s in (base, *tuned))
    expected = (origin + ((first - origin) + (second - origin))).bfloat16()
    assert torch.equal(scalar, expected)
    assert scalar.shape == ()
    assert (empty.shape, empty.dtype) == ((0, 8), torch.bfloat16)


def test_a_head_tied_in_some_models_only(tmp_path: Path) -> None:
    """A model that leaves its tied head out merges with models that hold one."""
    base, tuned = models.llama(2, seed=1)
    del tuned[1]["lm_head.weight"]
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "m0", tuned[0])
    models.save(tmp_path / "m1", tuned[1], config=models.CONFIG | {"tie_word_embeddings": True})
    pymerge.merge_checkpoints(models.config(tmp_path, "linear", 2), tmp_path / "out")
    tuned[1]["lm_head.weight"] = tuned[1]["model.embed_tokens.weight"]
    expected = models.elementwise(base, tuned, mean, torch.bfloat16)
    models.assert_same(models.load(tmp_path / "out"), expected)


def test_a_tied_base_stays_tied(tmp_path: Path) -> None:
    """The output lacks the head as the base does; one that a model has is left out, and said."""
    base, tuned = models.llama(2, seed=2)
    del base["lm_head.weight"], tuned[0]["lm_head.weight"]
    tied = models.CONFIG | {"tie_word_embeddings": True}
    models.save(tmp_path / "base", base, config=tied)
    models.save(tmp_path / "m0", tuned[0], config=tied)
    models.save(tmp_path / "m1", tuned[1])
    for semantics in ("official", "mergekit"):
        config = models.config(tmp_path, "ties", 2, density=0.2, semantics=semantics)
        report = pymerge.merge_checkpoints(config, tmp_path / semantics)
        assert any("'lm_head.weight' is left out" in text for text in report.warnings)
        kept = {name: tensor for name, tensor in tuned[1].items() if name in base}
        expected = pymerge.ties_merge(base, [tuned[0], kept], density=0.2, semantics=semantics)
        models.assert_same(models.load(tmp_path / semantics), expected)
        written = json.loads((tmp_path / semantics / "config.json").read_text())
        assert written["tie_word_embeddings"] is True


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_state_dicts(zipped: bool, tmp_path: Path) -> None:
    base, tuned = models.llama(2, seed=3)
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "m0", tuned[0])
    (tmp_path / "m1").mkdir()
    torch.save(
        tuned[1], tmp_path / "m1" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    config = models.config(tmp_path, "ties", 2, density=0.2, semantics="official")
    report = pymerge.merge_checkpoints(config, tmp_path / "out")
    expected = pymerge.ties_merge(base, tuned)
    models.assert_same(models.load(tmp_path / "out"), expected)
    assert any("models[1]" in text and "weights_only" in text for text in report.warnings)


class Malicious:
    """Unpickled freely, it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    base, tuned = models.llama(1, seed=3)
    models.save(tmp_path / "base", base)
    (tmp_path / "m0").mkdir()
    trace = tmp_path / "trace"
    torch.save({**tuned[0], "evil": Malicious(trace)}, tmp_path / "m0" / "pytorch_model.bin")
    config = models.config(tmp_path, "task_arithmetic", 1)
    with pytest.raises(pymerge.RequestError, match="weights_only loading refused it") as caught:
        pymerge.merge_checkpoints(config, tmp_path / "out")
    assert "weights_only=False" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m0"]
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.is_dir()  # it would have


def test_single_files_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be one file, named relatively; OUT may be a str or a Path, in a new directory."""
    base, tuned = models.llama(2, seed=4)
    for name, state in {"b": base, "x": tuned[0], "y": tuned[1]}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    text = (
        "merge_method: task_arithmetic\nbase_model: b.safetensors\n"
        "models: [{model: x.safetensors}, {model: y.safetensors}]\n"
    )
    Path("config.yml").write_text(text)
    report = pymerge.merge_checkpoints("config.yml", "new/deep/out")
    models.assert_same(models.load(tmp_path / "new/deep/out"), pymerge.task_arithmetic(base, tuned))
    assert sorted(os.listdir("new/deep/out")) == [
        "README.md",
        "model.safetensors",
        "pymerge_report.json",
    ]
    assert report.config_text == text
    assert report.output.path == str(tmp_path / "new/deep/out")


def test_one_model_twice_is_allowed_with_a_warning(tmp_path: Path) -> None:
    _, tuned = write_two(tmp_path)
    config = models.config(tmp_path, "linear", 2)
    config["models"][1]["model"] = str(tmp_path / "x" / ".." / "m0")
    (tmp_path / "x").mkdir()
    report = pymerge.merge_checkpoints(config, tmp_path / "out")
    assert any("is the same model as models[0]" in text for text in report.warnings)
    models.assert_same(models.load(tmp_path / "out"), tuned[0])


def test_the_base_among_the_models_does_not_count(tmp_path: Path) -> None:
    """For methods with a base, as in mergekit; linear averages it like any other."""
    base, tuned = write_two(tmp_path)
    config = models.config(tmp_path, "ties", 2, density=0.3)
    config["models"].insert(0, {"model": config["base_model"], "parameters": {"weight": 5.0}})
    report = pymerge.merge_checkpoints(config, tmp_path / "ties")
    assert any("its parameters are not used" in text for text in report.warnings)
    expected = pymerge.ties_merge(base, tuned, density=0.3, semantics="mergekit")
    models.assert_same(models.load(tmp_path / "ties"), expected)

    config = models.config(tmp_path, "linear", 1)
    config["base_model"] = str(tmp_path / "base")
    config["models"].append({"model": config["base_model"]})
    pymerge.merge_checkpoints(config, tmp_path / "linear")
    models.assert_same(models.load(tmp_path / "linear"), pymerge.linear([tuned[0], base]))


def test_parameters_of_single_tensors(tmp_path: Path) -> None:
    """Filters give tensors weights, densities and rules of their own."""
    base, tuned = write_two(tmp_path, seed=5)
    config = models.config(
        tmp_path, "ties", 2, density=[{"filter": "mlp", "value": 0.5}, {"value": 0.1}]
    )
    config["parameters"]["merge"] = [{"filter": "norm", "value": "max"}, {"value": "sum"}]
    config["models"][1]["parameters"] = {"weight": [{"filter": "lm_head", "value": 0.0}]}
    pymerge.merge_checkpoints(config, tmp_path / "out")
    merged = models.load(tmp_path / "out")
    for name, tensor in base.items():
        expected = pymerge.ties_merge(
            tensor,
            [model[name] for model in tuned],
            density=0.5 if "mlp" in name else 0.1,
            merge="max" if "norm" in name else "sum",
            weights=[1.0, 0.0 if "lm_head" in name else 1.0],
            semantics="mergekit",
        )
        assert torch.equal(merged[name], expected), name


# what comes out


def test_transformers_loads_and_runs_the_output(tmp_path: Path) -> None:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError:
        pytest.skip("TRANSFORMERS IS NOT INSTALLED: install pymerge-kernels[test] to run this test")
    base, tuned = models.llama(2, torch.float32, seed=6, buffers=False)
    models.save_family(tmp_path, base, tuned, files=3)
    config = models.config(tmp_path, "ties", 2, density=0.2, semantics="official")
    config["out_dtype"] = "bfloat16"
    pymerge.merge_checkpoints(config, tmp_path / "out", shard_size="60KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    expected = pymerge.ties_merge(base, tuned, dtype=torch.bfloat16)
    models.assert_same(model.state_dict(), expected)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 256)
    assert bool(torch.isfinite(logits).all())


def test_index_names_every_tensor_and_the_total(tmp_path: Path) -> None:
    base, _ = write_two(tmp_path)
    report = pymerge.merge_checkpoints(
        models.config(tmp_path, "linear", 2), tmp_path / "out", shard_size="50KB"
    )
    index = json.loads((tmp_path / "out" / models.INDEX).read_text())
    assert sorted(index["weight_map"]) == sorted(base)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in base.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 4
    for name in files:
        assert name.endswith(f"-of-{len(files):05d}.safetensors")
        assert set(models.load_file(tmp_path / "out" / name)) == {
            tensor for tensor, file in index["weight_map"].items() if file == name
        }
    assert report.output.shards == {
        name: (tmp_path / "out" / name).stat().st_size for name in files
    }


def test_files_beside_the_weights(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text('{"base": 1}')
    (tmp_path / "base" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "m0" / "tokenizer.json").write_text('{"m0": 1}')
    (tmp_path / "m1" / "generation_config.json").write_text("{}")
    config = models.config(tmp_path, "task_arithmetic", 2) | {"out_dtype": "float32"}
    (tmp_path / "c.yml").write_text(yaml.safe_dump(config))
    pymerge.merge_checkpoints(tmp_path / "c.yml", tmp_path / "My_Merge")
    out = tmp_path / "My_Merge"
    assert sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "pymerge_report.json",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text()) == models.CONFIG | {
        "torch_dtype": "float32"
    }
    assert (out / "tokenizer.json").read_text() == '{"base": 1}'
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert (tmp_path / "c.yml").read_text() in card
    assert "# My\\_Merge\n" in card


def test_config_keeps_its_dtype_where_the_output_has_several(tmp_path: Path) -> None:
    base, tuned = models.llama(2)
    for state in (base, *tuned):
        state["model.norm.weight"] = state["model.norm.weight"].float()
    models.save(tmp_path / "base", base, config=models.CONFIG | {"torch_dtype": "float16"})
    for k, model in enumerate(tuned):
        models.save(tmp_path / f"m{k}", model)
    config = models.config(tmp_path, "task_arithmetic", 2)
    for dtype in (None, "bfloat16"):
        out = tmp_path / f"out-{dtype}"
        pymerge.merge_checkpoints(config | {"out_dtype": dtype}, out)
        written = json.loads((out / "config.json").read_text())
        assert written["torch_dtype"] == (dtype or "float16")


@pytest.mark.parametrize("checksums", [False, True])
def test_the_report_says_what_was_done(checksums: bool, tmp_path: Path) -> None:
    base, tuned = models.llama(2)
    for model in tuned:
        model["lm_head.weight"] += 0.1  # a clear majority of signs, so that one merge pass suffices
    models.save_family(tmp_path, base, tuned, files=2)
    config = models.config(tmp_path, "ties", 2, density=0.2, semantics="official")
    report = pymerge.merge_checkpoints(
        config,
        tmp_path / "out",
        seed=7,
        threads=2,
        backend="cpu",
        report=tmp_path / "copy.json",
        checksums=checksums,
    )
    inside = (tmp_path / "out" / "pymerge_report.json").read_text()
    copy = (tmp_path / "copy.json").read_text()
    for text in (inside, copy):
        read = pymerge.MergeReport.from_json(text)
        assert (read.method, read.seed, read.threads) == ("ties", 7, 2)
        assert (read.backend, read.device) == ("cpu", "cpu")
        assert read.isa in ("baseline", "avx2", "avx512")
        assert read.config == config
        assert yaml.safe_load(read.config_text) == config
        assert read.tensors == len(base)
        assert read.parameters == sum(tensor.numel() for tensor in base.values())
        assert read.versions["pymerge"] == pymerge.__version__
        assert read.versions["torch"] == torch.__version__
        assert 50 << 20 < read.peak_anonymous <= read.peak_resident
    assert pymerge.MergeReport.from_json(copy) == report
    assert [entry.path for entry in report.inputs] == [
        str(tmp_path / name) for name in ("base", "m0", "m1")
    ]
    for entry in report.inputs:
        assert len(entry.files) == 2
        for file in entry.files:
            content = (Path(entry.path) / file.name).read_bytes()
            assert file.bytes == len(content)
            expected = hashlib.sha256(content).hexdigest() if checksums else None
            assert file.sha256 == expected
    one_pass = 3 * sum(tensor.nbytes for tensor in base.values())
    copied = 3 * sum(base[name].nbytes for name in models.COPIED_BUFFERS)
    assert report.phases["ties"].bytes == one_pass
    assert report.phases["thresholds"].bytes in (one_pass - copied, 2 * (one_pass - copied))
    assert sum(phase.seconds for phase in report.phases.values()) <= report.seconds
    assert ("checksums" in report.phases) == checksums
    weights = tmp_path / "out" / "model.safetensors"
    assert report.output.shards == {"model.safetensors": weights.stat().st_size}


def test_progress_and_summary_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_two(tmp_path)
    (tmp_path / "c.yml").write_text(yaml.safe_dump(models.config(tmp_path, "ties", 2)))
    assert main(["merge", str(tmp_path / "c.yml"), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "ties: " in shown.out
    assert str(tmp_path / "out") in shown.out
    assert "pymerge: warning: " in shown.err
    assert "density is not set and is 1.0" in shown.err
    assert main(["merge", "--quiet", str(tmp_path / "c.yml"), str(tmp_path / "out2")]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_force_replaces_what_was_there(tmp_path: Path) -> None:
    _, tuned = write_two(tmp_path)
    config = models.config(tmp_path, "linear", 2)
    pymerge.merge_checkpoints(config, tmp_path / "out", shard_size="40KB")
    config["models"].pop()
    pymerge.merge_checkpoints(config, tmp_path / "out", force=True)
    models.assert_same(models.load(tmp_path / "out"), tuned[0])
    assert not (tmp_path / "out" / models.INDEX).exists()
    assert sorted(os.listdir(tmp_path)) == ["base", "m0", "m1", "out"]
