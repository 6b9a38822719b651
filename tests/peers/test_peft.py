"""Adapters against PEFT 0.21.2, which `make test-peft` installs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pymerge.adapters import (
    Adapter,
    add,
    analogy,
    extract_lora,
    fold,
    load,
    merge_adapters,
    negate,
    scale,
)
from tests.models import load as load_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("peft", reason="PEFT is not installed: make test-peft")
    import transformers
    from peft import (
        IA3Config,
        LoraConfig,
        PeftConfig,
        PeftModel,
        get_peft_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q_proj", "v_proj", "down_proj"]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def disturb(model: nn.Module, seed: int) -> None:
    """Give every trainable parameter values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def made(make: Callable[[], Any], config: Any, out: Path, seed: int) -> Any:
    """Return a model of PEFT with a trained adapter, and save the adapter."""
    model = get_peft_model(make(), config)
    disturb(model, seed)
    model.save_pretrained(out)
    return model


def lora(**options: Any) -> Any:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **options})


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "lora": (llama, lora),
    "rslora": (llama, lambda: lora(use_rslora=True)),
    "patterns": (
        llama,
        lambda: lora(
            rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 7},
            alpha_pattern={"v_proj": 3, r".*layers\.0\..*down_proj": 11},
        ),
    ),
    "all linear": (llama, lambda: lora(target_modules="all-linear")),
    "regular expression": (llama, lambda: lora(target_modules=r".*layers\.1.*\.(k|o)_proj")),
    "modules to save": (llama, lambda: lora(modules_to_save=["lm_head", "norm"])),
    "biases": (llama, lambda: lora(bias="all")),
    "biases of LoRA": (llama, lambda: lora(bias="lora_only")),
    "embeddings": (llama, lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "Conv1D": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "Conv1D, config wrong": (gpt2, lambda: lora(target_modules=["c_attn"])),
    "Conv1D and Linear": (
        gpt2,
        lambda: lora(target_modules=["c_attn", "lm_head"], fan_in_fan_out=True),
    ),
    "IA3": (
        llama,
        lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "IA3, Conv1D": (
        gpt2,
        lambda: IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_folding_is_merge_and_unload(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    make().save_pretrained(tmp_path / "base")
    made(make, config(), tmp_path / "adapter", 1)
    fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = load_checkpoint(tmp_path / "out")
    peft = PeftModel.from_pretrained(make(), tmp_path / "adapter").merge_and_unload()
    expected = peft.state_dict()
    changed = 0
    for name, tensor in make().state_dict().items():
        torch.testing.assert_close(got[name], expected[name], rtol=2e-6, atol=2e-6)
        changed += not torch.equal(got[name], tensor)
    assert changed >= 2
    # and the model of transformers loads it
    loaded = type(peft).from_pretrained(tmp_path / "out")
    ids = torch.arange(8).reshape(1, 8)
    torch.testing.assert_close(loaded(ids).logits, peft(ids).logits, rtol=1e-5, atol=1e-5)


def test_folding_into_bfloat16_rounds_once(tmp_path: Path) -> None:
    """As PEFT does with an adapter in float32, but for sums of BLAS that round the other way."""
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    made(llama, lora(), tmp_path / "adapter", 1)
    fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = load_checkpoint(tmp_path / "out")
    base = llama().to(torch.bfloat16)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    equal = total = 0
    for name, tensor in peft.state_dict().items():
        assert got[name].dtype == torch.bfloat16
        torch.testing.assert_close(got[name], tensor, rtol=2**-7, atol=1e-6)
        equal, total = equal + int((got[name] == tensor).sum()), total + tensor.numel()
    assert equal > 0.999 * total


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(3, 8, 3)
        self.narrow = nn.Conv2d(8, 5, 1)
        self.line = nn.Conv1d(4, 6, 5)


def test_deltas_of_convolutions(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "narrow", "line"])
    model = made(Convolutions, config, tmp_path / "a", 1)
    adapter = load(tmp_path / "a")
    for name in ("wide", "narrow", "line"):
        expected = getattr(model.base_model.model, name).get_delta_weight("default")
        torch.testing.assert_close(adapter.delta_weight(name), expected, rtol=1e-6, atol=1e-6)


def two(tmp_path: Path, **options: Any) -> tuple[Any, list[Adapter]]:
    """Return a model of PEFT that has the adapters "a" and "b", and the adapters."""
    for number, name in enumerate("ab"):
        made(llama, lora(**options), tmp_path / name, number + 1)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    return model, [load(tmp_path / name) for name in "ab"]


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A:
            found[name] = module.get_delta_weight(adapter).detach()
    return found


def assert_deltas(
    adapter: Adapter, expected: Mapping[str, torch.Tensor], factor: float = 1.0
) -> None:
    assert sorted(adapter.modules) == sorted(expected)
    for name, delta in expected.items():
        got = adapter.delta_weight(name) * factor
        # PEFT multiplies and decomposes in float32; what is cut off depends on close values
        assert float((got - delta).norm()) <= 1e-5 * float(delta.norm()), name


WEIGHTS = [0.7, -1.3]
COMBINATIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "magnitude_prune": {"density": 0.3},
    "magnitude_prune_svd": {"density": 0.3},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "dare_linear_svd": {"density": 1.0},
    "dare_ties_svd": {"density": 1.0},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_add_weighted_adapter(combination: str, rslora: bool, tmp_path: Path) -> None:
    model, adapters = two(tmp_path, use_rslora=rslora)
    options = COMBINATIONS[combination]
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", combination_type=combination, **options)
    merged = merge_adapters(adapters, f"peft_{combination}", weights=WEIGHTS, **options)
    # PEFT gives the result the scaling r / sqrt(r) where the inputs are rsLoRA, and means 1.
    rank = merged.rank
    assert_deltas(merged, deltas(model, "c"), rank**0.5 if rslora else 1.0)
    if combination in ("cat", "svd"):
        a, b = (deltas(model, name) for name in "ab")
        exact = {name: WEIGHTS[0] * a[name] + WEIGHTS[1] * b[name] for name in a}
        assert_deltas(merge_adapters(adapters, "svd", weights=WEIGHTS, rank=8), exact)
        if combination == "cat":
            assert_deltas(merged, exact)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("combination", ["ties", "ties_svd"])
def test_majority_of_signs(combination: str, majority: str, tmp_path: Path) -> None:
    model, adapters = two(tmp_path)
    options = {"density": 0.6, "majority_sign_method": majority}
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c", combination_type=combination, **options)
    merged = merge_adapters(adapters, f"peft_{combination}", weights=WEIGHTS, **options)
    assert_deltas(merged, deltas(model, "c"))


def test_dare_keeps_nothing_at_a_density_of_0(tmp_path: Path) -> None:
    model, adapters = two(tmp_path)
    model.add_weighted_adapter(
        ["a", "b"], WEIGHTS, "c", combination_type="dare_linear", density=0.0
    )
    theirs = deltas(model, "c")
    assert all(delta.isnan().all() for delta in theirs.values())  # 0 / 0
    for method in ("peft_dare_linear", "peft_dare_ties", "peft_dare_linear_svd"):
        merged = merge_adapters(adapters, method, weights=WEIGHTS, density=0.0)
        assert_deltas(merged, {name: torch.zeros_like(delta) for name, delta in theirs.items()})


def test_dare_drops_and_rescales_factors(tmp_path: Path) -> None:
    _, adapters = two(tmp_path)
    half = merge_adapters(adapters[:1], "peft_dare_linear", density=0.5, seed=3)
    whole = merge_adapters(adapters[:1], "peft_linear")
    for name in half.modules:
        for dropped, own in zip(half.factors(name), whole.factors(name), strict=True):
            kept = dropped != 0
            assert 0.2 < kept.mean() < 0.8
            torch.testing.assert_close(
                torch.from_numpy(dropped[kept]), torch.from_numpy(2 * own[kept])
            )


def test_weighted_ia3(tmp_path: Path) -> None:
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    for number, name in enumerate("ab"):
        made(llama, IA3Config(**config), tmp_path / name, number + 1)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], WEIGHTS, "c")
    paths = [tmp_path / name for name in "ab"]
    merged = merge_adapters(paths, "peft_linear", weights=WEIGHTS)
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "ia3_l"):
            got = torch.from_numpy(merged.vector(name))
            torch.testing.assert_close(got, module.ia3_l["c"].detach())


