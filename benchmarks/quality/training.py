"""Fine-tuning of an encoder under fixed heads, on one task or on all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.demo.console import Advance

__all__ = ["LOGIT_SCALE", "CosineHead", "Head", "Training", "class_means", "fine_tune", "steps"]

Head = Callable[[torch.Tensor], torch.Tensor]

# Cosines lie in [-1, 1]; the loss needs logits with some spread.
LOGIT_SCALE = 20.0


class CosineHead(nn.Module):
    """Unit features [n, width] -> logits [n, classes]: scaled cosines with fixed unit vectors."""

    means: torch.Tensor

    def __init__(self, means: torch.Tensor, scale: float = LOGIT_SCALE) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("means", means)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.scale * features @ self.means.T


@dataclass(frozen=True)
class Training:
    """Settings of a fine-tune: AdamW without weight decay; the rate rises for `warmup` steps and
    falls linearly to 0. `seed` determines the order of the examples."""

    epochs: int = 2
    batch: int = 20
    rate: float = 1e-4
    warmup: int = 10
    seed: int = 0

    def with_seed(self, seed: int) -> Training:
        """Return the same with another seed."""
        return replace(self, seed=seed)

    def recipe(self) -> dict[str, Any]:
        """Return the settings on which the result depends."""
        return {**asdict(self), "scale": LOGIT_SCALE}


def class_means(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the mean feature of each class, unit length: [classes, width]."""
    means = [features[labels == number].mean(dim=0) for number in range(classes)]
    return F.normalize(torch.stack(means), dim=1)


def fine_tune(
    model: nn.Module,
    tasks: Sequence[tuple[Any, torch.Tensor, Head]],
    training: Training,
    advance: Advance,
) -> None:
    """Fine-tune a model in place: a step is a batch of one task; with more, they mix at random.

    Args:
        model: inputs -> features.
        tasks: for each, the inputs (indexable by a tensor of positions), labels [n, ...] and head,
            features -> logits [n, ..., classes].
        training: the settings.
        advance: called after every step, with the loss.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.rate, weight_decay=0.0, fused=True)
    batches = list(_batches([len(labels) for _, labels, _ in tasks], training))
    for step, (number, chosen) in enumerate(batches):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / training.warmup)
            group["lr"] = training.rate * warm * (1.0 - step / len(batches))
        inputs, labels, head = tasks[number]
        logits = head(model(inputs[chosen]))
        loss = F.cross_entropy(logits.flatten(0, -2), labels[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(f"loss {loss.item():.2f}")


def steps(sizes: Sequence[int], training: Training) -> int:
    """Return how many batches tasks of these sizes take."""
    return training.epochs * sum(size // training.batch for size in sizes)


def _batches(sizes: Sequence[int], training: Training) -> Iterator[tuple[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.epochs):
        epoch = []
        for number, size in enumerate(sizes):
            order = torch.randperm(size, generator=generator)
            whole = size // training.batch * training.batch
            epoch += [(number, chosen) for chosen in order[:whole].split(training.batch)]
        for position in torch.randperm(len(epoch), generator=generator).tolist():
            yield epoch[position]
