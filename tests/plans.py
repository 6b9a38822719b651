"""Plans of small models on disk: files and requests for the tests of plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pymerge.config import load_config
from pymerge.errors import RequestError
from pymerge.plan import MergePlan, make_plan

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve relative paths of models in the temporary directory."""
    monkeypatch.chdir(tmp_path)


def weights(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Tensors:
    """Return a small model; `changes` replace tensors (with __ for .), None removes one."""
    tensors: Tensors = {
        "embed.weight": torch.zeros(12, 4, dtype=dtype),
        "layers.0.mlp.weight": torch.ones(4, 4, dtype=dtype),
        "layers.0.norm.weight": torch.ones(4, dtype=dtype),
        "position_ids": torch.arange(6),
    }
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


def save(name: str, tensors: Tensors | None = None, config: dict[str, Any] | None = None) -> None:
    directory = Path(name)
    directory.mkdir()
    save_file(weights() if tensors is None else tensors, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def plan(method: str = "task_arithmetic", extra: str = "", **options: Any) -> MergePlan:
    base = "" if method == "linear" else "base_model: base\n"
    return plan_of(
        f"merge_method: {method}\n{base}models: [{{model: a}}, {{model: b}}]\n{extra}", **options
    )


def plan_of(text: str, **options: Any) -> MergePlan:
    Path("config.yml").write_text(text, encoding="utf-8")
    options.setdefault("threads", 2)
    with make_plan(load_config("config.yml"), **options) as made:
        return made


def problems(*args: Any, **options: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        plan(*args, **options)
    return caught.value.problems


def save_three(**changes: Tensors) -> None:
    """Write base, a and b; `changes` replace the tensors of some of them."""
    for name in ("base", "a", "b"):
        save(name, changes.get(name))
