"""Adapters that are damaged, not supported, or belong to another base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymerge.adapters import add, analogy, fold, load, merge_adapters, scale
from pymerge.checkpoint.peft.build import lora
from pymerge.errors import CheckpointError, NonFiniteError, RequestError
from tests import models
from tests.adapter_files import PREFIX, State, factors, lora_tensors, save_adapter, save_lora

pytestmark = pytest.mark.usefixtures("no_waiting")
no_waiting = models.no_waiting


def good() -> State:
    return lora_tensors(factors({"m.q": (6, 5), "m.k": (4, 5)}))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora: not supported: DoRA"),
    "bias of B": ({"lora_bias": True}, "lora_bias: not supported: a bias in lora_B"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters: not supported"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices: not supported"),
    "layers": ({"layer_replication": [[0, 2]]}, "layer_replication: not supported"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model"),
    "another type": ({"peft_type": "LOHA"}, "peft_type: expected one of LORA, IA3, got 'LOHA'"),
    "no type": ({"peft_type": ...}, "peft_type: expected one of LORA, IA3, got nothing"),
    "no rank": ({"r": ...}, "r: expected a whole number of at least 1, got nothing"),
    "rank 0": ({"r": 0}, "r: expected a whole number of at least 1, got 0"),
    "another rank": ({"r": 8}, "module 'm.q' has A (4, 5) and B (6, 4), expected rank 8"),
    "pattern": (
        {"rank_pattern": {"q": 2}},
        "module 'm.q' has A (4, 5) and B (6, 4), expected rank 2",
    ),
    "pattern of text": ({"rank_pattern": {"q": "2"}}, "rank_pattern['q']: expected a whole number"),
    "bad pattern": ({"alpha_pattern": {"(": 2}}, "alpha_pattern['(']: is no regular expression"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha: expected a number, got '8'"),
    "flag": ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, tmp_path: Path) -> None:
    config, expected = CONFIGS[case]
    save_adapter(tmp_path / "a", good(), **config)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "a", "my adapter")
    assert expected in str(caught.value)
    assert all(problem.startswith("my adapter: ") for problem in caught.value.problems)


def renamed(old: str, new: str | None) -> Callable[[State], None]:
    def change(tensors: State) -> None:
        tensor = tensors.pop(PREFIX + old)
        if new is not None:
            tensors[new] = tensor

    return change


def replaced(name: str, tensor: torch.Tensor) -> Callable[[State], None]:
    return lambda tensors: tensors.update({PREFIX + name: tensor})


TENSORS: dict[str, tuple[Callable[[State], None], str]] = {
    "no B": (renamed("m.q.lora_B.weight", None), "module 'm.q' has lora_A and lacks lora_B"),
    "no A": (renamed("m.q.lora_A.weight", None), "module 'm.q' has lora_B and lacks lora_A"),
    "nothing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors)] and None,
        "no tensors",
    ),
    "no modules": (
        lambda tensors: (tensors.clear(), tensors.update({f"{PREFIX}n.weight": torch.ones(3)}))[1],
        "holds no LORA modules",
    ),
    "no prefix": (
        renamed("m.q.lora_A.weight", "m.q.lora_A.weight"),
        "'m.q.lora_A.weight': expected a name that begins with 'base_model.model.'",
    ),
    "twice": (
        replaced("m.q.lora_A.default.weight", torch.ones(4, 5)),
        "module 'm.q' has A twice",
    ),
    "ranks that differ": (
        replaced("m.q.lora_B.weight", torch.ones(6, 3)),
        "module 'm.q' has A (4, 5) and B (6, 3), expected rank 4",
    ),
    "sharded": (replaced("m.q.lora_B.weight", torch.ones(24)), "training under ZeRO-3 or FSDP"),
    "empty": (replaced("m.q.lora_B.weight", torch.ones(0, 4)), "training under ZeRO-3 or FSDP"),
    "kernel in B": (
        lambda tensors: tensors.update(
            {
                f"{PREFIX}m.q.lora_A.weight": torch.ones(4, 5, 3),
                f"{PREFIX}m.q.lora_B.weight": torch.ones(6, 4, 3),
            }
        ),
        "expected B of a convolution to be [out, r, 1, ...], got (6, 4, 3)",
    ),
    "integers": (
        replaced("m.q.lora_B.weight", torch.ones(6, 4, dtype=torch.int32)),
        "expected floats, got I32",
    ),
    "magnitudes": (
        replaced("m.q.lora_magnitude_vector.weight", torch.ones(6)),
        "DoRA (weight-decomposed LoRA) is not supported",
    ),
    "bias of B": (replaced("m.q.lora_B.bias", torch.ones(6)), "is no tensor of LORA that"),
    "IA3 in LoRA": (replaced("m.q.ia3_l", torch.ones(6, 1)), "is no tensor of LORA that"),
    "whole twice": (
        lambda tensors: tensors.update(
            {
                f"{PREFIX}n.weight": torch.ones(3),
                f"{PREFIX}n.modules_to_save.weight": torch.ones(3),
            }
        ),
        "'n.weight' is there twice",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, tmp_path: Path) -> None:
    change, expected = TENSORS[case]
    tensors = good()
    change(tensors)
    save_adapter(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "a")
    assert expected in str(caught.value)


def test_all_problems_are_reported(tmp_path: Path) -> None:
    tensors = good()
    tensors.pop(f"{PREFIX}m.q.lora_B.weight")
    tensors[f"{PREFIX}m.k.lora_A.weight"] = torch.ones(2, 5)
    save_adapter(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "a")
    assert len(caught.value.problems) == 2


def test_files(tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            load(path)
        return str(caught.value)

    assert "expected a directory with adapter_config.json, got nothing" in problem(tmp_path / "x")
    save_adapter(tmp_path / "a", good())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    assert "got a file" in problem(weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert "adapter_model.safetensors" in problem(tmp_path / "a")
    weights.unlink()
    assert "has no weights; expected adapter_model.safetensors or" in problem(tmp_path / "a")
    weights.write_bytes(whole)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text('{"r": 4, "r": 5}')
    assert "adapter_config.json" in problem(tmp_path / "a")
    config.write_text("[]")
    assert "expected a JSON object, got list" in problem(tmp_path / "a")
    config.unlink()
    assert "is no adapter of PEFT: it has no adapter_config.json" in problem(tmp_path / "a")


def test_targets_without_tensors_are_warned_about(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", good(), target_modules=["q", "v"])
    assert load(tmp_path / "a").warnings == [
        f"{tmp_path / 'a'}: target_modules names 'v', of which adapter_model.safetensors has "
        "nothing"
    ]


def test_vectors_of_ia3(tmp_path: Path) -> None:
    for number, (shape, expected) in enumerate(
        (((1, 6), "(out, 1), because it is not"), ((6,), "(out, 1)"), ((0, 1), "(out, 1)"))
    ):
        path = tmp_path / str(number)
        save_adapter(path, {f"{PREFIX}m.q.ia3_l": torch.ones(shape)}, peft_type="IA3")
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert expected in str(caught.value)


# Another base


def base(tmp_path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    state = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return models.save(tmp_path / "base", state, config=config)


BASES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "another width": (
        {"m__q__weight": torch.ones(6, 9), "m__k__weight": torch.ones(4, 5)},
        "module 'm.q' is for a weight of shape (6, 5) (rank 4), but 'm.q.weight' has shape (6, 9): "
        "the adapter belongs to another base",
    ),
    "no such module": (
        {"m__q__weight": torch.ones(6, 5), "m__kk__weight": torch.ones(4, 5)},
        "module 'm.k': the base has no tensor 'm.k.weight'; did you mean 'm.kk.weight'?",
    ),
    "integers": (
        {"m__q__weight": torch.ones(6, 5, dtype=torch.int8), "m__k__weight": torch.ones(4, 5)},
        "changes 'm.q.weight' of dtype I8, expected one of F16, BF16, F32, F64",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_bases(case: str, tmp_path: Path) -> None:
    tensors, expected = BASES[case]
    save_adapter(tmp_path / "a", good())
    base(tmp_path, **tensors)
    with pytest.raises(RequestError) as caught:
        fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert expected in str(caught.value)
    assert "models[0] (" in str(caught.value)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_tied_weights(module: str, tmp_path: Path) -> None:
    base(tmp_path, {"tie_word_embeddings": True}, model__embed_tokens__weight=torch.ones(8, 5))
    if module == "lm_head":
        save_lora(tmp_path / "a", factors({module: (8, 5)}))
    else:
        tensors = {
            f"{PREFIX}{module}.lora_embedding_A": torch.ones(4, 8),
            f"{PREFIX}{module}.lora_embedding_B": torch.ones(5, 4),
        }
        save_adapter(tmp_path / "a", tensors)
    with pytest.raises(RequestError, match="folding would change both; untie the base first"):
        fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_whole_tensors_of_another_shape(tmp_path: Path) -> None:
    tensors = good() | {f"{PREFIX}norm.weight": torch.ones(7)}
    save_adapter(tmp_path / "a", tensors, modules_to_save=["norm"])
    base(
        tmp_path,
        m__q__weight=torch.ones(6, 5),
        m__k__weight=torch.ones(4, 5),
        norm__weight=torch.ones(5),
    )
    with pytest.raises(RequestError, match=r"'norm.weight' in whole with shape \(7,\), expected"):
        fold(tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_a_missing_adapter(tmp_path: Path) -> None:
    base(tmp_path, m__q__weight=torch.ones(6, 5))
    with pytest.raises(RequestError, match=r"no such file or directory: .*nowhere"):
        fold(tmp_path / "base", tmp_path / "nowhere", tmp_path / "out")


def test_adapters_that_do_not_fit_each_other() -> None:
    one = lora({"q": (np.ones((6, 2)), np.ones((2, 5)))})
    other = lora({"q": (np.ones((6, 2)), np.ones((2, 4)))})
    for call in (
        lambda: add([one, other]),
        lambda: merge_adapters([one, other], "svd"),
        lambda: merge_adapters([one, other], "ties"),
    ):
        with pytest.raises(RequestError, match="the adapters are of different bases"):
            call()


def test_nan(tmp_path: Path) -> None:
    pairs = factors({"q": (6, 5)})
    pairs["q"][1][1, 2] = float("inf")
    save_lora(tmp_path / "a", pairs)
    adapter = load(tmp_path / "a")
    for call in (
        lambda: adapter.delta("q"),
        lambda: scale(adapter, 2.0),
        lambda: merge_adapters([adapter], "cat"),
        lambda: merge_adapters([adapter, adapter], "ties"),
    ):
        with pytest.raises(NonFiniteError, match="A of 'q' holds inf at flat index 7"):
            call()


ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (lambda a: merge_adapters([], "cat"), "expected at least one, got none"),
    "one": (
        lambda a: merge_adapters(a, "cat"),
        "expected a list of adapters or paths, got Adapter",
    ),
    "other": (lambda a: add([a, 3]), "adapters[1]: expected an Adapter"),
    "method": (
        lambda a: merge_adapters([a], "tiess"),
        "unknown method 'tiess'; did you mean 'ties'",
    ),
    "weights": (lambda a: merge_adapters([a], "cat", weights=[1, 2]), "weights: expected 1, got 2"),
    "weight": (lambda a: add([a], [float("nan")]), "weights[0]: expected a finite number, got nan"),
    "factor": (lambda a: scale(a, "2"), "scale: factor: expected a finite number, got '2'"),
    "rank": (lambda a: merge_adapters([a], rank=2.5), "rank: expected an integer >= 1, got 2.5"),
    "energy": (lambda a: merge_adapters([a], energy=1.5), "expected a number in (0, 1], got 1.5"),
    "density": (lambda a: merge_adapters([a], "peft_ties"), "density is required"),
    "range": (
        lambda a: merge_adapters([a], "peft_ties", density=2),
        "density: expected a finite number in [0, 1], got 2",
    ),
    "parameter": (
        lambda a: merge_adapters([a], "cat", density=0.5),
        "unknown parameter 'density' of method cat",
    ),
    "semantics": (lambda a: add([a], semantics="x"), "expected 'exact' or 'pem', got 'x'"),
    "analogy": (lambda a: analogy(a, a, a, (1, 2, 3)), "weights: expected 2, got 3"),
    "saved": (
        lambda a: merge_adapters([a], "cat", saved="x"),
        "expected 'error' or 'drop', got 'x'",
    ),
    "ranks": (
        lambda a: merge_adapters([a, add([a, a])], "peft_linear"),
        "peft_linear combines factors, and needs one rank of module 'q', got adapter 2, adapter 4",
    ),
    "few": (lambda a: merge_adapters([a], "model_stock"), "needs at least"),
    "module": (lambda a: a.delta("p"), "has no module 'p'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    call, expected = ARGUMENTS[case]
    with pytest.raises(RequestError) as caught:
        call(lora({"q": (np.ones((6, 2)), np.ones((2, 5)))}))
    assert expected in str(caught.value)
