"""AdaMerging: learning the coefficients, and how entropy and loss go together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pymerge import AdaMerging, MergeError, RequestError
from pymerge.adamerging import entropy, entropy_of_each
from tests.test_adamerging import State, make


def loaders(count: int = 3, batches: int = 4) -> list[list[torch.Tensor]]:
    torch.manual_seed(7)
    return [[torch.randn(6, 8) + k for _ in range(batches)] for k in range(count)]


def fitted(**how: Any) -> tuple[AdaMerging, Any]:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    result = ada.fit(loaders(), progress=False, **how)
    return ada, result


# ------------------------------------------------------------------ entropy


def test_entropy_is_the_definition() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 7, dtype=torch.float64)
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(entropy_of_each(logits), -(p * p.log()).sum(-1))
    expected = -(p * (p + 1e-8).log()).sum(-1)
    torch.testing.assert_close(entropy_of_each(logits, "fusion_bench"), expected)
    assert float(entropy(torch.zeros(3, 10))) == pytest.approx(math.log(10))


def test_entropy_is_stable() -> None:
    none = float("-inf")
    logits = torch.tensor([[1e4, -1e4, none], [0.0, 0.0, none]], requires_grad=True)
    each = entropy_of_each(logits)
    assert each.tolist() == [0.0, pytest.approx(math.log(2))]
    each.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_entropy_of_tokens_leaves_padding_out() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    each = entropy_of_each(logits)
    assert float(entropy(logits, mask=mask)) == pytest.approx(float(each[mask != 0].mean()))
    drawn = [
        float(entropy(logits, mask=mask, tokens=2, generator=torch.Generator().manual_seed(s)))
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(RequestError, match="mask: expected at least one prediction"):
        entropy(logits, mask=torch.zeros(2, 4))
    with pytest.raises(RequestError, match=r"mask: expected shape \(2, 4\)"):
        entropy(logits, mask=torch.ones(2, 3))


# ------------------------------------------------------------------ fit


def test_entropy_sinks_and_a_run_repeats() -> None:
    ada, result = fitted(steps=40, lr=5e-3)
    assert result.steps == 40
    assert result.stopped == "steps"
    assert result.history[-1]["entropy"] < result.history[0]["entropy"]
    assert len(result.history[0]["tasks"]) == 3
    again, _ = fitted(steps=40, lr=5e-3)
    assert torch.equal(ada.raw_coefficients, again.raw_coefficients)


def test_a_step_is_that_of_the_official_code() -> None:
    """Two batches a task, losses added up, one step of Adam, coefficients cut to [0, 1]."""
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    data = loaders()
    ada.fit(data, steps=3, progress=False)
    table = nn.Parameter(torch.full((3, 4), 0.3))
    optimizer = torch.optim.Adam([table], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    position = [0, 0, 0]
    for _ in range(3):
        used = table.clamp(0, 1)
        merged = {
            name: sum(
                (used[k, i] * (m[name] - base[name]) for k, m in enumerate(models)), base[name]
            )
            for i, name in enumerate(ada.layers)
        }
        total = torch.zeros(())
        for k, own in enumerate(data):
            for _ in range(2):
                x = own[position[k] % len(own)]
                position[k] += 1
                logits = torch.func.functional_call(net, merged, (x,))
                total = total - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean(0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    # Adam's first steps are of the size lr whatever the gradient: signs must agree, and do.
    torch.testing.assert_close(ada.raw_coefficients, table, rtol=0, atol=2e-5)


def test_both_ways_of_accumulation_agree() -> None:
    one, _ = fitted(steps=15, accumulate="coefficients")
    other, _ = fitted(steps=15, accumulate="gradients")
    torch.testing.assert_close(one.raw_coefficients, other.raw_coefficients, rtol=0, atol=1e-4)


def test_weights_of_tasks() -> None:
    weights = [3.0, 0.01, 0.5]
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    batches = loaders(batches=1)
    merged = ada.merged_parameters()
    total = sum(
        weight * entropy(ada.run(merged, (one[0],), {}, None))
        for weight, one in zip(weights, batches, strict=True)
    )
    (gradient,) = torch.autograd.grad(torch.as_tensor(total), ada.raw_coefficients)
    before = ada.raw_coefficients.detach().clone()
    ada.fit(batches, steps=1, weights=weights, progress=False)
    # The first step of Adam goes by the rate against the sign of the gradient.
    far = gradient.abs() > 1e-6
    moved = (ada.raw_coefficients.detach() - before)[far]
    assert far.any()
    torch.testing.assert_close(moved, -1e-3 * gradient[far].sign(), rtol=0.02, atol=0)


def test_merges_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    merges = 0
    original = ada.merged_parameters

    def counted() -> State:
        nonlocal merges
        merges += 1
        return original()

    monkeypatch.setattr(ada, "merged_parameters", counted)
    ada.fit(loaders(), steps=4, progress=False)
    assert merges == 4


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    """Batches that can only be read one after the other."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_interrupted_run_goes_on(tmp_path: Path, streamed: bool) -> None:
    state = tmp_path / "state.safetensors"
    whole, _ = fitted(steps=12)
    # After seven steps of two batches the loaders, of four batches each, stand in their middle.
    _, first = fitted(steps=7, checkpoint=state)
    assert first.steps == 7
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    again = [Stream(one) for one in loaders()] if streamed else loaders()
    result = ada.fit(again, steps=12, checkpoint=state, progress=False)
    assert result.steps == 12
    assert len(result.history) == 12
    torch.testing.assert_close(ada.raw_coefficients, whole.raw_coefficients, rtol=0, atol=1e-7)
    done = ada.fit(loaders(), steps=12, checkpoint=state, progress=False)
    assert done.stopped == "already done"
    with pytest.raises(RequestError, match=r"checkpoint: .*was made with lr 0.001, now it is 0.01"):
        ada.fit(loaders(), steps=12, lr=0.01, checkpoint=state, progress=False)
    save_file({"x": torch.zeros(1)}, state)
    with pytest.raises(RequestError, match="expected the state of a fit, got another file"):
        ada.fit(loaders(), steps=12, checkpoint=state, progress=False)


