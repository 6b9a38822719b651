"""What a plan says will be read is what the ops of the merge read, to the byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pymerge
from pymerge.config import load_config
from pymerge.merging.files import CheckpointSource
from pymerge.methods import MethodSpec
from pymerge.ops.array import Array
from pymerge.ops.runner import Runner
from pymerge.ops.specs import OPS
from pymerge.plan import make_plan
from tests.test_golden import CASES

# More elements than are simply held and sorted. Values repeat, so that a sample hits thresholds.
SHAPES = {"a": (300, 256), "b": (70_001,)}
# Scores hardly repeat: whether a sample's bracket suffices is chance.
SCORED = ("pcb", "arcee_fusion")
# What they read is read again at once, a block at a time, by the op that they are for.
AHEAD = ("row_ranks_",)
METHOD_CASES = {
    name: (spec, parameters)
    for name, (spec, parameters) in CASES.items()
    if spec.statistics is None and spec.for_tensor is None
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base = {name: tensor.mul(4).round() / 8 for name, tensor in drawn.items()}
    for name in ("base", "m0", "m1", "m2"):
        state = dict(base)
        if name != "base":
            for key, tensor in base.items():
                state[key] = tensor + torch.randn(tensor.shape, generator=generator).round() / 8
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({"model_type": "x"}))
        state = {key: tensor.to(torch.bfloat16) for key, tensor in state.items()}
        save_file(state, root / name / "model.safetensors")
    return root


def config_of(root: Path, spec: MethodSpec, parameters: Mapping[str, Any]) -> dict[str, Any]:
    count = spec.max_models or 3
    given = {p.yaml_names[0]: parameters[p.name] for p in spec.parameters if p.name in parameters}
    made: dict[str, Any] = {
        "merge_method": spec.name,
        "models": [{"model": str(root / f"m{k}")} for k in range(count)],
        "parameters": given,
        "dtype": "bfloat16",
    }
    if spec.needs_base or spec.takes_base:
        made["base_model"] = str(root / "base")
    return made


class Reads:
    """Adds up the bytes of inputs that ops are given, those of files alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self._files: list[tuple[int, int]] = []
        own_call, own_load = Runner.call, CheckpointSource.load

        def call(
            runner: Runner, op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]
        ) -> None:
            spec = OPS[op]
            named = spec.bind(arguments, keywords)
            for name in () if op in AHEAD else spec.flats:
                if name not in spec.written and named[name] is not None:
                    value = named[name]
                    for flat in value if isinstance(value, (list, tuple)) else [value]:
                        self._add(flat)
            own_call(runner, op, arguments, keywords)

        def load(source: Any, name: str) -> Any:
            base, models = own_load(source, name)
            flats = [flat for flat in (base, *models) if flat is not None]
            self._files += [(flat.data_ptr(), flat.data_ptr() + flat.nbytes) for flat in flats]
            return base, models

        monkeypatch.setattr(Runner, "call", call)
        monkeypatch.setattr(CheckpointSource, "load", load)

    def _add(self, flat: Any) -> None:
        if not isinstance(flat, Array):
            return
        if any(begin <= flat.data_ptr() < end for begin, end in self._files):
            self.nbytes += flat.nbytes


@pytest.mark.parametrize("name", METHOD_CASES)
def test_bytes_to_read(
    name: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, parameters = METHOD_CASES[name]
    config = config_of(family, spec, parameters)
    with make_plan(load_config(config), memory=1 << 30, threads=2) as plan:
        total = sum(tensor.numel for tensor in plan.tensors.values())
        most = plan.most_bytes_to_read
        steps = {t.name: spec.steps(t.parameters, t.numel, total) for t in plan.tensors.values()}
        numels = {t.name: t.numel for t in plan.tensors.values()}
    reads = Reads(monkeypatch)
    pymerge.merge_checkpoints(config, tmp_path / "out", threads=2)
    inputs = (1 + len(config["models"])) if "base_model" in config else len(config["models"])
    planned = sampled = 0
    for tensor, numel in numels.items():
        nbytes = 2 * numel * inputs
        planned += nbytes * sum(step.passes for step in steps[tensor])
        sampled += nbytes * sum(step.name == "sample" for step in steps[tensor])
    assert plan.bytes_to_read == planned
    assert planned <= most
    # A sample touches lines here and there; the plan counts it as reading all.
    if spec.name in SCORED:
        assert planned // 2 < reads.nbytes <= most
    else:
        assert reads.nbytes == planned - sampled
