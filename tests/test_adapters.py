"""Adapters: reading, folding into a base, merges of models with their adapters."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge import merge_checkpoints
from pymerge.adapters import fold, load
from pymerge.checkpoint import open_checkpoint
from pymerge.config import load_config
from pymerge.errors import RequestError
from pymerge.plan import make_plan
from tests import models
from tests.adapter_files import (
    PREFIX,
    delta,
    exact,
    factors,
    lora_tensors,
    projections,
    save_adapter,
    save_lora,
)
from tests.models import assert_same, llama, save, weight_bytes

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def small(dtype: torch.dtype = torch.bfloat16, **options: Any) -> models.State:
    return llama(1, dtype, hidden=32, mlp=48, vocabulary=64, **options)[0]


# Reading


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 4.0),
        ({"lora_alpha": 3, "use_rslora": True}, 4, 1.5),
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 4, 2.0),
        ({"r": 9, "rank_pattern": {r".*layers\.0\..*q_proj": 4}}, 4, 2.0),
        (
            {"r": 9, "rank_pattern": {"self_attn.q_proj": 4}, "alpha_pattern": {"q_proj": 1}},
            4,
            0.25,
        ),
        ({"alpha_pattern": {"k_proj": 1}}, 4, 2.0),
        ({"alpha_pattern": {"proj": 1}}, 4, 2.0),  # no part of a name
        # Of several keys that match, the first counts, as in PEFT: not the last or the longest.
        ({"r": 9, "rank_pattern": {"q_proj": 4, "self_attn.q_proj": 3, "k_proj": 2}}, 4, 2.0),
        ({"r": 9, "rank_pattern": {"k_proj": 2, "self_attn.q_proj": 4, "q_proj": 3}}, 4, 2.0),
        ({"alpha_pattern": {"q_proj": 4, r".*\.q_proj": 16, "self_attn.q_proj": 2}}, 4, 1.0),
        ({"alpha_pattern": {r".*\.q_proj": 16, "q_proj": 4}}, 4, 4.0),
        ({"alpha_pattern": {"q_proj": 0, "self_attn.q_proj": 4}}, 4, 0.0),
    ],
)
def test_scaling(config: dict[str, Any], rank: int, scaling: float, tmp_path: Path) -> None:
    pairs = factors({Q: (6, 5)}, rank)
    adapter = load(save_lora(tmp_path / "a", pairs, **config))
    assert adapter.modules[Q].scaling == scaling
    assert torch.equal(adapter.delta_weight(Q), delta(*pairs[Q], scaling))
    torch.testing.assert_close(
        adapter.delta_weight(Q).double(), exact(*pairs[Q], scaling), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files(pickled: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    pairs = {n: (b.to(dtype), a.to(dtype)) for n, (b, a) in factors({Q: (6, 5)}).items()}
    adapter = load(save_lora(tmp_path / "a", pairs, pickled=pickled))
    assert adapter.base == "base"
    assert torch.equal(adapter.delta_weight(Q), delta(*pairs[Q], 2.0))
    assert any("pickle" in warning for warning in adapter.warnings) == pickled


def test_names_with_an_adapter_in_them(tmp_path: Path) -> None:
    pairs = factors({Q: (6, 5)})
    tensors = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in lora_tensors(pairs).items()
    }
    adapter = load(save_adapter(tmp_path / "a", tensors))
    assert torch.equal(adapter.delta_weight(Q), delta(*pairs[Q], 2.0))


def test_embeddings_and_convolutions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 10, generator=generator), torch.randn(6, 4, generator=generator)
    wide, up = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(5, 4, generator=generator)
    tensors = {
        f"{PREFIX}embed.lora_embedding_A": a,
        f"{PREFIX}embed.lora_embedding_B": b,
        f"{PREFIX}conv.lora_A.weight": wide,
        f"{PREFIX}conv.lora_B.weight": up.view(5, 4, 1, 1),
    }
    adapter = load(save_adapter(tmp_path / "a", tensors))
    assert torch.equal(adapter.delta_weight("embed"), delta(b, a, 2.0).T)
    assert adapter.delta_weight("conv").shape == (5, 3, 2, 2)
    assert torch.equal(adapter.delta_weight("conv").view(5, 12), delta(up, wide.view(4, 12), 2.0))


def test_saving_and_loading(tmp_path: Path) -> None:
    pairs = factors({Q: (6, 5), DOWN: (4, 7)}, {Q: 4, DOWN: 2})
    first = load(save_lora(tmp_path / "a", pairs, rank_pattern={"down_proj": 2}, use_rslora=True))
    first.save(tmp_path / "b")
    again = load(tmp_path / "b")
    assert again.config == {"inference_mode": True, **first.config}
    for name in pairs:
        assert torch.equal(again.delta_weight(name), first.delta_weight(name))
    first.save(tmp_path / "c", dtype="bfloat16")
    b, a = (factor.bfloat16() for factor in pairs[Q])
    assert torch.equal(load(tmp_path / "c").delta_weight(Q), delta(b, a, 4.0))
    with pytest.raises(RequestError, match="exists already"):
        first.save(tmp_path / "b")
    with pytest.raises(RequestError, match="did you mean 'float32'"):
        first.save(tmp_path / "d", dtype="float")


# Folding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding(dtype: torch.dtype, tmp_path: Path) -> None:
    base = small(dtype)
    save(tmp_path / "base", base, files=2)
    pairs = factors(projections(base))
    save_lora(tmp_path / "a", pairs)
    report = fold(tmp_path / "base", tmp_path / "a", tmp_path / "out", checksums=True)
    expected = dict(base)
    for name, (b, a) in pairs.items():
        weight = f"{name}.weight"
        expected[weight] = (base[weight].float() + delta(b, a, 2.0)).to(dtype)
    assert_same(models.load(tmp_path / "out"), expected)
    names = [file.name for file in report.inputs[0].files]
    assert names[-2:] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(file.sha256 for file in report.inputs[0].files)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert "base+a" in (tmp_path / "out" / "README.md").read_text().replace(f"{tmp_path}/", "")


def test_conv1d_goes_by_the_shape(tmp_path: Path) -> None:
    """Whatever fan_in_fan_out says, as in PEFT, which goes by the class; it decides for squares."""
    generator = torch.Generator().manual_seed(1)
    base = {
        "h.c_attn.weight": torch.randn(8, 24, generator=generator),
        "h.c_proj.weight": torch.randn(8, 8, generator=generator),
        "lm_head.weight": torch.randn(10, 8, generator=generator),
    }
    save(tmp_path / "base", base, config=None)
    pairs = factors({"h.c_attn": (24, 8), "h.c_proj": (8, 8), "lm_head": (10, 8)})
    deltas = {name: delta(b, a, 2.0) for name, (b, a) in pairs.items()}
    for flag in (True, False):
        save_lora(tmp_path / f"a{flag}", pairs, fan_in_fan_out=flag)
        fold(tmp_path / "base", tmp_path / f"a{flag}", tmp_path / f"out{flag}")
        got = models.load(tmp_path / f"out{flag}")
        square = deltas["h.c_proj"].T if flag else deltas["h.c_proj"]
        assert torch.equal(got["h.c_attn.weight"], base["h.c_attn.weight"] + deltas["h.c_attn"].T)
        assert torch.equal(got["h.c_proj.weight"], base["h.c_proj.weight"] + square)
        assert torch.equal(got["lm_head.weight"], base["lm_head.weight"] + deltas["lm_head"])


@pytest.mark.parametrize(
    ("in_base", "in_adapter"), [("h.0.fc", "transformer.h.0.fc"), ("m.fc", "fc")]
)
def test_a_leading_part_of_the_names(in_base: str, in_adapter: str, tmp_path: Path) -> None:
    save(tmp_path / "base", {f"{in_base}.weight": torch.zeros(6, 5)}, config=None)
    pairs = factors({in_adapter: (6, 5)})
    save_lora(tmp_path / "a", pairs)
    report = fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    got = models.load(tmp_path / "out")
    assert torch.equal(got[f"{in_base}.weight"], delta(*pairs[in_adapter], 2.0))
    assert any(f"'{in_adapter}.weight' is '{in_base}.weight'" in text for text in report.warnings)


def test_folding_embeddings_and_convolutions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"embed.weight": torch.randn(10, 6), "conv.weight": torch.randn(5, 3, 2, 2)}
    save(tmp_path / "base", base, config=None)
    a, b = torch.randn(4, 10, generator=generator), torch.randn(6, 4, generator=generator)
    wide, up = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(5, 4, generator=generator)
    tensors = {
        f"{PREFIX}embed.lora_embedding_A": a,
        f"{PREFIX}embed.lora_embedding_B": b,
        f"{PREFIX}conv.lora_A.weight": wide,
        f"{PREFIX}conv.lora_B.weight": up.view(5, 4, 1, 1),
    }
    save_adapter(tmp_path / "a", tensors)
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    kernel = delta(up, wide.view(4, 12), 2.0).view(5, 3, 2, 2)
    expected = {
        "embed.weight": base["embed.weight"] + delta(b, a, 2.0).T,
        "conv.weight": base["conv.weight"] + kernel,
    }
    assert_same(models.load(tmp_path / "out"), expected)


def test_ia3(tmp_path: Path) -> None:
    base = {
        "k.weight": torch.randn(6, 5).bfloat16(),
        "k.bias": torch.randn(6).bfloat16(),
        "down.weight": torch.randn(4, 7).bfloat16(),
        "down.bias": torch.randn(4).bfloat16(),
    }
    save(tmp_path / "base", base, config=None)
    out, within = torch.randn(6, 1), torch.randn(1, 7)
    tensors = {f"{PREFIX}k.ia3_l": out, f"{PREFIX}down.ia3_l": within}
    save_adapter(tmp_path / "a", tensors, peft_type="IA3", feedforward_modules=["down"])
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    expected = {
        "k.weight": (base["k.weight"].float() * out).bfloat16(),
        "k.bias": (base["k.bias"].float() * out[:, 0]).bfloat16(),
        "down.weight": (base["down.weight"].float() * within).bfloat16(),
        "down.bias": base["down.bias"],
    }
    assert_same(models.load(tmp_path / "out"), expected)


def test_tensors_in_whole(tmp_path: Path) -> None:
    """Of modules_to_save, trained biases, and layers under a LoRA; a head that the base lacks."""
    base = {name: torch.randn(6, 5) for name in ("q.weight", "norm.weight", "e.weight")}
    base["q.bias"] = torch.randn(6)
    save(tmp_path / "base", {n: t.bfloat16() for n, t in base.items()}, config=None)
    pairs = factors({"q": (6, 5), "e": (6, 5)})
    whole = {
        "norm.modules_to_save.weight": torch.randn(6, 5),
        "q.base_layer.bias": torch.randn(6),
        "e.base_layer.weight": torch.randn(6, 5),
        "score.weight": torch.randn(2, 5),
    }
    tensors = lora_tensors(pairs) | {f"{PREFIX}{name}": t for name, t in whole.items()}
    save_adapter(tmp_path / "a", tensors, bias="all", modules_to_save=["norm", "score"])
    fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    e = whole["e.base_layer.weight"] + delta(*pairs["e"], 2.0)
    expected = {
        "q.weight": (base["q.weight"].bfloat16().float() + delta(*pairs["q"], 2.0)).bfloat16(),
        "q.bias": whole["q.base_layer.bias"].bfloat16(),
        "norm.weight": whole["norm.modules_to_save.weight"].bfloat16(),
        "e.weight": e.bfloat16(),
        "score.weight": whole["score.weight"],
    }
    assert_same(models.load(tmp_path / "out"), expected)


# Merging models with their adapters


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, and the same two folded."""
    root = tmp_path_factory.mktemp("family")
    base = small()
    save(root / "base", base)
    for k in range(2):
        save_lora(root / f"a{k}", factors(projections(base), seed=k))
        fold(root / "base", root / f"a{k}", root / f"m{k}")
    return root


