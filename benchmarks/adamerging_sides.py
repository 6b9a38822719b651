"""One side of the AdaMerging benchmark, in its own process: needs only torch and its subject.

    python -m benchmarks.adamerging_sides SIDE FOLDER --models K --steps N --repetitions R

SIDE: "pymerge", "fusion_bench" (its LayerWiseMergedModel), "official" (the construction of the
authors' main_layer_wise_adamerging.py, rewritten from its description: all task vectors in memory,
a left-to-right sum for every forward pass), and "pymerge_official", pymerge's preset of it.
"pymerge_joined" is pymerge with join="concatenate", "pymerge_coefficients" with
accumulate="coefficients". Each learns from the same models and batches, and times (a) the time that
a step spends on merging: all merges and all backward passes through them, with given gradients of
the merged tensors for each batch; (b) whole steps. The results go to FOLDER/SIDE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

__all__ = ["Encoder", "main", "make_family"]

State = dict[str, torch.Tensor]

WIDTH, DEPTH, VOCABULARY, CLASSES = 384, 6, 30522, 10  # the size of MiniLM-L6
BATCH, LENGTH = 16, 32
_LR = 1e-3
_OWN: dict[str, dict[str, str]] = {
    "pymerge": {},
    "pymerge_joined": {"join": "concatenate"},
    "pymerge_coefficients": {"accumulate": "coefficients"},
    "pymerge_official": {"preset": "official"},
}


class Encoder(nn.Module):
    """A text encoder of the size of MiniLM-L6: token ids [batch, length] -> [batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(tokens)).mean(dim=1)


