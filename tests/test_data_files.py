"""Merges with files of statistics: the same bytes as in memory, plans, and bad files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.checkpoint.statistics import StatisticsRecord
from pymerge.commands.main import main
from pymerge.config import load_config
from pymerge.memory import PeakMemory
from pymerge.merging.tensors import MemorySink
from pymerge.plan import make_plan
from pymerge.plan.statistics import matrix_bytes
from pymerge.statistics.files import ModelStatistics
from tests import models

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

Tensor = torch.Tensor
State = dict[str, Tensor]


def write(root: Path, method: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a family of checkpoints with statistics, and return the configuration of a merge."""
    base, tuned = models.llama(2, dtype, hidden=32, mlp=48, vocabulary=64)
    models.save_family(root, base, tuned, files=3)
    generator = torch.Generator().manual_seed(7)
    record = StatisticsRecord(
        "gram" if method == "regmean" else "fisher", model_tensors=tuple(base)
    )
    for k, name in enumerate(("m0", "m1", "base")):
        tensors: State = {}
        for key, tensor in base.items():
            if not tensor.is_floating_point() or "norm" in key:
                continue
            if record.kind == "fisher":
                tensors[key] = torch.randn(tensor.shape, generator=generator).square() / (k + 1)
            elif "proj" in key:
                x = torch.randn(60, tensor.shape[1], generator=generator)
                tensors[key] = x.T @ x / 60
        pymerge.save_statistics(root / name, ModelStatistics(tensors, record))
    entries = [
        {"model": str(root / f"m{k}"), "parameters": {"weight": k + 1.0, "statistics": path}}
        for k, path in enumerate(
            (str(root / "m0"), str(root / "m1" / f"{record.kind}.safetensors"))
        )
    ]
    made: dict[str, Any] = {"merge_method": method, "models": entries}
    if method == "gradient_matching":
        made["base_model"] = str(root / "base")
        made["parameters"] = {"base_statistics": str(root / "base"), "lambda": 0.7, "delta": 1e-3}
    return made


def in_memory(root: Path, method: str) -> State:
    states = {name: models.load_one(root / name) for name in ("base", "m0", "m1")}
    own = [pymerge.load_statistics(root / name) for name in ("m0", "m1")]
    tuned = [states["m0"], states["m1"]]
    if method == "gradient_matching":
        return pymerge.merge(
            method,
            states["base"],
            tuned,
            weights=[1, 2],
            statistics=own,
            base_statistics=pymerge.load_statistics(root / "base"),
            scale=0.7,
            delta=1e-3,
        )
    return pymerge.merge(method, None, tuned, weights=[1, 2], statistics=own)


