"""Configurations: what mergekit's language means here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymerge.config import MergeConfig, layer_depths, load_config
from pymerge.errors import RequestError


def load(text: str, tmp_path: Path) -> MergeConfig:
    path = tmp_path / "config.yml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


TIES = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight: 0.5
      density:
        - filter: mlp
          value: 0.3
        - filter: attn
          value: 1e-1
  - model: {model: {path: b}}
parameters:
  weight: 2
  lambda: 1e-3
  normalize: 1.0
dtype: torch.bfloat16
out_dtype: fp16
"""


def test_a_full_config_is_read(tmp_path: Path) -> None:
    config = load(TIES, tmp_path)
    assert config.method.name == "ties"
    assert config.base_model == "base"
    # the base is not one of the models, and the others keep their names in the file
    assert [(entry.path, entry.name) for entry in config.models] == [
        ("a", "models[1]"),
        ("b", "models[2]"),
    ]
    assert config.models[0].where == f"{tmp_path}/config.yml:5: models[1]"
    assert (config.dtype, config.out_dtype) == ("BF16", "F16")
    assert config.text == TIES
    assert config.warnings == []


def test_parameters_resolve_model_then_global_then_default(tmp_path: Path) -> None:
    config = load(TIES, tmp_path)
    mlp = config.resolve("model.layers.0.mlp.weight")
    assert mlp["weight"] == [0.5, 2.0]
    assert mlp["density"] == [0.3, 1.0]
    assert mlp["scale"] == 0.001
    assert mlp["normalize"] is True
    assert mlp["semantics"] == "mergekit"
    assert mlp["nan"] == "error"
    # a number that PyYAML reads as a string
    assert config.resolve("model.layers.0.attn.weight")["density"] == [0.1, 1.0]
    # no filter matches: as if the model had not set it
    assert config.resolve("norm")["density"] == [1.0, 1.0]


NAMES = ["embed", *(f"layers.{i}.{kind}.weight" for i in range(5) for kind in ("mlp", "q"))]


def resolved(config: MergeConfig, parameter: str) -> dict[str, Any]:
    depths = layer_depths(NAMES)
    return {name: config.resolve(name, depths.get(name, 0.0))[parameter] for name in NAMES}


def test_gradients_over_the_layers(tmp_path: Path) -> None:
    """Numbers are interpolated between the first layer and the last; the rest is at the first."""
    text = """
merge_method: task_arithmetic
base_model: b
models:
  - model: a
    parameters: {weight: [0, 1]}
  - model: c
    parameters:
      weight:
        - {filter: mlp, value: [1, 0.5, 4]}
        - {filter: layers, value: 7}
parameters:
  lambda: ["1e-1", 0.3]
  weight: 9
"""
    config = load(text, tmp_path)
    weights = resolved(config, "weight")
    assert weights["embed"] == [0, 9]
    assert [weights[f"layers.{i}.mlp.weight"] for i in range(5)] == [
        [0, 1],
        [0.25, 0.75],
        [0.5, 0.5],
        [0.75, 2.25],
        [1, 4],
    ]
    assert weights["layers.3.q.weight"] == [0.75, 7]
    assert resolved(config, "scale")["layers.2.q.weight"] == pytest.approx(0.2)
    assert all(setting.by_tensor for setting in config.models[0].parameters.values())


def test_gradients_of_switches_jump(tmp_path: Path) -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a}]\n"
        "parameters: {weight: 1, normalize: [true, false, true]}\n"
    )
    found = resolved(load(text, tmp_path), "normalize")
    assert [found[f"layers.{i}.q.weight"] for i in range(5)] == [True, True, False, False, True]
    assert found["embed"] is True


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.a", "h.1.a", "h.2.a", "wte"], {"h.0.a": 0.0, "h.1.a": 0.5, "h.2.a": 1.0}),
        (["model.layers.0.w"], {"model.layers.0.w": 1.0}),
        (
            ["encoder.layer.1.experts.3.w", "encoder.layer.0.experts.9.w"],
            {
                "encoder.layer.1.experts.3.w": 1.0,
                "encoder.layer.0.experts.9.w": 0.0,
            },
        ),
        (
            ["e.0.w", "e.3.w", "d.0.w", "d.1.w"],
            {
                "e.0.w": 0.0,
                "e.3.w": 1.0,
                "d.0.w": 0.0,
                "d.1.w": 1.0,
            },
        ),
        (["weight", "conv1.weight", "layers.7"], {}),
    ],
)
def test_depths_of_layers(names: list[str], expected: dict[str, float]) -> None:
    assert layer_depths(names) == expected