def test_a_run_goes_on_with_the_same_models_and_init_only(tmp_path: Path) -> None:
    net, base, models = make()
    state = tmp_path / "state"

    def go_on(*changed: State, init: Any = 0.3, trimmed: bool = False, **how: Any) -> str:
        ada = AdaMerging(net, base, changed or models, trimmed=trimmed, init=init)
        try:
            return ada.fit(loaders(), steps=2, checkpoint=state, progress=False, **how).stopped
        except RequestError as error:
            return str(error)

    assert go_on() == "steps"
    assert go_on() == "already done"
    assert go_on(*(dict(model) for model in models)) == "already done"
    assert "was made with init 0.3" in go_on(init=0.5)
    assert "was made with weights [1.0, 1.0, 1.0]" in go_on(weights=[1.0, 2.0, 1.0])
    table = torch.linspace(0, 1, 12).view(3, 4)
    assert re.search(r"init 0.3\d*, now it is 'a table, sha256:", go_on(init=table))
    other = [{name: tensor.clone() for name, tensor in model.items()} for model in models]
    other[2]["second.bias"][-1] += 1
    assert "was made with base and models with the contents 'sha256:" in go_on(*other)
    state.unlink()
    assert go_on(trimmed=True) == "steps"
    assert go_on(trimmed=True) == "already done"
    other[2]["second.bias"][-1] += 1
    assert "base and models with the contents" in go_on(*other, trimmed=True)


