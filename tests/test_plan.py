"""Plans: what is read and written, in how much memory; the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pymerge.commands.main
from pymerge.errors import RequestError
from pymerge.memory import MIB, plan_memory
from tests.plans import (
    Tensors,
    in_tmp_path,  # noqa: F401
    plan,
    plan_of,
    problems,
    save,
    save_three,
    weights,
)

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
        ("parameters: {semantics: official}", 4, "over the whole model"),
        ("parameters: {semantics: official, density: 1.0}", 3, "sign of the whole model"),
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
    assert made.most_passes >= passes
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
    assert made.passes == 2  # of the tensor that is read most often


def test_a_trim_over_the_model_reads_every_tensor() -> None:
    """Also one that is so small that by itself it would not be trimmed."""
    state = {"w": torch.ones(100), "x": torch.ones(1)}
    save_three(base=state, a=state, b=state)
    made = plan("ties", "parameters: {semantics: mergelm, density: 0.9}\n")
    assert len({tensor.passes for tensor in made.tensors.values()}) == 1
    assert made.passes > 1


def test_breadcrumbs_of_one_model_are_enough_to_select() -> None:
    save_three()
    text = "merge_method: breadcrumbs\nbase_model: base\nmodels:\n"
    for model, density in (("a", 1.0), ("b", 0.5)):
        text += f"  - {{model: {model}, parameters: {{density: {density}}}}}\n"
    made = plan_of(text)
    assert made.tensors["embed.weight"].passes == 2
    assert made.memory.histogram_bins > 0


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
        (torch.float32, torch.float32, "out_dtype: float64", "F64", "F64"),
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


@pytest.mark.parametrize("limit", [300, 500, 1100, 1500, 2048, 1 << 14])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize(("matrices", "folded"), [(0, 0), (12_345_678, 0), (1_000, 23_456_789)])
def test_the_total_is_the_sum_of_its_parts(
    limit: int, staged: bool, selects: bool, matrices: int, folded: int
) -> None:
    """As `MemoryPlan` documents it, whatever had to be made smaller."""
    for models, threads in ((1, 1), (3, 8), (17, 64)):
        asked: dict[str, Any] = {"models": models, "threads": threads, "selects": selects}
        asked |= {"staged": staged, "matrices": matrices, "folded": folded, "solvers": 5}
        try:
            made = plan_memory(limit * MIB, **asked)
        except RequestError as error:
            least = int(str(error).rsplit(" ", 1)[1].removesuffix("MiB"))
            assert least > limit
            made = plan_memory(least * MIB, **asked)
        total = 256 * MIB + (768 * MIB if staged else 0)  # Python and torch; CUDA
        total += made.slots * made.slot_bytes
        total += made.histogram_bins * models * threads * 4  # counts
        total += made.histogram_bins * models * 2 * 8  # two rows of sums
        # A model at a time: base, model and delta in float64, its key, all keys, and them
        # partitioned; and the sample of all inputs, in float64 at most.
        total += made.sample_elements * (6 * 8 + 8 * (models + 1))
        total += made.buffer_bytes * (3 + 3)  # chunks on their way there, pieces on their way back
        assert made.total == total + matrices + folded
        assert (made.matrix_bytes, made.solvers, made.folded_bytes) == (matrices, 5, folded)
        assert (made.buffer_bytes > 0) == staged


def test_what_is_largest_is_made_smaller() -> None:
    """Everything as large as is fastest, then the largest part is halved until the sum fits."""

    def sizes(limit: int, **asked: Any) -> tuple[int, int, int, int, int]:
        made = plan_memory(limit * MIB, models=4, threads=2, **asked)
        buffer = made.buffer_bytes // MIB
        bins, samples = made.histogram_bins, made.sample_elements
        return made.slots, made.slot_bytes // MIB, bins, samples, buffer

    # Of 4 models and 2 threads: 24 MiB of counts, 11 of samples, 64 of slots.
    assert sizes(355, selects=True) == (4, 16, 1 << 18, 1 << 17, 0)
    assert sizes(354, selects=True) == (4, 8, 1 << 18, 1 << 17, 0)
    assert sizes(322, selects=True) == (4, 4, 1 << 18, 1 << 17, 0)
    assert sizes(306, selects=True) == (4, 4, 1 << 17, 1 << 17, 0)
    assert sizes(294, selects=True) == (4, 2, 1 << 17, 1 << 17, 0)
    assert sizes(286, selects=True) == (4, 2, 1 << 16, 1 << 17, 0)
    assert sizes(280, selects=True) == (4, 2, 1 << 16, 1 << 16, 0)
    # Six buffers of 16 MiB and 768 MiB of CUDA.
    assert sizes(1184, selects=False, staged=True) == (4, 16, 0, 0, 16)
    assert sizes(1183, selects=False, staged=True) == (4, 16, 0, 0, 8)
    assert sizes(1135, selects=False, staged=True) == (4, 8, 0, 0, 8)
    assert sizes(258, selects=False) == (2, 1, 0, 0, 0)


# The command


def test_the_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    save_three()
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n  - {model: a, parameters: {weight: 0.5}}\n"
        "  - {model: b, parameters: {density: [{filter: nothing, value: 0.1}]}}\n"
        "parameters: {density: 0.5, lambda: 0.25}\n"
    )
    Path("config.yml").write_text(text, encoding="utf-8")
    assert pymerge.commands.main.main(["plan", "config.yml", "--threads", "2"]) == 0
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
    assert pymerge.commands.main.main(["plan", "config.yml", "--threads", "2", "--json"]) == 0
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
    assert pymerge.commands.main.main(["plan", "config.yml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pymerge: error: 2 problems:\n  - models[0] (a): lacks")