@pytest.mark.parametrize(
    "catch_all", ["value: 0.5", "{filter: '*', value: 0.5}", "{filter: null, value: 0.5}"]
)
def test_the_first_matching_filter_wins(catch_all: str, tmp_path: Path) -> None:
    config = load(
        f"""\
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {{filter: mlp, value: 1}}
        - {{filter: layers.0, value: 2}}
        - {catch_all}
        - {{filter: norm, value: 9}}
""",
        tmp_path,
    )
    assert config.resolve("layers.0.mlp")["weight"] == [1.0]
    assert config.resolve("layers.0.attn")["weight"] == [2.0]
    assert config.resolve("norm")["weight"] == [0.5]
    assert len(config.warnings) == 1
    assert "config.yml:9: models[0].parameters.weight[3]: is never used" in config.warnings[0]


def test_one_condition_needs_no_list(tmp_path: Path) -> None:
    config = load(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: {filter: x, value: 3}}}]\n",
        tmp_path,
    )
    assert config.resolve("x")["weight"] == [3.0]
    assert config.resolve("y")["weight"] == [1.0]


def test_a_list_that_is_the_same_for_all_tensors_is_one_value(tmp_path: Path) -> None:
    config = load(
        "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n"
        "parameters: {semantics: [{value: official}], density: [{value: 0.4}]}\n",
        tmp_path,
    )
    assert config.resolve("x")["density"] == [0.4]


@pytest.mark.parametrize(
    ("semantics", "density"),
    [
        ("", 1.0),
        ("semantics: mergekit", 1.0),
        ("semantics: official", 0.2),
        ("semantics: peft", 0.2),
    ],
)
def test_the_default_density_is_the_dialects(
    semantics: str, density: float, tmp_path: Path
) -> None:
    config = load(
        f"merge_method: ties\nbase_model: b\nmodels: [{{model: a}}]\nparameters: {{{semantics}}}\n",
        tmp_path,
    )
    assert config.resolve("x")["density"] == [density]
    assert any("nothing is trimmed" in warning for warning in config.warnings) == (density == 1.0)


def test_numbers_booleans_and_references_as_mergekit_spells_them(tmp_path: Path) -> None:
    config = load(
        "merge_method: task_arithmetic\nbase_model: {path: base}\nmodels:\n  - model: {path: a}\n"
        "    parameters: {weight: '-1E-2'}\nparameters: {normalize: 0, scale: 2}\n",
        tmp_path,
    )
    assert config.base_model == "base"
    assert config.models[0].path == "a"
    resolved = config.resolve("x")
    assert resolved == {"weight": [-0.01], "scale": 2.0, "normalize": False, "nan": "error"}


def test_yaml_anchors_and_merge_keys(tmp_path: Path) -> None:
    config = load(
        """\
merge_method: linear
models:
  - model: a
    parameters: &shared
      weight: 0.25
  - model: b
    parameters: *shared
  - model: c
    parameters:
      <<: *shared
  - model: d
    parameters:
      weight: 0.5
      <<: *shared
""",
        tmp_path,
    )
    assert config.resolve("x")["weight"] == [0.25, 0.25, 0.25, 0.5]


def test_a_mapping_is_a_config_too(tmp_path: Path) -> None:
    config = load_config(
        {
            "merge_method": "linear",
            "models": ({"model": tmp_path / "a", "parameters": {"weight": 2}},),
        }
    )
    assert config.models[0].path == str(tmp_path / "a")
    assert config.models[0].where == "config: models[0]"
    again = load(config.text, tmp_path)
    assert again.resolve("x") == config.resolve("x")


def test_errors_of_a_mapping_have_paths(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"config: models\[0\].parameters.weight: expected a finite"
    ):
        load_config(
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": "x"}}]}
        )


# Base and models