def test_a_run_does_not_go_on_with_a_tensor_that_differs_near_its_end(tmp_path: Path) -> None:
    net = nn.Linear(64, 64)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    data = [[torch.ones(2, 64)]]
    how = {"steps": 1, "checkpoint": tmp_path / "state", "progress": False}
    AdaMerging(net, base, [base]).fit(data, **how)
    for index in (0, 1100, 2200, 3300):
        other = {name: tensor.clone() for name, tensor in base.items()}
        other["weight"].view(-1)[index] += 1
        with pytest.raises(RequestError, match="base and models with the contents"):
            AdaMerging(net, base, [other]).fit(data, **how)


def test_states_that_are_damaged_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    ada, _ = fitted(steps=2, checkpoint=state)
    with safe_open(state, "pt") as file:
        metadata = file.metadata()
    good = load_file(state)

    def message(tensors: State, **changed: str) -> str:
        save_file(tensors, state, metadata | changed)
        with pytest.raises(RequestError) as caught:
            ada.fit(loaders(), steps=4, checkpoint=state, progress=False)
        return str(caught.value)

    assert "coefficients has shape (2, 2), expected (3, " in message(
        good | {"coefficients": torch.zeros(2, 2)}
    )
    assert "adam.exp_avg has shape (1,)" in message(good | {"adam.exp_avg": torch.zeros(1)})
    without = {name: tensor for name, tensor in good.items() if name != "adam.step"}
    assert "expected the state of Adam, exp_avg, exp_avg_sq, step; got exp_avg" in message(without)
    assert "metadata: settings: expected an object" in message(good, settings="[]")
    assert "metadata: history: expected a list" in message(good, history="{}")
    assert "metadata 'history': is not JSON: Expecting value" in message(good, history="")
    assert "one of another version" in message(good, format="pymerge.adamerging.fit/1")
    save_file(good, state, metadata)
    assert ada.fit(loaders(), steps=2, checkpoint=state, progress=False).stopped == "already done"


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(MergeError, match=r"checkpoint: .*state: cannot be written"):
        fitted(steps=1, checkpoint=tmp_path / "state", resume=False)
    net, base, models = make()
    with pytest.raises(MergeError, match=r"coefficients: .*lam\.safetensors: cannot be written"):
        AdaMerging(net, base, models).save_coefficients(tmp_path / "none" / "lam.safetensors")
    with pytest.raises(MergeError, match=r"coefficients: \.: cannot be written: Is a directory"):
        AdaMerging(net, base, models).save_coefficients(".")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_it_stops_when_nothing_changes() -> None:
    _, result = fitted(steps=200, patience=5, min_delta=10.0)
    assert result.stopped == "patience"
    assert result.steps == 20 + 5  # a window, and five windows that are no better


def test_mixed_precision() -> None:
    ada, result = fitted(steps=10, autocast=torch.bfloat16)
    assert math.isfinite(result.history[-1]["entropy"])
    assert ada.raw_coefficients.dtype == torch.float32


