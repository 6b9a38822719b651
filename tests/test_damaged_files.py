"""Whatever happens to a file that is read, it is read, or an error names it: no traceback."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import pymerge
from pymerge import AdaMerging
from pymerge.adamerging.checkpoint import load_state
from pymerge.adamerging.config import read_config as read_ada
from pymerge.adapters import load
from pymerge.adapters.config import _Request
from pymerge.analysis import write_analysis
from pymerge.analysis.output import load_analysis, tables
from pymerge.analysis.summary import print_summary
from pymerge.checkpoint import open_checkpoint
from pymerge.checkpoint.peft.adapter import Adapter
from pymerge.config import load_config
from pymerge.errors import RequestError
from pymerge.merging.report import MergeReport
from pymerge.methods.adamerging.coefficients import read_coefficients
from pymerge.output import copy_side_files
from pymerge.plan import make_plan
from pymerge.search.config import load_search
from pymerge.search.journal import Journal, Trial
from pymerge.statistics.config import read_config as read_collect
from tests import models
from tests.adapter_files import PREFIX, factors, save_adapter, save_lora
from tests.damage import bytes_damaged, header_damaged, texts_damaged, values_damaged

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting

ROUNDS = int(os.environ.get("PYMERGE_DAMAGES", "24"))
SEED = int(os.environ.get("PYMERGE_DAMAGE_SEED", "0"))


@dataclass
class Case:
    """A file, its format, and what reads it."""

    file: Path
    read: Callable[[], Any]
    kind: str = "json"
    metadata: tuple[str, ...] = ()
    name: str | None = None

    def damaged(self) -> Iterator[bytes]:
        content = self.file.read_bytes()
        yield from bytes_damaged(content, SEED, ROUNDS)
        if self.kind == "json":
            yield from (text.encode() for text in texts_damaged(json.loads(content), SEED, ROUNDS))
        elif self.kind == "lines":
            lines = content.splitlines(keepends=True)
            for at in (0, 1):
                for text in texts_damaged(json.loads(lines[at]), SEED, ROUNDS):
                    yield b"".join([*lines[:at], text.encode() + b"\n", *lines[at + 1 :]])
        elif self.kind == "yaml":
            for value in values_damaged(yaml.safe_load(content), SEED, ROUNDS):
                yield yaml.safe_dump(value, sort_keys=False).encode()
            for text in texts_damaged(yaml.safe_load(content), SEED, ROUNDS):
                yield text.encode()
        else:
            for key in (None, *self.metadata):
                yield from header_damaged(content, key, SEED, ROUNDS)


def of_journal(folder: Path) -> Case:
    identity = {"merge": {"models": [{"model": "a"}], "k": None}, "seed": 3, "sampler": "grid"}
    trials = [
        Trial(0, {"x": 0.5}, "complete", 1.5, {"accuracy": 1.5, "odd": float("nan")}),
        Trial(1, {"x": 0.75}, "failed", None, {}, "boom", 0.1, 0.2, 0.3),
    ]
    journal = Journal(folder, identity)
    for trial in trials:
        journal.add(trial)
    journal.close()

    def read() -> None:
        journal = Journal(folder, identity)
        journal.close()

    return Case(folder / "study.jsonl", read, "lines")


def of_statistics(folder: Path) -> Case:
    statistics = pymerge.collect_gram(nn.Linear(3, 2), [torch.ones(4, 3)])
    file = folder / "gram.safetensors"
    pymerge.save_statistics(file, statistics)
    return Case(
        file,
        lambda: str(pymerge.load_statistics(file)),
        "safetensors",
        ("pymerge_statistics",),
    )


def of_planned_statistics(folder: Path) -> Case:
    """The same file, as a merge reads it."""
    layer = nn.Linear(3, 2)
    state = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    for name in "ab":
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
        pymerge.save_statistics(folder / name, pymerge.collect_gram(layer, [torch.ones(4, 3)]))
    entries = [
        {"model": str(folder / n), "parameters": {"statistics": str(folder / n)}} for n in "ab"
    ]
    config = load_config({"merge_method": "regmean", "models": entries})

    def read() -> None:
        with make_plan(config, threads=1) as plan:
            plan.to_dict()

    return Case(folder / "b" / "gram.safetensors", read, "safetensors", ("pymerge_statistics",))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def ada() -> tuple[AdaMerging, Callable[..., Any]]:
    net = Net()
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    made = AdaMerging(net, state, [{n: t + k for n, t in state.items()} for k in (1, 2)])
    batches = [[torch.ones(2, 2)], [torch.zeros(2, 2)]]

    def fit(file: Path, **more: Any) -> Any:
        return made.fit(batches, 2, checkpoint=file, progress=False, checkpoint_every=1, **more)

    return made, fit


def of_state(folder: Path) -> Case:
    made, fit = ada()
    file = folder / "state.safetensors"
    fit(file)
    settings = json.loads(open_checkpoint(file, "x").metadata["settings"])

    def read() -> Any:
        optimizer = torch.optim.Adam([made.raw_coefficients])
        history = load_state(file, made, optimizer, settings)
        assert made.raw_coefficients.isfinite().all()
        return [row["entropy"] for row in history]

    return Case(file, read, "safetensors", ("settings", "history"))


def of_coefficients(folder: Path) -> Case:
    made, _ = ada()
    file = folder / "coefficients.safetensors"
    made.save_coefficients(file)
    keys = ("models", "groups", "layers", "fixed", "trimmed", "density")
    return Case(file, lambda: read_coefficients(str(file)), "safetensors", keys)


def of_analysis(folder: Path) -> Case:
    base = {"h.0.w": torch.zeros(2, 3), "n": torch.ones(2)}
    tuned = [{n: t + k for n, t in base.items()} for k in (1, 2)]
    found = pymerge.analyze(base, tuned, densities=[0.5], spectra=True, rank=2)
    write_analysis(found, folder / "an", html=False)

    def read() -> None:
        with open(os.devnull, "w") as stream:
            print_summary(load_analysis(folder / "an"), stream=stream)
        tables(load_analysis(folder / "an"))

    return Case(folder / "an" / "analysis.json", read)


def of_report(folder: Path) -> Case:
    save_file({"w": torch.ones(2)}, folder / "m.safetensors")
    config = {"merge_method": "linear", "models": [{"model": str(folder / "m.safetensors")}] * 2}
    pymerge.merge_checkpoints(config, folder / "out")
    file = folder / "out" / "pymerge_report.json"
    return Case(file, lambda: MergeReport.from_json(file.read_bytes()).summary(), name="report")


def lora(folder: Path) -> Path:
    pairs = factors({"h.0.q": (4, 3), "h.0.k": (3, 3)}, 2)
    return save_lora(
        folder / "a", pairs, r=2, rank_pattern={"k": 2}, alpha_pattern={"q": 4.0}, use_rslora=False
    )


def used(adapter: Adapter) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in adapter.modules:
            adapter.delta(name)
    adapter.close()


def of_adapter(folder: Path) -> Case:
    path = lora(folder)
    return Case(path / "adapter_config.json", lambda: used(load(path)))


def of_ia3(folder: Path) -> Case:
    tensors = {
        f"{PREFIX}m.up.ia3_l": torch.ones(3, 1),
        f"{PREFIX}m.down.ia3_l": torch.ones(1, 4),
    }
    more = {"peft_type": "IA3", "feedforward_modules": ["down"], "r": ..., "lora_alpha": ...}
    path = save_adapter(folder / "a", tensors, **more)

    def read() -> None:
        adapter = load(path)
        adapter.vector(next(iter(adapter.modules)))
        adapter.close()

    return Case(path / "adapter_config.json", read)


def of_weights(folder: Path) -> Case:
    path = lora(folder)
    return Case(path / "adapter_model.safetensors", lambda: used(load(path)), "safetensors")


def checkpoint(folder: Path) -> Path:
    path = folder / "m"
    path.mkdir()
    save_file({"a": torch.ones(2)}, path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {"x": 1}}))
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "n": [1, 2]}
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return path


def of_index(folder: Path) -> Case:
    path = checkpoint(folder)
    return Case(
        path / "model.safetensors.index.json", lambda: open_checkpoint(path, str(path)).close()
    )


def of_config(folder: Path) -> Case:
    path = checkpoint(folder)

    def read() -> None:
        open_checkpoint(path, str(path)).close()
        shutil.rmtree(folder / "copy", ignore_errors=True)
        (folder / "copy").mkdir()
        copy_side_files(path, folder / "copy", dtype="BF16")

    return Case(path / "config.json", read)


def of_yaml(name: str, value: Any, read: Callable[[Path], Any]) -> Callable[[Path], Case]:
    def made(folder: Path) -> Case:
        file = folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(value, sort_keys=False))
        return Case(file, lambda: read(file), "yaml")

    return made


MERGE = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 1.0, "density": [0.5, 1.0]}},
        {"model": {"model": "b", "lora": "c"}},
    ],
    "parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}], "scale": 1},
    "dtype": "bfloat16",
}
ADA = {
    "base_model": "base",
    "models": ["a", {"model": "b", "name": "second"}],
    "entry": "module:function",
    "arguments": {"x": [1]},
    "granularity": ["a", "b"],
    "init": [0.1, 0.2],
    "clamp": [0, 1],
    "fit": {"steps": 5, "lr": 0.01, "weights": [1, 2], "autocast": "bfloat16"},
}
COLLECT = {
    "kind": "fisher",
    "models": ["a", {"model": "b", "name": "second"}],
    "entry": "module:function",
    "arguments": {"x": [1]},
    "options": {"samples": 2, "seed": 1},
}
SEARCH = {
    "merge": {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]},
    "data": {"search": "validation", "report": {"name": "held out"}},
    "metric": "module:function",
    "sampler": "random",
    "parameters": {"models[*].parameters.weight": {"low": 0.0, "high": 1.0}, "x": [1, 2]},
    "budget": {"evaluations": 3, "seconds": 5},
    "seed": 1,
}
ADAPTERS = {
    "merge_method": "peft_ties",
    "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b"}],
    "parameters": {"density": 0.5, "majority_sign_method": "total"},
    "saved": "drop",
    "dtype": "float32",
}
CASES: dict[str, Callable[[Path], Case]] = {
    "journal": of_journal,
    "statistics": of_statistics,
    "planned statistics": of_planned_statistics,
    "state": of_state,
    "coefficients": of_coefficients,
    "analysis": of_analysis,
    "report": of_report,
    "adapter_config": of_adapter,
    "ia3": of_ia3,
    "adapter weights": of_weights,
    "index": of_index,
    "config": of_config,
    "merge": of_yaml("merge", MERGE, load_config),
    "ada": of_yaml("ada", ADA, read_ada),
    "collect": of_yaml("collect", COLLECT, read_collect),
    "search": of_yaml("search", SEARCH, load_search),
    "adapters": of_yaml("adapters", ADAPTERS, lambda file: checked(_Request(file).problems)),
}


def checked(problems: list[str]) -> None:
    if problems:
        raise RequestError(problems)


@pytest.mark.filterwarnings("ignore:.*weights_only")
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_damaged_file_is_read_or_named(make: Callable[[Path], Case], tmp_path: Path) -> None:
    case = make(tmp_path)
    case.read()
    good = case.file.read_bytes()
    refused = 0
    for damaged in case.damaged():
        case.file.write_bytes(damaged)
        try:
            case.read()
        except RequestError as error:
            refused += 1
            text = str(error)
            assert (case.name or case.file.name) in text, (damaged[:2000], text)
            text.encode()
        except Exception as error:
            pytest.fail(f"{error!r} of {damaged[:2000]!r}")
    assert refused > ROUNDS / 2
    case.file.write_bytes(good)
    case.read()
    case.file.unlink()
    case.file.mkdir()
    with pytest.raises((RequestError, IsADirectoryError)):
        case.read()


def test_integers_of_records_have_64_bits(tmp_path: Path) -> None:
    """No number is too large to be shown."""
    case = of_report(tmp_path)
    report = json.loads(case.file.read_bytes())
    report["output"]["bytes"] = 10**400
    case.file.write_text(json.dumps(report))
    with pytest.raises(RequestError, match=r"report: output.bytes: expected an integer of 64 bits"):
        case.read()
