"""Agreement with mergekit on random configs, from YAML to the files, in float32."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pymerge.commands.main import main

config_of = pytest.importorskip("mergekit.config")
mergekit = pytest.importorskip("mergekit.merge")
options_of = pytest.importorskip("mergekit.options")
transformers = pytest.importorskip("transformers")

# Bit for bit, but where a sum of weights divides all elements: mergekit adds it up in float32. The
# others within rounding: 4 units in the last place of a tensor's largest element.
EXACT = {
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "arcee_fusion",
    "passthrough",
}
WEIGHTS = {"weight": (0.1, 1.0)}
SPARSE = {"weight": (0.1, 1.0), "density": (0.1, 1.0)}
BANDS = {"weight": (0.1, 1.0), "density": (0.3, 0.9), "gamma": (0.0, 0.05)}
SUMS = {"normalize": None, "lambda": (0.2, 1.5)}
# (has a base, least and most models, parameters of a model, parameters of all)
Method = tuple[bool, int, int, Mapping[str, Any], Mapping[str, Any]]
METHODS: dict[str, Method] = {
    "linear": (False, 2, 3, WEIGHTS, {"normalize": None}),
    "task_arithmetic": (True, 1, 3, {"weight": (-0.5, 1.0)}, SUMS),
    "ties": (True, 1, 3, SPARSE, SUMS),
    "breadcrumbs": (True, 1, 3, BANDS, SUMS),
    "breadcrumbs_ties": (True, 1, 3, BANDS, SUMS),
    "dare_linear": (True, 1, 3, WEIGHTS, SUMS),
    "nuslerp": (False, 2, 2, WEIGHTS, {}),
    "multislerp": (False, 2, 3, WEIGHTS, {}),
    "karcher": (False, 2, 3, {}, {}),
    "model_stock": (True, 2, 3, {}, {}),
    "sce": (True, 2, 3, {}, {"select_topk": (0.2, 1.0)}),
    "arcee_fusion": (True, 1, 1, {}, {}),
    "nearswap": (True, 1, 1, {}, {"t": (0.001, 0.02)}),
    "passthrough": (False, 1, 1, {"scale": (0.5, 1.5)}, {}),
}
FILTERS = ["self_attn", "mlp", "layernorm", "q_proj", "embed_tokens", "layers.1.", "lm_head"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and three models, small Llamas of several shards."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    found = {}
    for name in ("base", "a", "b", "c"):
        found[name] = str(folder / name)
        model.save_pretrained(found[name], max_shard_size="20KB")
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn(weight.shape))
    return found


def setting(rng: random.Random, limits: tuple[float, float] | None) -> Any:
    """A value, values over the layers, or filters with one of these; None: a switch."""

    def one() -> Any:
        return rng.random() < 0.5 if limits is None else round(rng.uniform(*limits), 3)

    def some() -> Any:
        return one() if rng.random() < 0.6 else [one() for _ in range(rng.randint(1, 4))]

    if limits is None or rng.random() < 0.5:
        return some()
    filters = rng.sample(FILTERS, rng.randint(1, 3))
    return [*({"filter": f, "value": some()} for f in filters), {"filter": "*", "value": some()}]


def random_config(rng: random.Random, method: str, paths: Mapping[str, str]) -> dict[str, Any]:
    has_base, least, most, each, shared = METHODS[method]
    # What is said for all models goes for those that say nothing.
    everywhere = {n: setting(rng, limits) for n, limits in each.items() if rng.random() < 0.25}
    models = []
    for name in rng.sample(["a", "b", "c"], rng.randint(least, most)):
        own = {
            n: setting(rng, limits)
            for n, limits in each.items()
            if n not in everywhere or rng.random() < 0.4
        }
        models.append({"model": paths[name], **({"parameters": own} if own else {})})
    needed = ("t", "select_topk")
    parameters = everywhere | {
        n: setting(rng, limits) for n, limits in shared.items() if n in needed or rng.random() < 0.6
    }
    if method == "dare_linear":
        parameters["density"] = 1.0  # what is dropped at random differs
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if has_base:
        config["base_model"] = paths["base"]
    if parameters:
        config["parameters"] = parameters
    return config


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.filterwarnings("default")  # mergekit's own
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_random_configs(
    method: str, seed: int, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    config = random_config(random.Random(f"{method} {seed}"), method, checkpoints)
    text = yaml.safe_dump(config, sort_keys=False)
    (tmp_path / "config.yml").write_text(text)
    assert main(["merge", str(tmp_path / "config.yml"), str(tmp_path / "ours"), "--quiet"]) == 0
    logging.disable(logging.CRITICAL)
    try:
        options = options_of.MergeOptions(copy_tokenizer=False, quiet=True)
        merge = config_of.MergeConfiguration.model_validate(config)
        mergekit.run_merge(merge, str(tmp_path / "theirs"), options)
    finally:
        logging.disable(logging.NOTSET)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    divided = method in ("task_arithmetic", "breadcrumbs") and config.get("parameters", {}).get(
        "normalize"
    )
    assert ours.keys() == theirs.keys()
    for name, other in theirs.items():
        own = ours[name]
        assert own.dtype == other.dtype
        if method in EXACT and not divided:
            assert torch.equal(own, other), (name, text)
        unit = float(other.abs().max()) * torch.finfo(torch.float32).eps
        assert float((own - other).abs().max()) <= 4 * unit, (name, text)