def loaded_deltas(adapter: Adapter, out: Path) -> dict[str, torch.Tensor]:
    """Save an adapter, let PEFT load it with no key missing, and return what it adds."""
    adapter.save(out)
    return deltas(peft_loads(llama(), out), "default")


def peft_loads(model: Any, path: Path) -> Any:
    """Load an adapter as PEFT does, with no key left over and none of the adapter's missing."""
    loaded = get_peft_model(model, PeftConfig.from_pretrained(path))
    result = set_peft_model_state_dict(loaded, load_peft_weights(str(path)))
    assert not result.unexpected_keys
    trained = {name for name, parameter in loaded.named_parameters() if "default" in name}
    assert not trained & set(result.missing_keys)
    return PeftModel.from_pretrained(loaded.unload(), path)


def test_results_load_in_peft(tmp_path: Path) -> None:
    _, (one, two_) = two(tmp_path, rank_pattern={"q_proj": 2}, use_rslora=True)
    results = {
        "sum": add([one, two_]),
        "difference": add([one, negate(two_)], [1, 1]),
        "half": scale(one, 0.5),
        "analogy": analogy(one, two_, one),
        "svd": merge_adapters([one, two_], "svd", rank=3),
        "ties": merge_adapters([one, two_], "ties", density=0.5, energy=0.8),
    }
    for name, adapter in results.items():
        assert_deltas(adapter, loaded_deltas(adapter, tmp_path / f"{name}.out"))


def test_ia3_results_load_in_peft(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    made(llama, config, tmp_path / "a", 1)
    llama().save_pretrained(tmp_path / "base")
    negate(load(tmp_path / "a")).save(tmp_path / "b")
    fold(tmp_path / "base", tmp_path / "b", tmp_path / "out")
    merged = peft_loads(llama(), tmp_path / "b").merge_and_unload()
    got = load_checkpoint(tmp_path / "out")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(got[name], tensor)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_extracted_lora_gives_the_fine_tune_back(make: Any, tmp_path: Path) -> None:
    base, tuned = make(), make()
    disturb(tuned, 5)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract_lora(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", energy=0.7, save_changed=True
    )
    peft = peft_loads(make(), tmp_path / "out").merge_and_unload().state_dict()
    start, want = base.state_dict(), tuned.state_dict()
    for name, tensor in want.items():
        module = name.removesuffix(".weight")
        if module in report.modules:
            change = tensor - start[name]
            error = (peft[name] - tensor).norm() / change.norm()
            assert abs(float(error) - report.modules[module].error) < 1e-4
            assert report.modules[module].error ** 2 <= 0.3 + 1e-6
        else:
            assert torch.equal(peft[name], tensor), name


def test_extracted_embeddings(tmp_path: Path) -> None:
    base, tuned = llama(), llama()
    disturb(tuned, 5)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    names = ["embed_tokens", "lm_head"]
    extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", modules=names, rank=32)
    peft = peft_loads(llama(), tmp_path / "out").merge_and_unload().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(peft[name], tuned.state_dict()[name], rtol=1e-4, atol=1e-4)
