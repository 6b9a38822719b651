"""Plans: what is read and written, in how much memory, and every way that models do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pymerge.cli
from pymerge.config import load_config
from pymerge.errors import RequestError
from pymerge.memory import MIB, plan_memory
from pymerge.plan import MergePlan, make_plan

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of models are taken from the current directory."""
    monkeypatch.chdir(tmp_path)


def weights(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Tensors:
    """Return a small model; `changes` replace tensors (with __ for .), None takes one out."""
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
    """Write base, a and b; `changes` give some of them other tensors."""
    for name in ("base", "a", "b"):
        save(name, changes.get(name))


# What a plan holds


def test_a_plan_of_one_pass() -> None:
    save_three()
    made = plan(seed=5)
    assert made.base is not None
    assert made.base.label == "base_model (base)"
    assert [model.label for model in made.models] == ["models[0] (a)", "models[1] (b)"]
    assert list(made.tensors) == made.layout.order
    assert set(made.tensors) == set(weights())
    mlp = made.tensors["layers.0.mlp.weight"]
    assert (mlp.dtype, mlp.shape, mlp.compute, mlp.numel) == ("BF16", (4, 4), "F32", 16)
    assert mlp.parameters["weight"] == [1.0, 1.0]
    ids = made.tensors["position_ids"]
    assert (ids.dtype, ids.compute) == ("I64", None)
    assert made.passes == 1
    assert made.passes_text.startswith("1: ")
    model_bytes = (48 + 16 + 4) * 2 + 6 * 8
    assert made.bytes_to_read == 3 * model_bytes
    assert made.bytes_to_write == sum(shard.nbytes for shard in made.layout.shards)
    assert made.bytes_to_write > model_bytes
    assert made.parameters_count == 48 + 16 + 4 + 6
    assert made.seed == 5
    assert made.side_files == Path("base")
    assert made.memory_bytes == made.memory.total
    assert (made.slots, made.slot_bytes) == (4, 16 * MIB)
    assert made.warnings == []


def test_labels_keep_the_places_of_the_file() -> None:
    save_three()
    made = plan_of(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: base}, {model: b}]\n"
    )
    assert [model.label for model in made.models] == ["models[0] (a)", "models[2] (b)"]


def test_output_order_and_shards_follow_the_layout() -> None:
    save_three()
    made = plan(shard_size=64)
    assert len(made.layout.shards) > 1
    assert list(made.tensors) == made.layout.order


@pytest.mark.parametrize(
    ("extra", "passes", "words"),
    [
        ("parameters: {density: 0.5}", 2, "in each tensor that is trimmed"),
        ("parameters: {density: 1.0}", 1, "in one go"),
        ("", 1, "in one go"),
        ("parameters: {semantics: official}", 2, "over the whole model"),
        ("parameters: {semantics: official, density: 1.0}", 1, "in one go"),
        ("parameters: {semantics: official, scope: tensor}", 3, "the majority sign of each"),
        ("parameters: {semantics: mergelm, scope: tensor, density: 1}", 2, "the majority sign"),
        ("parameters: {semantics: mergekit, scope: global, density: 1.0}", 1, "in one go"),
        ("parameters: {semantics: peft, density: 0.0}", 1, "in one go"),
    ],
)
def test_passes_of_ties(extra: str, passes: int, words: str) -> None:
    save_three()
    made = plan("ties", extra + "\n")
    assert made.passes == passes
    assert words in made.passes_text
    computed, copied = (48 + 16 + 4) * 2, 6 * 8
    assert made.bytes_to_read == 3 * (passes * computed + copied)
    assert (made.memory.histogram_bins > 0) == ("the thresholds" in made.passes_text)


def test_tensors_that_are_not_trimmed_are_read_once() -> None:
    save_three()
    made = plan("ties", "parameters: {density: [{filter: mlp, value: 0.5}]}\n")
    assert {name: tensor.passes for name, tensor in made.tensors.items()} == {
        "embed.weight": 1,
        "layers.0.mlp.weight": 2,
        "layers.0.norm.weight": 1,
        "position_ids": 1,
    }
    assert made.bytes_to_read == 3 * ((48 + 2 * 16 + 4) * 2 + 6 * 8)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_models_of_integers_alone_are_copied(method: str) -> None:
    integers = {"position_ids": torch.arange(6)}
    save_three(base=integers, a=integers, b=integers)
    made = plan(method, "parameters: {nan: keep}\n")
    assert [tensor.compute for tensor in made.tensors.values()] == [None]
    assert (made.passes, made.memory.histogram_bins) == (1, 0)


# dtypes


@pytest.mark.parametrize(
    ("base", "model", "keys", "expected", "compute"),
    [
        (torch.bfloat16, torch.bfloat16, "", "BF16", "F32"),
        (torch.bfloat16, torch.float16, "", "F32", "F32"),
        (torch.float16, torch.float32, "", "F32", "F32"),
        (torch.float32, torch.bfloat16, "", "F32", "F32"),
        (torch.float64, torch.bfloat16, "", "F64", "F64"),
        (torch.bfloat16, torch.float64, "dtype: float16", "F16", "F64"),
        (torch.float32, torch.float32, "dtype: bfloat16", "BF16", "F32"),
        (torch.float32, torch.float32, "dtype: float64", "F64", "F64"),
        (torch.float32, torch.float32, "dtype: float64\nout_dtype: float16", "F16", "F64"),
        (torch.float16, torch.float16, "out_dtype: float32", "F32", "F32"),
    ],
)
def test_dtypes_of_the_output_and_the_arithmetic(
    base: torch.dtype, model: torch.dtype, keys: str, expected: str, compute: str
) -> None:
    save_three(base=weights(base), a=weights(model), b=weights(base))
    made = plan(extra=keys + "\n")
    for name in ("embed.weight", "layers.0.mlp.weight"):
        assert (made.tensors[name].dtype, made.tensors[name].compute) == (expected, compute)
    assert made.tensors["position_ids"].dtype == "I64"