MERGES: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.3, "semantics": "official"},
    "task_arithmetic": {"lambda": 0.7},
    "dare_ties": {"density": 0.5},
    "pcb": {},
    "della": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "tsv_m": {},
    "karcher": {},
}


@pytest.mark.parametrize("method", MERGES)
def test_a_merge_is_that_of_folded_checkpoints(method: str, family: Path, tmp_path: Path) -> None:
    def merge(out: str, paths: list[str], **options: Any) -> dict[str, bytes]:
        config: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": path} for path in paths[: 1 if method == "slerp" else 2]],
            "parameters": MERGES[method],
        }
        if method != "linear":
            config["base_model"] = str(family / "base")
        merge_checkpoints(config, tmp_path / out, **options)
        return weight_bytes(tmp_path / out)

    adapted = [f"{family}/base+{family}/a{k}" for k in range(2)]
    expected = merge("folded", [f"{family}/m{k}" for k in range(2)])
    assert merge("adapted", adapted) == expected
    assert merge("one thread", adapted, threads=1, memory="300MiB") == expected
    if method in ("linear", "ties", "task_arithmetic", "dare_ties"):
        assert merge("reference", adapted, backend="reference") == expected


def test_a_base_with_an_adapter(family: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": {"model": str(family / "base"), "lora": str(family / "a0")},
        "models": [{"model": str(family / "m1")}],
    }
    merge_checkpoints(config, tmp_path / "one")
    merge_checkpoints({**config, "base_model": str(family / "m0")}, tmp_path / "two")
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")


