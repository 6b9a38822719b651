"""Plans: every way that models and parameters do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pymerge.config import load_config
from pymerge.errors import RequestError
from pymerge.memory import MIB
from pymerge.plan import make_plan
from tests.plans import (
    in_tmp_path,  # noqa: F401
    plan,
    plan_of,
    problems,
    save,
    save_three,
    weights,
)

# Models that do not fit


def test_shape_mismatches_are_listed_together_with_a_hint_for_vocabularies() -> None:
    save_three(
        a=weights(
            embed__weight=torch.zeros(13, 4, dtype=torch.bfloat16),
            layers__0__norm__weight=torch.zeros(5, dtype=torch.bfloat16),
        ),
        b=weights(layers__0__mlp__weight=torch.zeros(16, dtype=torch.bfloat16)),
    )
    assert problems() == [
        "models[0] (a): 'embed.weight' has shape (13, 4), expected (12, 4) like base_model "
        "(another vocabulary; aligning vocabularies and tokenizers is not supported yet)",
        "models[0] (a): 'layers.0.norm.weight' has shape (5,), expected (4,) like base_model",
        "models[1] (b): 'layers.0.mlp.weight' has shape (16,), expected (4, 4) like base_model",
    ]


def test_missing_and_extra_tensors_are_named() -> None:
    save_three(
        a=weights(layers__0__mlp__weight=None, embed__weight=None),
        b=weights(adapter=torch.zeros(1)),
    )
    assert problems() == [
        "models[0] (a): lacks 2 tensors of base_model: 'embed.weight', 'layers.0.mlp.weight'",
        "models[1] (b): has 1 tensor that base_model lacks: 'adapter'",
    ]


def test_without_a_base_the_first_model_is_the_measure() -> None:
    save("a")
    save("b", weights(position_ids=None))
    assert problems("linear") == ["models[1] (b): lacks 1 tensor of models[0]: 'position_ids'"]


def test_integers_and_floats_do_not_mix() -> None:
    save_three(
        a=weights(position_ids=torch.zeros(6)), b=weights(position_ids=torch.arange(6).int())
    )
    assert problems() == [
        "models[0] (a): 'position_ids' has dtype F32, expected I64 like base_model",
        "models[1] (b): 'position_ids' has dtype I32, expected I64 like base_model",
    ]


def test_dtypes_that_cannot_be_merged_are_refused() -> None:
    save_three(
        base=weights(embed__weight=torch.zeros(12, 4).to(torch.float8_e4m3fn)),
        a=weights(layers__0__norm__weight=torch.zeros(4, dtype=torch.complex64)),
    )
    found = problems()
    assert any(
        "base_model (base): 1 tensor of dtype F8_E4M3, which cannot be merged" in problem
        and "'embed.weight'" in problem
        for problem in found
    )
    assert any("models[0] (a): 1 tensor of dtype C64" in problem for problem in found)
    assert len(found) == 2


def test_many_problems_of_a_kind_are_counted_not_dropped() -> None:
    many = {f"t{index:03d}": torch.zeros(2) for index in range(50)}
    save("base", many)
    save("a", {name: torch.zeros(3) for name in many})
    save("b", {"other": torch.zeros(1)})
    found = problems()
    assert len(found) == 20 + 1 + 2
    assert "models[0] (a): 30 more tensors differ in shape or dtype from base_model" in found
    assert "models[1] (b): lacks 50 tensors of base_model: 't000'" in found[-2]
    assert "and 30 more" in found[-2]


def test_everything_wrong_is_in_one_error() -> None:
    save("base")
    save("a", weights(embed__weight=None))
    Path("b").mkdir()
    Path("b/model.safetensors").write_bytes(b"not a header")
    found = problems(
        extra="parameters: {weight: 0, normalize: true}\n", memory=MIB, threads=0, seed=-1
    )
    text = "\n".join(found)
    for part in (
        "threads: expected at least 1, got 0",
        "seed: expected an integer in [0, 2**63), got -1",
        "models[1] (b)",
        "models[0] (a): lacks 1 tensor of base_model: 'embed.weight'",
        "the weights sum to 0",
        "memory: 1.00 MiB is too little",
    ):
        assert part in text


def test_a_missing_path_says_where_it_was_looked_for(tmp_path: Path) -> None:
    save("base")
    Path("configs").mkdir()
    save("configs/a")
    Path("configs/config.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: org/model}]\n",
        encoding="utf-8",
    )
    with pytest.raises(RequestError) as caught:
        make_plan(load_config("configs/config.yml"))
    first, second = caught.value.problems
    assert first == (
        f"configs/config.yml:3: models[0]: no such file or directory: a (relative to the current "
        f"directory, {tmp_path}); it exists beside the config file: give {tmp_path / 'configs/a'}"
    )
    assert "org/model" in second
    assert "models of the Hugging Face hub have to be downloaded first" in second


def test_a_base_that_only_gives_files_has_to_exist() -> None:
    save("a")
    with pytest.raises(RequestError, match="base_model: no such file or directory: base"):
        plan_of("merge_method: linear\nbase_model: base\nmodels: [{model: a}]\n")


def test_a_model_may_be_one_file() -> None:
    save_file(weights(), "a.safetensors")
    made = plan_of("merge_method: linear\nmodels: [{model: a.safetensors}]\n")
    assert made.models[0].label == "models[0] (a.safetensors)"


# Parameters that only tensors can judge


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_weights_that_sum_to_zero_are_refused_by_name(method: str) -> None:
    save_three()
    text = f"merge_method: {method}\nbase_model: base\nmodels:\n"
    for model, mlp, rest in (
        ("a", 0.1, "filter: norm, value: 1"),
        ("b", 0.2, "filter: norm, value: -1"),
        ("b", -0.3, "value: 0"),
    ):
        weight = f"[{{filter: mlp, value: {mlp}}}, {{{rest}}}]"
        text += f"  - {{model: {model}, parameters: {{weight: {weight}}}}}\n"
    with pytest.raises(RequestError) as caught:
        plan_of(text + "parameters: {normalize: true}\n")
    assert caught.value.problems == [
        f"config.yml: the weights sum to 0 for '{name}' ({models}), and {method} with normalize: "
        "true divides by the sum; change the weights or set normalize: false"
        for name, models in (
            ("layers.0.mlp.weight", "models[0] 0.1, models[1] 0.2, models[2] -0.3"),
            ("layers.0.norm.weight", "models[0] 1, models[1] -1, models[2] 0"),
        )
    ]
    assert plan_of(text + "parameters: {normalize: false}\n").passes == 1
    text = f"merge_method: {method}\nbase_model: base\nparameters: {{normalize: true}}\nmodels:\n"
    text += "".join(
        f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n" for m, w in (("a", 1), ("b", -1))
    )
    with pytest.raises(RequestError, match=r"for 'embed\.weight' and 2 more tensors"):
        plan_of(text)


def test_a_contradiction_is_reported_once() -> None:
    save_three()
    found = problems("ties", "parameters: {normalize: true, merge: sum}\n")
    assert len(found) == 1
    assert "normalize=true means merge='mean'" in found[0]


def test_filters_that_match_nothing_are_warned_about() -> None:
    save_three()
    made = plan(extra="parameters: {lambda: [{filter: mpl, value: 2}, {filter: norm, value: 3}]}\n")
    assert made.warnings == [
        "config.yml:4: parameters.lambda[0].value: the filter 'mpl' matches no tensor"
    ]
    assert made.tensors["layers.0.norm.weight"].parameters["scale"] == 3.0
    assert made.tensors["embed.weight"].parameters["scale"] == 1.0