@pytest.mark.parametrize("method", ["fisher", "regmean", "gradient_matching"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_and_tensors_give_the_same_bytes(
    method: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of threads, memory, size of pieces and output shards."""
    config = write(tmp_path, method, dtype)
    expected = in_memory(tmp_path, method)
    for number, options in enumerate(
        ({}, {"threads": 1, "memory": "300MiB"}, {"threads": 5, "shard_size": "40KB"})
    ):
        out = tmp_path / f"out{number}"
        report = pymerge.merge_checkpoints(config, out, checksums=number == 0, **options)
        models.assert_same(models.load(out), expected)
        assert report.backend == "reference"
        assert "no native kernels" in report.why
        assert any("slow reference backend: " in warning for warning in report.warnings)
        labels = [entry.label.split(" ")[0] for entry in report.inputs]
        assert "models[1].statistics" in labels
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["merge", str(file), str(tmp_path / "cli"), "--quiet"]) == 0
    models.assert_same(models.load(tmp_path / "cli"), expected)
    monkeypatch.setattr(MemorySink, "pieces", in_small_pieces)
    models.assert_same(in_memory(tmp_path, method), expected)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        models.assert_same(in_memory(tmp_path, method), expected)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def in_small_pieces(self: MemorySink, name: str) -> Iterator[tuple[int, Tensor]]:
    flat = self.tensors[name].view(-1)
    for start in range(0, flat.numel(), 1009):
        yield start, flat[start : start + 1009]


def test_the_plan_shows_the_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yml"
    for method, kind in (("regmean", "gram"), ("gradient_matching", "fisher")):
        config = write(tmp_path / method, method)
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        assert main(["plan", str(file)]) == 0
        shown = capsys.readouterr().out
        assert re.search(
            rf"input +models\[0\]\.statistics \(.*{kind}\.safetensors\): \d+ ten", shown
        )
        assert ("base_statistics (" in shown) == (method == "gradient_matching")
        assert ("for the largest linear system" in shown) == (method == "regmean")
    with make_plan(load_config(config)) as plan:
        files = sum(size for checkpoint in plan.inputs for _, size in checkpoint.files)
        assert 0.8 * files < plan.bytes_to_read < files


@pytest.mark.parametrize(
    ("method", "parameters", "passes"),
    [
        ("regmean", {}, 2),  # their sum, then each of them
        ("regmean", {"ridge": 1e-6}, 2),
        ("fisher", {"normalize": "none"}, 1),
        ("fisher", {"normalize": "global"}, 2),  # their norms first
        ("gradient_matching", {}, 1),
    ],
)
def test_bytes_to_read(
    method: str, parameters: dict[str, Any], passes: int, tmp_path: Path
) -> None:
    """Models once, and statistics, those of the base too, as often as the method reads them."""
    config = write(tmp_path, method, torch.bfloat16)
    config["parameters"] = config.get("parameters", {}) | parameters
    names = ["m0", "m1", *(["base"] if method == "gradient_matching" else [])]
    kind = "gram" if method == "regmean" else "fisher"
    read = 0
    for name in names:
        read += sum(tensor.nbytes for tensor in models.load_one(tmp_path / name).values())
        statistics = load_file(tmp_path / name / f"{kind}.safetensors")
        read += passes * sum(tensor.nbytes for tensor in statistics.values())
    with make_plan(load_config(config)) as plan:
        assert plan.bytes_to_read == plan.to_dict()["bytes_to_read"] == read
        # The passes are those over the models.
        assert plan.passes == 1
        assert ("over the statistics before it" in plan.passes_text) == (passes == 2)


def test_memory_of_linear_systems() -> None:
    """Three matrices [in, in] and the result, seven blocks [in, 512] a thread, in float64."""
    assert matrix_bytes(1000, 700, 3) == 8 * (3 * 1000**2 + 7 * 3 * 1000 * 512 + 1000 * 700)
    assert matrix_bytes(1500, 4, 1) == 8 * (3 * 1500**2 + 7 * 1500 * 4 + 1500 * 4)


def test_bytes_of_statistics_are_counted(tmp_path: Path) -> None:
    config = write(tmp_path, "regmean")
    report = pymerge.merge_checkpoints(config, tmp_path / "out")
    read = 0
    for name in ("m0", "m1"):
        files = (models.load_one(tmp_path / name), pymerge.load_statistics(tmp_path / name))
        read += sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    assert report.phases["regmean"].bytes == read


def of_layers(root: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Write two models of these layers with Gram matrices, and return the configuration."""
    record = StatisticsRecord("gram", model_tensors=tuple(shapes))
    grams = {key: torch.eye(columns) for key, (_, columns) in shapes.items()}
    entries = []
    for name in ("x", "y"):
        model, gram = root / f"{name}.safetensors", root / f"{name}-g.safetensors"
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, model)
        pymerge.save_statistics(gram, ModelStatistics(grams, record))
        entries.append({"model": str(model), "parameters": {"statistics": str(gram)}})
    return {"merge_method": "regmean", "models": entries}


def test_a_linear_system_may_be_the_largest_by_its_outputs(tmp_path: Path) -> None:
    with make_plan(load_config(of_layers(tmp_path, {"a": (5000, 30), "b": (4, 40)}))) as plan:
        assert plan.memory.matrix_bytes == matrix_bytes(30, 5000, plan.memory.solvers)


def test_memory_of_linear_systems_is_planned(tmp_path: Path) -> None:
    config = write(tmp_path, "regmean")
    large = of_layers(tmp_path, {"a_proj": (4, 20), "b_proj": (4, 1500), "c_proj": (4, 30)})
    with pytest.raises(pymerge.RequestError, match=r"memory: .* is too little.*works is \d+MiB"):
        make_plan(load_config(large), memory=280 << 20)
    with make_plan(load_config(large)) as plan:
        assert plan.memory.matrix_bytes == matrix_bytes(1500, 4, plan.threads)
        least = plan.memory.matrix_bytes
    with make_plan(load_config(config), threads=64) as plan:
        assert plan.memory.solvers == 64
        # The largest is that of mlp.down_proj, [32, 48].
        assert plan.memory.matrix_bytes == matrix_bytes(48, 32, 64)
        everything = plan.slots * plan.slot_bytes + plan.memory.matrix_bytes
        assert plan.memory_bytes == (256 << 20) + everything
    with make_plan(load_config(config), threads=64, memory=263 << 20) as plan:
        assert 0 < plan.memory.solvers < 64
        assert plan.memory.matrix_bytes == matrix_bytes(48, 32, plan.memory.solvers)
        # One thread more, and it would not fit with the smallest slots.
        more = matrix_bytes(48, 32, plan.memory.solvers + 1)
        assert plan.memory_bytes <= 263 << 20 < (258 << 20) + more
    report = pymerge.merge_checkpoints(large, tmp_path / "out", memory=least + (300 << 20))
    assert report.seconds > 0


def test_every_problem_of_the_statistics_is_reported_at_once(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    first = load_file(tmp_path / "m0" / "fisher.safetensors")
    record = pymerge.load_statistics(tmp_path / "m0").record
    shrunk = {n: t[:1] if n == "lm_head.weight" else t for n, t in first.items()}
    del shrunk["model.embed_tokens.weight"]
    shrunk["model.embed_tokns.weight"] = torch.ones(2)
    path = tmp_path / "wrong.safetensors"
    pymerge.save_statistics(path, ModelStatistics(shrunk, record))
    config["models"][0]["parameters"]["statistics"] = str(path)
    with pytest.raises(pymerge.RequestError) as caught:
        pymerge.merge_checkpoints(config, tmp_path / "out")
    text = str(caught.value)
    assert re.search(r"models\[0\]\.statistics \(.*\): 'lm_head.weight' has shape \(1, 32\)", text)
    assert "statistics of another architecture" in text
    assert "'model.embed_tokns.weight'" in text
    assert "lacks the statistics of 'model.embed_tokens.weight'" in text
    assert not (tmp_path / "out").exists()
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda c: c["models"][1]["parameters"].pop("statistics"), "'statistics' is missing"),
        (lambda c: c["models"][1]["parameters"].update(statistics="none"), "no such file"),
        (lambda c: c["models"][1]["parameters"].update(statistics=3), "expected the path of"),
        (
            lambda c: c["models"][1]["parameters"].update(
                statistics=[{"filter": "a", "value": "b"}]
            ),
            "expected one value for all tensors",
        ),
        (lambda c: c.update(parameters={"base_statistics": "x"}), "no parameter 'base_statistics'"),
        (lambda c: [m["parameters"].update(weight=0) for m in c["models"]], "all weights are 0"),
        (lambda c: c["models"][0]["parameters"].update(weight=-1), "a finite number >= 0"),
        (lambda c: c.update(parameters={"semantics": "mergeml"}), "did you mean 'mergelm'"),
    ]
    for change, message in cases:
        own = write(tmp_path / message.replace(" ", "_").replace("'", ""), "fisher")
        change(own)
        with pytest.raises(pymerge.RequestError) as caught, make_plan(load_config(own)):
            pass
        assert message in str(caught.value)
    # A directory has statistics of the right kind, or there is no such file.
    other = write(tmp_path / "kinds", "regmean")
    other["models"][0]["parameters"]["statistics"] = str(tmp_path / "m0")
    with pytest.raises(pymerge.RequestError, match=r"no such file.*gram\.safetensors"):
        make_plan(load_config(other))
    other["models"][0]["parameters"]["statistics"] = str(tmp_path / "m0" / "fisher.safetensors")
    with pytest.raises(pymerge.RequestError, match="holds fisher statistics; regmean needs gram"):
        make_plan(load_config(other))
    other["models"][0]["parameters"]["statistics"] = str(tmp_path / "m0.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "m0.safetensors")
    with pytest.raises(pymerge.RequestError, match="is no file of statistics"):
        make_plan(load_config(other))


def test_values_that_no_statistics_have_are_found_while_merging(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    path = tmp_path / "m1" / "fisher.safetensors"
    tensors = load_file(path)
    record = pymerge.load_statistics(path).record
    for value in (-1.0, math.nan, math.inf):
        tensors["lm_head.weight"].view(-1)[77] = value
        save_file(tensors, path, metadata=record.to_metadata())
        with pytest.raises(pymerge.RequestError, match=r"models\[1\]\.statistics.*index 77"):
            pymerge.merge_checkpoints(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_warnings_about_tensors_of_which_nothing_is_known(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    for name in ("m0", "m1"):
        own = pymerge.load_statistics(tmp_path / name)
        less = {n: own[n] for n in own if "layers.1" not in n}
        known = tuple(n for n in own.record.model_tensors if "layers.1" not in n)
        record = StatisticsRecord("fisher", model_tensors=known)
        pymerge.save_statistics(tmp_path / name, ModelStatistics(less, record))
    with make_plan(load_config(config)) as plan:
        assert any("9 tensors are averaged" in warning for warning in plan.warnings)


def test_statistics_beside_a_model_are_not_its_weights(tmp_path: Path) -> None:
    state = {"weight": torch.ones(2, 2)}
    statistics = pymerge.collect_fisher(torch.nn.Linear(2, 2, bias=False), [torch.ones(1, 2)])
    for name in ("named", "pickled", "none"):
        (tmp_path / name).mkdir()
        pymerge.save_statistics(tmp_path / name, statistics)
    save_file(state, tmp_path / "named" / "mine.safetensors")
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    entries = [
        {"model": str(tmp_path / name), "parameters": {"statistics": str(tmp_path / name)}}
        for name in ("named", "pickled", "none")
    ]
    config: dict[str, Any] = {"merge_method": "fisher", "models": entries[:2]}
    pymerge.merge_checkpoints(config, tmp_path / "out")
    models.assert_same(models.load(tmp_path / "out"), state)
    config["models"] = entries
    with pytest.raises(pymerge.RequestError, match="holds no weights"):
        pymerge.merge_checkpoints(config, tmp_path / "two")


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """Pieces of an element-by-element merge: less than any of the four inputs takes, in doubles."""
    numel = 1 << 23
    record = StatisticsRecord("fisher", model_tensors=("w",))
    entries = []
    for k in range(2):
        model, statistics = tmp_path / f"m{k}.safetensors", tmp_path / f"f{k}.safetensors"
        save_file({"w": torch.full((numel,), float(k))}, model)
        pymerge.save_statistics(statistics, ModelStatistics({"w": torch.ones(numel)}, record))
        entries.append({"model": str(model), "parameters": {"statistics": str(statistics)}})
    config = {"merge_method": "fisher", "models": entries}
    pymerge.merge_checkpoints(config, tmp_path / "first", memory="270MiB")  # what torch loads
    with PeakMemory() as before:
        pass
    report = pymerge.merge_checkpoints(config, tmp_path / "out", memory="270MiB")
    assert report.peak_anonymous - before.anonymous < numel * 4
    merged = models.load(tmp_path / "out")["w"]
    assert torch.equal(merged, torch.full((numel,), 0.5))


def test_out_does_not_replace_what_holds_statistics(tmp_path: Path) -> None:
    config = write(tmp_path, "fisher")
    place = tmp_path / "statistics"
    place.mkdir()
    for k, name in enumerate(("m0", "m1")):
        path = pymerge.save_statistics(
            place / f"{name}.safetensors", pymerge.load_statistics(tmp_path / name)
        )
        config["models"][k]["parameters"]["statistics"] = str(path)
    with pytest.raises(pymerge.RequestError, match="statistics"):
        pymerge.merge_checkpoints(config, place, force=True)
    assert len(list(place.iterdir())) == 2
