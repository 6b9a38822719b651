"""AdaMerging against FusionBench 0.2.33, which `make test-fusion` installs."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn

from pymerge import AdaMerging
from pymerge.adamerging import entropy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fusion_bench", reason="FusionBench is not installed: make test-fusion")
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss
    from fusion_bench.models.wrappers.layer_wise_fusion import (
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )
    from fusion_bench.models.wrappers.task_wise_fusion import (
        TaskWiseMergedModel,
        get_task_wise_weights,
    )

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 25


def family(count: int = 3) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 6))
    models = []
    for _ in range(count):
        model = deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        models.append(model)
    return base, models


def loaders(count: int = 3) -> list[list[torch.Tensor]]:
    torch.manual_seed(1)
    return [[torch.randn(16, 12) + k for _ in range(STEPS)] for k in range(count)]


def test_entropy() -> None:
    torch.manual_seed(2)
    logits = 4 * torch.randn(9, 11)
    torch.testing.assert_close(entropy(logits, kind="fusion_bench"), entropy_loss(logits))


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize("accumulate", ["coefficients", "gradients"])
def test_equal_steps_give_equal_coefficients(lr: float, granularity: str, accumulate: str) -> None:
    base, models = family()
    states = [{n: t.clone() for n, t in m.state_dict().items()} for m in (base, *models)]
    ada = AdaMerging(base, states[0], states[1:], granularity, preset="fusion_bench")
    ada.fit(loaders(), STEPS, lr=lr, accumulate=accumulate, progress=False)

    if granularity == "layer":
        weights = get_layer_wise_weights(3, len(states[0]), 0.3)
        merged = LayerWiseMergedModel(weights, base, models, clamp_weights=False)
    else:
        weights = get_task_wise_weights(3, 0.3)
        merged = TaskWiseMergedModel(weights, base, models, clamp_weights=False)
    optimizer = torch.optim.Adam([merged.merge_weight], lr=lr)
    merged.merge_weights()
    data = loaders()
    for step in range(STEPS):
        for own in data:
            entropy_loss(merged(own[step])).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        merged.merge_weights()
    theirs = merged.merge_weight.detach().reshape(3, -1)
    ours = ada.raw_coefficients.detach()
    assert float((theirs - 0.3).abs().max()) > 5 * lr  # they moved
    torch.testing.assert_close(ours, theirs, rtol=0, atol=lr / 20)