def test_language_model_with_padding() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.out = nn.Linear(8, 11)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return {"logits": self.out(self.embed(input_ids) * attention_mask.unsqueeze(-1))}

    torch.manual_seed(0)
    net = Language()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    models = [{n: t + 0.3 * torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    ids = torch.randint(0, 11, (3, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    ada = AdaMerging(net, base, models)
    with torch.no_grad():
        logits = ada(input_ids=ids, attention_mask=mask)["logits"]
        expected = float(entropy_of_each(logits)[mask != 0].mean())
    result = ada.fit([[batch], [batch]], steps=8, lr=1e-2, progress=False)
    assert result.history[0]["tasks"][0] == pytest.approx(expected, rel=1e-5)
    assert result.history[-1]["entropy"] < result.history[0]["entropy"]
    # Each step draws tokens of its own.
    drawn = ada.fit([[batch], [batch]], steps=6, lr=1e-9, tokens=2, progress=False)
    assert len({round(row["tasks"][0], 3) for row in drawn.history}) > 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": -1}, "steps: expected an integer >= 0"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"batches_per_task": 0}, "batches_per_task: expected an integer >= 1"),
        ({"entropy": "shannon"}, "entropy: expected one of exact, fusion_bench"),
        ({"accumulate": "sum"}, "accumulate: expected 'coefficients' or 'gradients'"),
        ({"autocast": torch.int8}, "autocast: expected torch.bfloat16"),
        ({"tokens": 0}, "tokens: expected an integer >= 1"),
        ({"checkpoint": "/nowhere/at/all"}, "checkpoint: the directory /nowhere/at does not exist"),
        ({"patience": 0}, "patience: expected an integer >= 1"),
        ({"min_delta": "small"}, "min_delta: expected a number >= 0, got 'small'"),
        ({"min_delta": -1.0}, "min_delta: expected a number >= 0"),
        ({"weights": [1.0, 2.0]}, r"weights: expected 3 positive numbers, got \[1.0, 2.0\]"),
        ({"weights": [1.0, 0.0, 1.0]}, "weights: expected 3 positive numbers"),
    ],
)
def test_bad_arguments(how: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fitted(**({"steps": 1} | how))


def test_bad_loaders() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    with pytest.raises(RequestError, match=r"loaders\[1\]: expected at least one batch, got none"):
        ada.fit([[torch.randn(2, 8)], []], steps=1, progress=False)
    bad = torch.randn(2, 8)
    bad[1, 3] = float("nan")
    with pytest.raises(RequestError, match=r"loaders\[0\]: expected finite numbers, got NaN"):
        ada.fit([[bad]], steps=1, progress=False)
    broken = [dict(model) for model in models]
    broken[1]["second.bias"] = torch.full((5,), float("nan"))
    with pytest.raises(RequestError, match=r"models\[1\]\['second.bias'\]: expected finite"):
        AdaMerging(net, base, broken).fit([[torch.randn(2, 8)]], steps=1, progress=False)
    with pytest.raises(RequestError, match="inputs: expected batches that are tensors"):
        ada.fit([["text"]], steps=1, progress=False)
    with pytest.raises(RequestError, match="loaders: expected a list"):
        ada.fit([], steps=1, progress=False)
    headed = AdaMerging(net, base, models, heads=[nn.Identity()] * 3)
    with pytest.raises(RequestError, match="loaders: expected 3, one for each head; got 1"):
        headed.fit([[torch.randn(2, 8)]], steps=1, progress=False)


def test_outputs_without_classes() -> None:
    net, base, models = make()
    one = AdaMerging(net, base, models, heads=[nn.Linear(5, 1)] * 3)
    x = [[torch.randn(2, 8)]] * 3
    with pytest.raises(RequestError, match=r"loaders\[0\]: logits: .*at least 2 classes"):
        one.fit(x, steps=1, progress=False)
    nothing = AdaMerging(
        net, base, models, heads=[lambda y: torch.ones(2, 4, requires_grad=True)] * 3
    )
    with pytest.raises(RequestError, match="model: expected outputs that depend on the merged"):
        nothing.fit(x, steps=1, progress=False)


def test_a_diverging_run_keeps_the_last_good_coefficients(tmp_path: Path) -> None:
    net, base, models = make()
    state = tmp_path / "state.safetensors"
    calls = 0

    def head(output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * (float("inf") if calls > 3 * 6 else 1.0)

    ada = AdaMerging(net, base, models, heads=[head] * 3)
    with pytest.raises(
        MergeError, match="fit: diverged at step 4: the entropy of task 0"
    ) as caught:
        ada.fit(loaders(), steps=200, checkpoint=state, progress=False)
    whole, _ = fitted(steps=2)  # the step before the one that went wrong gave finite entropies
    assert torch.equal(ada.raw_coefficients, whole.raw_coefficients)
    kept = load_file(tmp_path / "state.last-good.safetensors")["coefficients"]
    assert torch.equal(kept, ada.raw_coefficients.detach())
    assert str(tmp_path) in str(caught.value)