def test_the_base_does_not_count_for_methods_without_one() -> None:
    save("base", weights(torch.float32))
    save("a")
    save("b")
    made = plan_of("merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: b}]\n")
    assert made.base is None
    assert made.tensors["embed.weight"].dtype == "BF16"
    assert made.side_files == Path("base")


# Tied weights


TIED: dict[str, Any] = {"tie_word_embeddings": True, "model_type": "llama"}


def llama(rows: int = 12, *, head: bool) -> Tensors:
    tensors: Tensors = {"model.embed_tokens.weight": torch.zeros(rows, 4)}
    if head:
        tensors["lm_head.weight"] = torch.zeros(rows, 4)
    return tensors


def test_a_model_without_a_head_that_is_tied_is_complete() -> None:
    save("base", llama(head=True), TIED)
    save("a", llama(head=False), TIED)
    save("b", llama(head=True), TIED)
    made = plan()
    assert "lm_head.weight" in made.tensors
    assert made.bytes_to_read == 3 * 2 * 12 * 4 * 4
    assert made.warnings == []


def test_a_head_that_the_base_ties_is_left_out_with_a_warning() -> None:
    save("base", llama(head=False), TIED)
    save("a", llama(head=True), TIED)
    save("b", llama(head=False), TIED)
    made = plan()
    assert list(made.tensors) == ["model.embed_tokens.weight"]
    assert len(made.warnings) == 1
    assert "models[0] (a): 'lm_head.weight' is left out" in made.warnings[0]


def test_a_head_of_another_shape_is_refused_where_the_base_ties_it() -> None:
    save("base", llama(head=False), TIED)
    save("a", {**llama(head=False), "lm_head.weight": torch.zeros(13, 4)}, TIED)
    save("b", llama(head=False), TIED)
    found = problems()
    assert len(found) == 1
    assert (
        "models[0] (a): 'lm_head.weight' has shape (13, 4), expected (12, 4) like base_model"
        in found[0]
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


# Memory


def test_a_larger_model_takes_no_more_memory() -> None:
    save_three()
    small = plan("ties", "parameters: {density: 0.5}\n").memory_bytes
    big = {"x": torch.zeros(1 << 18)}
    for name in ("base", "a", "b"):
        save_file(big, f"{name}/model.safetensors")
    assert plan("ties", "parameters: {density: 0.5}\n").memory_bytes == small


@pytest.mark.parametrize("models", [1, 4, 17])
@pytest.mark.parametrize("threads", [1, 2, 96])
@pytest.mark.parametrize("selects", [False, True])
def test_memory_fits_its_limit_and_the_smallest_that_works_works(
    models: int, threads: int, selects: bool
) -> None:
    with pytest.raises(RequestError, match=r"memory: 1\.00 MiB is too little") as caught:
        plan_memory(MIB, models=models, threads=threads, selects=selects)
    least = int(str(caught.value).rsplit(" ", 1)[1].removesuffix("MiB"))
    limits = [least, least + 1, 2 * least, 8 * least]
    plans = [
        plan_memory(limit * MIB, models=models, threads=threads, selects=selects)
        for limit in limits
    ]
    for made, limit in zip(plans, limits, strict=True):
        counts = models * threads * made.histogram_bins * 4
        used = made.slots * made.slot_bytes + counts + made.sample_elements * 8
        assert 256 * MIB + used <= made.total <= limit * MIB
        assert (made.histogram_bins > 0) == (made.sample_elements > 0) == selects
        # a power of two, so that a key's bin is a shift
        assert made.histogram_bins & (made.histogram_bins - 1) == 0
        assert made.slots >= 2
        assert made.slot_bytes >= MIB
    assert plans[0].slots == 2
    assert (plans[-1].slots, plans[-1].slot_bytes) == (4, 16 * MIB)
    with pytest.raises(RequestError, match="is too little"):
        plan_memory((least - 1) * MIB, models=models, threads=threads, selects=selects)


# The command


def test_the_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    save_three()
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n  - {model: a, parameters: {weight: 0.5}}\n"
        "  - {model: b, parameters: {density: [{filter: nothing, value: 0.1}]}}\n"
        "parameters: {density: 0.5, lambda: 0.25}\n"
    )
    Path("config.yml").write_text(text, encoding="utf-8")
    assert pymerge.cli.main(["plan", "config.yml", "--threads", "2"]) == 0
    captured = capsys.readouterr()
    for part in (
        "base_model (base): 4 tensors (3 BF16, 1 I64)",
        "settings  weight: 1; models[0] 0.5\n",
        "settings  density: 0.5; models[1] by tensor\n",
        "settings  lambda: 0.25\n",
        "passes    2: ",
        "model.safetensors",
        "2 threads",
    ):
        assert part in captured.out
    assert captured.err == (
        "pymerge: warning: config.yml:5: models[1].parameters.density[0].value: the filter "
        "'nothing' matches no tensor\n"
    )
    assert pymerge.cli.main(["plan", "config.yml", "--threads", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["passes"] == 2
    assert made["output"]["dtypes"] == {"BF16": 3, "I64": 1}
    assert list(made["output"]["shards"]) == ["model.safetensors"]
    assert made["memory"]["total"] > 256 * MIB


def test_the_plan_command_lists_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    save_three(a=weights(embed__weight=None), b=weights(position_ids=None))
    Path("config.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n", encoding="utf-8"
    )
    assert pymerge.cli.main(["plan", "config.yml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pymerge: error: 2 problems:\n  - models[0] (a): lacks")