def make_family(folder: Path, count: int) -> None:
    """Write a base and `count` models with normal task vectors, in float32."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = {name: tensor.detach().clone() for name, tensor in Encoder().state_dict().items()}
    for k in range(count + 1):
        spread = 0.0 if k == 0 else 0.01
        model = {name: t + spread * torch.randn_like(t) for name, t in base.items()}
        (folder / f"model-{k}").mkdir(exist_ok=True)
        save_file(model, folder / f"model-{k}" / "model.safetensors")


def _heads(count: int) -> list[nn.Linear]:
    torch.manual_seed(1)
    return [nn.Linear(WIDTH, CLASSES).requires_grad_(False) for _ in range(count)]


def _loaders(count: int, steps: int) -> list[list[torch.Tensor]]:
    torch.manual_seed(2)
    size = (BATCH, LENGTH)
    return [[torch.randint(0, VOCABULARY, size) for _ in range(2 * steps)] for _ in range(count)]


def _load(folder: Path, count: int) -> tuple[State, list[State]]:
    from safetensors.torch import load_file

    states = [load_file(folder / f"model-{k}" / "model.safetensors") for k in range(count + 1)]
    return states[0], states[1:]


def _gradients(base: State) -> State:
    torch.manual_seed(3)
    return {name: torch.randn_like(tensor) for name, tensor in base.items()}


def _median(function: Callable[[], None], repetitions: int) -> float:
    function()
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _pymerge(
    folder: Path,
    count: int,
    steps: int,
    repetitions: int,
    *,
    preset: str = "fusion_bench",
    **how: Any,
) -> dict[str, Any]:
    from pymerge import AdaMerging

    paths = [folder / f"model-{k}" for k in range(count + 1)]
    with torch.device("meta"):
        architecture = Encoder().eval()
    ada = AdaMerging(architecture, paths[0], paths[1:], preset=preset, heads=_heads(count))
    gradients = _gradients({n: torch.empty(s) for n, _, s in ada.merged_kinds()})

    batches = ada.preset.batches_per_task * count

    def once() -> None:
        merged = ada.merged_parameters()
        tensors, given = [merged[name] for name in gradients], list(gradients.values())
        if how.get("accumulate") != "coefficients":
            total = [gradient.clone() for gradient in given]
            for _ in range(batches - 1):
                for own, gradient in zip(total, given, strict=True):
                    own.add_(gradient)
            torch.autograd.backward(tensors, total)
        else:
            for _ in range(batches):
                torch.autograd.backward(tensors, given, retain_graph=True)
        ada.raw_coefficients.grad = None

    merge = _median(once, repetitions)
    fit = ada.fit(_loaders(count, steps), steps, progress=False, **how)
    return {
        "merge": merge,
        "step": statistics.median(row["seconds"] for row in fit.history),
        "coefficients": ada.raw_coefficients.tolist(),
        "layers": list(ada.layers),
    }


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits, dim=-1)
    return -torch.sum(p * torch.log(p + 1e-8), dim=-1).mean()


def _fusion_bench(folder: Path, count: int, steps: int, repetitions: int) -> dict[str, Any]:
    from fusion_bench.models.wrappers.layer_wise_fusion import (  # pyright: ignore
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )

    base, models = _load(folder, count)

    def module(state: State) -> Encoder:
        made = Encoder().eval()
        made.load_state_dict(state, assign=True)
        return made.requires_grad_(True)

    names = list(base)
    weights = get_layer_wise_weights(count, len(names), 0.3)
    gradients = _gradients(base)
    merged = LayerWiseMergedModel(
        weights, module(base), [module(one) for one in models], clamp_weights=False
    )

    def once() -> None:
        state = merged.merge_weights()
        tensors, given = [state[name] for name in gradients], list(gradients.values())
        for _ in range(count):
            torch.autograd.backward(tensors, given, retain_graph=True)
        merged.merge_weight.grad = None

    merge = _median(once, repetitions)
    optimizer = torch.optim.Adam([merged.merge_weight], lr=_LR)
    heads, batches = _heads(count), [iter(one) for one in _loaders(count, steps)]
    merged.merge_weights()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        for k in range(count):
            _entropy(heads[k](merged(next(batches[k])))).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        merged.merge_weights()
        seconds.append(time.perf_counter() - begin)
    order = [name for name, _ in merged.task_vectors[0].named_parameters()]
    return {
        "merge": merge,
        "step": statistics.median(seconds),
        "coefficients": merged.merge_weight.tolist(),
        "layers": order,
    }


def _official(folder: Path, count: int, steps: int, repetitions: int) -> dict[str, Any]:
    base, models = _load(folder, count)
    names = list(base)
    vectors = [list(base.values())]
    vectors += [[model[name] - base[name] for name in names] for model in models]
    del models
    table = nn.Parameter(torch.full((len(names), count), 0.3))
    architecture, heads = Encoder().eval(), _heads(count)
    gradients = list(_gradients(base).values())

    def merge() -> list[torch.Tensor]:
        used = torch.clamp(table, min=0.0, max=1.0)
        lambdas = torch.cat([torch.ones(len(names), 1), used], dim=1)
        return [
            sum(tau * weight for tau, weight in zip(layer, lambdas[j], strict=True))  # pyright: ignore
            for j, layer in enumerate(zip(*vectors, strict=True))
        ]

    def once() -> None:
        for _ in range(2 * count):
            torch.autograd.backward(merge(), gradients)
        table.grad = None

    median = _median(once, repetitions)
    optimizer = torch.optim.Adam([table], lr=_LR, betas=(0.9, 0.999), weight_decay=0.0)
    batches: list[Iterator[torch.Tensor]] = [iter(one) for one in _loaders(count, steps)]
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        losses = torch.zeros(())
        for k in range(count):
            for _ in range(2):
                state = dict(zip(names, merge(), strict=True))
                logits = heads[k](functional_call(architecture, state, (next(batches[k]),)))
                losses = losses - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean(0)
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return {
        "merge": median,
        "step": statistics.median(seconds),
        "coefficients": table.T.tolist(),
        "layers": names,
    }


def main() -> None:
    """Run a side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--repetitions", type=int, required=True)
    options = parser.parse_args()
    size = options.folder, options.models, options.steps, options.repetitions
    if options.side == "fusion_bench":
        found = _fusion_bench(*size)
    elif options.side == "official":
        found = _official(*size)
    else:
        found = _pymerge(*size, **_OWN[options.side])
    (options.folder / f"{options.side}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