def test_parameters_of_a_listed_base_are_warned_about(tmp_path: Path) -> None:
    config = load(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "  - {model: ./base, parameters: {weight: 1, density: 0.5}}\n"
        "  - {model: a, parameters: {density: 0.5}}\n",
        tmp_path,
    )
    assert [entry.path for entry in config.models] == ["a"]
    assert len(config.warnings) == 1
    assert (
        "config.yml:4: models[0]: is the base_model; its parameters are not used"
        in config.warnings[0]
    )


def test_linear_averages_a_listed_base(tmp_path: Path) -> None:
    config = load(
        "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: base}]\n", tmp_path
    )
    assert [entry.path for entry in config.models] == ["a", "base"]
    assert config.side_files_from == "base"
    assert config.warnings == []


def test_linear_averages_an_unlisted_base_at_the_global_weight_as_mergekit(tmp_path: Path) -> None:
    config = load(
        "merge_method: linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 3}}]\n"
        "parameters: {weight: 2}\n",
        tmp_path,
    )
    assert [entry.path for entry in config.models] == ["a", "base"]
    assert config.resolve("x")["weight"] == [3.0, 2.0]
    assert "averaged with them at the global weight" in config.warnings[0]


@pytest.mark.parametrize("more", ["", "parameters: {normalize: false}\n"])
def test_linear_does_not_average_an_unlisted_base_without_a_weight(
    more: str, tmp_path: Path
) -> None:
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: a}]\n"
    config = load(text + more, tmp_path)
    assert [entry.path for entry in config.models] == ["a"]
    assert config.side_files_from == "base"
    assert "linear does not average it" in config.warnings[0]


def test_the_same_model_twice_is_allowed_and_warned_about(tmp_path: Path) -> None:
    config = load(
        "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: ./a}]\n", tmp_path
    )
    assert len(config.models) == 3
    assert len(config.warnings) == 1
    assert "models[2]: is the same model as models[0]: ./a" in config.warnings[0]


def test_a_directory_called_like_a_lora_reference_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("merge_method: linear\nmodels: [{model: c++}]\n", tmp_path).models[0].path == "c++"


@pytest.mark.parametrize(
    ("text", "path", "adapter"),
    [
        ("a", "a", None),
        ("a+l", "a", "l"),
        ("a+l+k", "a", "l+k"),
        ("c++/m+l", "c++/m", "l"),
        ("{model: a, lora: l}", "a", "l"),
        ("{model: {path: a}, lora: {path: l}}", "a", "l"),
        ("{model: a, lora: null}", "a", None),
    ],
)
def test_adapters_of_models(
    text: str, path: str, adapter: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load(f"merge_method: linear\nmodels: [{{model: {text}}}]\n", tmp_path)
    assert (config.models[0].path, config.models[0].adapter) == (path, adapter)


def test_a_base_with_and_without_an_adapter_are_two_models(tmp_path: Path) -> None:
    config = load(
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: b}, {model: b+l}]\n",
        tmp_path,
    )
    assert [entry.shown for entry in config.models] == ["b+l"]
    assert config.paths == ["b", "b", "l"]
    assert not config.warnings


def test_parameters_without_effect_are_warned_about(tmp_path: Path) -> None:
    config = load(
        "merge_method: task_arithmetic\nbase_model: b\nmodels: "
        "[{model: a, parameters: {density: 0.5}}]\nparameters: {int8_mask: true}\n",
        tmp_path,
    )
    assert len(config.warnings) == 2
    assert all("has no effect in task_arithmetic" in warning for warning in config.warnings)
    assert "density" not in config.resolve("x")


def test_numbers_of_python_numpy_and_torch_are_numbers() -> None:
    weights = (0.5, np.float32(0.25), torch.tensor(2))
    entries = [{"model": Path(f"m{k}"), "parameters": {"weight": w}} for k, w in enumerate(weights)]
    normalize = np.True_
    config = load_config(
        {"merge_method": "linear", "models": entries, "parameters": {"normalize": normalize}}
    )
    assert config.resolve("x")["weight"] == [0.5, 0.25, 2.0]
    assert config.resolve("x")["normalize"] is True
    assert config.paths == ["m0", "m1", "m2"]
    assert re.findall("(?:weight|normalize): (.*)", config.text) == ["0.5", "0.25", "2", "true"]


def test_reading_a_config_does_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(TIES, encoding="utf-8")
    code = (
        "import sys; from pymerge.config import load_config; load_config(sys.argv[1]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
