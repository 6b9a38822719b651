"""Configurations: every way to get one wrong, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymerge.config import load_config
from pymerge.errors import RequestError
from tests.test_config import load


def problems(text: str, tmp_path: Path) -> list[str]:
    with pytest.raises(RequestError) as caught:
        load(text, tmp_path)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


# Errors: (config, what the single problem must hold)

HEAD = "merge_method: task_arithmetic\nbase_model: b\nmodels:\n  - model: a\n"

ONE_PROBLEM: dict[str, tuple[str, str]] = {
    "unknown method": (
        HEAD.replace("task_arithmetic", "task_aritmetic"),
        "config.yml:1: merge_method: unknown merge method 'task_aritmetic'; did you mean "
        "'task_arithmetic'?",
    ),
    "unknown key": (
        HEAD + "dtpye: float32\n",
        "config.yml:5: dtpye: unknown key 'dtpye'; did you mean 'dtype'?",
    ),
    "unknown key of a model": (
        HEAD + "    paramters: {}\n",
        "config.yml:5: models[0].paramters: unknown key 'paramters'; did you mean 'parameters'?",
    ),
    "a parameter beside model": (
        HEAD + "    weight: 1\n",
        "config.yml:5: models[0].weight: 'weight' is a parameter; put it under 'parameters:'",
    ),
    "unknown parameter": (
        HEAD + "parameters: {lamda: 1}\n",
        "config.yml:5: parameters.lamda: task_arithmetic has no parameter 'lamda'; did you mean "
        "'lambda'?",
    ),
    "two spellings of one parameter": (
        HEAD + "parameters:\n  lambda: 1\n  scale: 1\n",
        "config.yml:7: parameters.scale: is the same parameter as config.yml:6: parameters.lambda",
    ),
    "a value of the wrong type": (
        HEAD + "parameters:\n  lambda: high\n",
        "config.yml:6: parameters.lambda: expected a finite number, got 'high'",
    ),
    "a boolean as number": (
        HEAD + "parameters: {lambda: true}\n",
        "parameters.lambda: expected a finite number, got True",
    ),
    "no value": (
        HEAD + "parameters: {lambda: }\n",
        "parameters.lambda: expected a finite number, got None",
    ),
    "not finite": (HEAD + "parameters: {lambda: .nan}\n", "expected a finite number, got nan"),
    "a number as boolean": (
        HEAD + "parameters: {normalize: 2}\n",
        "parameters.normalize: expected true or false, got 2",
    ),
    "density out of range": (
        "merge_method: ties\nbase_model: b\nmodels:\n  - model: a\n    parameters:\n      density: "
        "1.5\n",
        "config.yml:6: models[0].parameters.density: expected a finite number in [0, 1], got 1.5",
    ),
    "density out of range under a filter": (
        "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters:\n  density:\n"
        "    - {filter: a, value: 0.5}\n    - {filter: b, value: -0.1}\n",
        "config.yml:7: parameters.density[1].value: expected a finite number in [0, 1], got -0.1",
    ),
    "a method parameter on a model": (
        HEAD + "    parameters: {normalize: true}\n",
        "models[0].parameters.normalize: 'normalize' is one value for the whole merge",
    ),
    "a word in a gradient": (
        HEAD + "    parameters: {weight: [0, much, 1]}\n",
        "models[0].parameters.weight[1]: expected a finite number, got 'much'",
    ),
    "a gradient out of range under a filter": (
        "merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters:\n  density:\n"
        "    - {filter: a, value: [0.5, 1.5]}\n",
        "config.yml:6: parameters.density[0].value[1]: expected a finite number in [0, 1], got 1.5",
    ),
    "an empty gradient under a filter": (
        HEAD + "    parameters: {weight: [{filter: mlp, value: []}]}\n",
        "models[0].parameters.weight[0].value: expected a finite number, got an empty list",
    ),
    "a list within a gradient": (
        HEAD + "    parameters: {weight: [0, [1, 2]]}\n",
        "models[0].parameters.weight[1]: expected a finite number, got [1, 2]",
    ),
    "a gradient of a choice for all tensors": (
        HEAD + "parameters: {nan: [keep, error]}\n",
        "parameters.nan: expected one value for all tensors (one of 'error', 'keep'), got a list "
        "of values over the layers",
    ),
    "an empty list of values": (HEAD + "parameters: {lambda: []}\n", "got an empty list"),
    "values and filters mixed": (
        HEAD + "parameters: {lambda: [1, {value: 2}]}\n",
        "got other items among them",
    ),
    "a filter without value": (
        HEAD + "parameters: {lambda: [{filter: mlp}]}\n",
        "parameters.lambda[0]: 'value' is missing; expected a finite number",
    ),
    "a filter that is a number": (
        HEAD + "parameters: {lambda: [{filter: 3, value: 1}]}\n",
        "parameters.lambda[0].filter: expected part of a tensor name, got 3",
    ),
    "an unknown key in a filter": (
        HEAD + "parameters: {lambda: [{fitler: mlp, value: 1}]}\n",
        "unknown key 'fitler'; did you mean 'filter'?",
    ),
    "filters on a choice for all tensors": (
        HEAD + "parameters: {nan: [{filter: mlp, value: keep}]}\n",
        "parameters.nan: expected one value for all tensors (one of 'error', 'keep'), got a filter "
        "list",
    ),
    "filters on the density of a whole-model trim": (
        "merge_method: ties\nbase_model: b\nmodels:\n"
        "  - {model: a, parameters: {density: [{filter: mlp, value: 0.5}]}}\n"
        "parameters: {semantics: official}\n",
        "config.yml:4: models[0].parameters.density: expected one number, because the trim is over "
        "the whole model",
    ),
    "unknown dtype": (
        HEAD + "dtype: bfloat\n",
        "config.yml:5: dtype: expected one of float32, float16, bfloat16, float64, got 'bfloat'; "
        "did you mean 'bfloat16'?",
    ),
    "an integer dtype": (HEAD + "out_dtype: int64\n", "out_dtype: expected one of float32"),
    "no adapter after +": (
        HEAD.replace("model: a", "model: a+"),
        "models[0].model: expected MODEL+ADAPTER, two paths, got 'a+'",
    ),
    "no model before +": (
        HEAD.replace("model: a", "model: +l"),
        "models[0].model: expected MODEL+ADAPTER, two paths, got '+l'",
    ),
    "two adapters": (
        HEAD.replace("model: a", "model: {model: a+k, lora: l}"),
        "config.yml:4: models[0].model.lora: expected one adapter for a model, got more",
    ),
    "revision of a model with an adapter": (
        HEAD.replace("model: a", "model: a@main+l"),
        "models[0].model: not supported yet: revisions",
    ),
    "revision of an adapter": (
        HEAD.replace("model: a", "model: {model: a, lora: {path: l, revision: main}}"),
        "models[0].model.lora.revision: not supported yet: revisions",
    ),
    "an adapter that is a number": (
        HEAD.replace("model: a", "model: {model: a, lora: 7}"),
        "models[0].model.lora: expected the path of a model, got 7",
    ),
    "revision": (
        HEAD.replace("model: b", "model: b@main"),
        "base_model: not supported yet: revisions",
    ),
    "revision by key": (
        HEAD.replace("model: a", "model: {model: {path: a, revision: main}}"),
        "models[0].model.model.revision: not supported yet: revisions",
    ),
    "a model that is a number": (
        HEAD.replace("model: a", "model: 7"),
        "models[0].model: expected the path of a model, got 7",
    ),
    "a path that is a number": (
        HEAD.replace("model: a", "model: {path: 7}"),
        "expected the path of a model, got 7",
    ),
    "a reference without path": (
        HEAD.replace("model: a", "model: {}"),
        "expected the path of a model",
    ),
    "an empty path": (
        HEAD.replace("model: a", "model: ''"),
        "expected the path of a model, got ''",
    ),
    "a model that is a string": (
        "merge_method: linear\nmodels:\n  - a\n",
        "config.yml:3: models[0]: expected {model: ..., parameters: ...}, got 'a'",
    ),
    "models that are a mapping": (
        "merge_method: linear\nmodels: {model: a}\n",
        "config.yml:2: models: expected a list of {model: ..., parameters: ...}, got a mapping",
    ),
    "parameters that are a list": (
        HEAD + "parameters: [1]\n",
        "parameters: expected a mapping of parameters, got a list",
    ),
    "no models": ("merge_method: linear\n", "config.yml:1: 'models' is missing"),
    "no method": (
        "models: [{model: a}]\n",
        "config.yml:1: 'merge_method' is missing; expected the name of a method",
    ),
    "a method that is a list": (
        "merge_method: [ties]\nmodels: [{model: a}]\n",
        "merge_method: expected the name of a method",
    ),
    "no model in an entry": (
        "merge_method: linear\nmodels:\n  - {}\n",
        "config.yml:3: models[0]: 'model' is missing",
    ),
    "empty models": (
        "merge_method: linear\nmodels: []\n",
        "config.yml:2: models: expected at least 1 model, got an empty list",
    ),
    "no base": (
        "merge_method: ties\nmodels: [{model: a}]\n",
        "config.yml: 'base_model' is missing; ties needs the model that the others were fine-tuned "
        "from",
    ),
    "only the base": (
        "merge_method: ties\nbase_model: b\nmodels: [{model: b}]\n",
        "config.yml:3: models: ties needs at least 1 model beside base_model, got 0 "
        "(base_model itself does not count)",
    ),
    "slices": (
        "merge_method: linear\nslices:\n  - sources: []\n",
        "config.yml:2: slices: not supported yet: merging slices",
    ),
    "modules": (
        "merge_method: linear\nmodules: {text: {}}\n",
        "config.yml:2: modules: not supported yet",
    ),
    "tokenizer_source": (
        HEAD + "tokenizer_source: union\n",
        "config.yml:5: tokenizer_source: not supported yet",
    ),
    "tokenizer": (
        HEAD + "tokenizer: {source: union}\n",
        "config.yml:5: tokenizer: not supported yet",
    ),
    "chat_template": (
        HEAD + "chat_template: auto\n",
        "config.yml:5: chat_template: not supported yet",
    ),
    # YAML itself
    "empty": ("# nothing\n", "config.yml: expected a merge configuration, got an empty file"),
    "two documents": (
        HEAD + "---\na: 1\n",
        "config.yml:5: expected one YAML document, got several",
    ),
    "a list at the top": ("- merge_method: ties\n", "config.yml:1: expected a mapping"),
    "a string at the top": ("ties\n", "config.yml:1: expected a mapping"),
    "a key twice": (
        HEAD + "base_model: c\n",
        "config.yml:5: 'base_model' is given twice (first on line 2); remove one",
    ),
    "a tab": (
        "merge_method: linear\nmodels:\n\t- model: a\n",
        "config.yml:3: not valid YAML: found character '\\t'",
    ),
    "a syntax error": (HEAD + "parameters: {a: 1\n", "config.yml:6: not valid YAML"),
    "an undefined alias": (
        HEAD + "parameters: *x\n",
        "config.yml:5: not valid YAML: found undefined alias 'x'",
    ),
    "an alias of itself": (
        "a: &a [*a]\n",
        "config.yml:1: an alias refers to a value it is part of",
    ),
    "a Python object": (
        "a: !!python/object/apply:os.getcwd []\n",
        "config.yml:1: expected a plain mapping, list or value",
    ),
    "a Python name": ("a: !!python/name:os.getcwd\n", "config.yml:1: not valid YAML"),
    "a number as key": (HEAD + "1: x\n", "config.yml:5: expected a string as key, got 1"),
    "a date that is none": ("a: 2024-02-31\n", "config.yml:1: '2024-02-31' is not a valid value"),
    "too deep": ("[" * 5000, "config.yml: not a config: nested too deeply"),
}


@pytest.mark.parametrize("case", ONE_PROBLEM)
def test_one_problem_is_named_with_its_place(case: str, tmp_path: Path) -> None:
    text, expected = ONE_PROBLEM[case]
    found = problems(text, tmp_path)
    assert len(found) == 1, found
    assert expected in found[0]


def test_all_problems_are_reported_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(
        """\
merge_method: ties
base_model: b@main
models:
  - model: a@lora
    parameters:
      density: 2
      wieght: 1
  - modle: c
parameters:
  semantics: offical
tokenizer_source: base
dtype: int8
""",
        tmp_path,
    )
    lines = [int(problem.split(":")[1]) for problem in found]
    assert lines == [2, 4, 6, 7, 8, 8, 10, 11, 12], found


def test_aliases_of_aliases_do_not_explode(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    assert "expands to more than 100000 values" in problems(text, tmp_path)[0]


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file; expected a merge configuration"):
        load_config(tmp_path / "none.yml")
    with pytest.raises(RequestError, match="got a directory"):
        load_config(tmp_path)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"merge\n\xff\xfe\x00")
    with pytest.raises(RequestError, match=r"model\.safetensors:2: expected UTF-8 text"):
        load_config(binary)
    with open(binary, "wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(RequestError, match="got more than 16 MiB"):
        load_config(binary)
    with open(binary, "wb") as file:
        file.truncate(16 << 20)  # all of it is looked at
    with pytest.raises(RequestError, match="unacceptable character"):
        load_config(binary)


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3, 4}}])
def test_a_mapping_with_other_values_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="config: expected strings"):
        load_config({"merge_method": "linear", "models": value})