def test_a_base_without_its_adapter_is_what_others_are_compared_with(family: Path) -> None:
    short = models.load(family / "base")
    del short["model.norm.weight"]
    models.save(family / "short", short)
    base = str(family / "base")
    paths = [f"{base}+{family}/a0", base, str(family / "short")]
    config = {"merge_method": "linear", "base_model": base, "models": [{"model": p} for p in paths]}
    with pytest.raises(RequestError, match=r"lacks 1 tensor of models\[1\]: 'model.norm.weight'"):
        make_plan(load_config(config))


def test_a_plan_counts_the_folded_weights(family: Path) -> None:
    config = load_config(
        {
            "merge_method": "linear",
            "models": [{"model": f"{family}/base+{family}/a{k}"} for k in range(2)],
        }
    )
    with make_plan(config) as plan:
        assert plan.memory.folded_bytes == 2 * 2 * 2 * 48 * 32  # twice, of two models, in bfloat16
        assert plan.to_dict()["memory"]["folded_bytes"] == plan.memory.folded_bytes


def test_folding_leaves_torch_alone(family: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pymerge.adapters import fold; "
        f"fold({str(family / 'base')!r}, {str(family / 'a0')!r}, {str(tmp_path / 'out')!r}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert weight_bytes(tmp_path / "out") == weight_bytes(family / "m0")


def test_a_tensor_is_kept_until_it_is_released(family: Path) -> None:
    from pymerge.checkpoint.peft.adapted import AdaptedCheckpoint

    adapter, base = load(family / "a0"), open_checkpoint(family / "base", "base")
    with AdaptedCheckpoint(base, adapter, "m") as model:
        assert sorted(model.folded) == [f"{name}.weight" for name in sorted(adapter.modules)]
        first = model.array(f"{Q}.weight")
        assert model.array(f"{Q}.weight") is first
        model.release(f"{Q}.weight")
        assert model.array(f"{Q}.weight") is not first
        assert bytes(model.array(f"{Q}.weight").bytes().numpy()) == bytes(first.bytes().numpy())


def test_out_must_not_endanger_an_adapter(family: Path) -> None:
    with pytest.raises(RequestError, match="lies inside the input"):
        fold(family / "base", family / "a0", family / "a0" / "out")


def test_folded_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    base = small()
    save(tmp_path / "base", base)
    pairs = factors(projections(base))
    pairs[DOWN][0][3, 1] = math.nan
    save_lora(tmp_path / "a", pairs)
    with pytest.raises(pymerge.NonFiniteError, match=f"B of '{DOWN}' holds nan at flat index 13"):
        fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
