"""Pre-training of the Vision Transformer: classes of pictures, moved, turned and coloured anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.demo.console import Log
from benchmarks.demo.language_model import compute_dtype
from benchmarks.quality.methods import State
from benchmarks.quality.vit_model import Lower, Shape, Upper
from benchmarks.quality.vit_pictures import Pictures

__all__ = ["Network", "PreTraining", "augmented", "pre_train"]

_SCALE = 20.0


@dataclass(frozen=True)
class PreTraining:
    """AdamW; the rate rises for `warmup` steps and falls along a cosine to 0.

    Attributes:
        steps: batches.
        batch: pictures in one.
        rate: the highest learning rate of AdamW.
        matrix_rate: of Muon.
        decay: weight decay.
        warmup: steps.
        shares: of the sources in a batch.
        smoothing: of labels.
        seed: of everything random.
        save_every: after so many steps an interrupted run goes on.
    """

    steps: int = 600
    batch: int = 128
    rate: float = 2e-3
    matrix_rate: float = 8e-3
    decay: float = 0.05
    warmup: int = 20
    shares: tuple[float, ...] = (0.3, 0.4, 0.3)
    smoothing: float = 0.0
    seed: int = 0
    save_every: int = 50

    def recipe(self) -> dict[str, Any]:
        """Return what the result depends on."""
        found = asdict(self)
        del found["save_every"]
        return {**found, "scale": _SCALE, "compute": str(compute_dtype())}


def augmented(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return pictures on a background, turned, moved, sized and coloured at random.

    Args:
        images: [n, 4, side, side], uint8.
        size: of what is returned, [n, 3, size, size], about [-1, 1].
        generator: of the chance.
    """

    def chance(*shape: int) -> torch.Tensor:
        return torch.rand(len(images), *shape, generator=generator)

    angle = (chance() - 0.5) * 0.4
    zoom = 0.85 + 0.4 * chance()
    stretch = (chance() - 0.5).mul(0.2).exp()
    shear = (chance() - 0.5) * 0.2
    cos, sin = angle.cos(), angle.sin()
    moved = (chance(2) - 0.5) * 0.25
    rows = torch.stack([cos * zoom * stretch, -sin * zoom + shear, moved[:, 0]], 1)
    others = torch.stack([sin * zoom, cos * zoom / stretch, moved[:, 1]], 1)
    grid = F.affine_grid(
        torch.stack([rows, others], 1), [len(images), 4, size, size], align_corners=False
    )
    pixels = images.float() / 255.0
    alpha = pixels[:, 3:]
    # made smaller first: sampling alone would lose thin lines
    small = F.adaptive_avg_pool2d(torch.cat([pixels[:, :3] * alpha, alpha], 1), size)
    seen = F.grid_sample(small, grid, align_corners=False)
    # a grey background for half of them
    ground = torch.where(chance(1) < 0.5, chance(1).expand(-1, 3), chance(3))
    # what is all white gets a colour, too, and must be seen
    tint = torch.where(chance(1) < 0.6, torch.ones(()), 0.4 + 0.6 * chance(3))
    hidden = (ground - tint).abs().mean(1, keepdim=True) < 0.3
    ground = torch.where(hidden | (chance(1) < 0.5), torch.zeros(()), ground)[..., None, None]
    tint = tint[..., None, None]
    found = seen[:, :3] * tint + (1.0 - seen[:, 3:]) * ground
    found = found * 2.0 - 1.0
    found = torch.where(chance(1, 1, 1) < 0.15, -found, found)
    found = torch.where(chance(1, 1, 1) < 0.15, found.mean(1, keepdim=True), found)
    found = found * (0.75 + 0.4 * chance(1, 1, 1)) + (chance(1, 1, 1) - 0.5) * 0.2
    noise = torch.randn(found.shape, generator=generator) * 0.08 * chance(1, 1, 1)
    return (found + noise).clamp(-1.0, 1.0)


class Network(nn.Module):
    """Both halves and the directions of the classes; the latter are thrown away."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.lower, self.upper = Lower(shape), Upper(shape)
        # without it all features stay near one direction, and nothing is learned for long
        self.centre = nn.BatchNorm1d(shape.width, affine=False)
        self.classes = nn.Parameter(0.02 * torch.randn(classes, shape.width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits: scaled cosines."""
        tokens = self.lower(images)
        features = F.normalize(self.centre(self.upper.pooled(tokens)), dim=1)
        return _SCALE * features @ F.normalize(self.classes, dim=1).T

    @torch.no_grad()
    def states(self) -> tuple[State, State]:
        """Return both halves' states; the last LayerNorm centres and scales as `centre` does."""
        lower = {name: t.clone() for name, t in self.lower.state_dict().items()}
        upper = {name: t.clone() for name, t in self.upper.state_dict().items()}
        assert self.centre.running_mean is not None
        assert self.centre.running_var is not None
        scale = (self.centre.running_var + self.centre.eps).rsqrt()
        upper["norm.weight"] *= scale
        upper["norm.bias"] = (upper["norm.bias"] - self.centre.running_mean) * scale
        return lower, upper


def pre_train(
    found: Pictures, shape: Shape, how: PreTraining, kept: Path, log: Log
) -> tuple[State, State]:
    """Return the states of the lower and the upper half; goes on from `kept`, if it is there.

    Args:
        found: the pictures.
        shape: of the transformer.
        how: to train.
        kept: a file for what an interrupted run has got so far.
        log: told of every step.
    """
    torch.manual_seed(how.seed)
    network = Network(shape, int(found.labels.max()) + 1)
    optimizers = _optimizers(network, how)
    first = 0
    if kept.is_file():
        saved = torch.load(kept, weights_only=True)
        network.load_state_dict(saved["network"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first = saved["step"]
        log.say(f"pre-training goes on after step {first}")
    where = [(found.sources == source).nonzero()[:, 0] for source in range(len(how.shares))]
    counts = [round(share * how.batch) for share in how.shares]
    with log.steps("pre-training", how.steps - first) as advance:
        for step in range(first, how.steps):
            warm = min(1.0, (step + 1) / how.warmup)
            pace = warm * 0.5 * (1 + math.cos(math.pi * step / how.steps))
            for group in (group for one in optimizers for group in one.param_groups):
                group["lr"] = group["initial_lr"] * pace
            generator = torch.Generator().manual_seed(how.seed * how.steps + step)
            chosen = torch.cat(
                [
                    which[torch.randint(len(which), (count,), generator=generator)]
                    for which, count in zip(where, counts, strict=True)
                ]
            )
            images = augmented(found.images[chosen], shape.image, generator)
            labels = found.labels[chosen]
            logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=how.smoothing)
            network.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            if (step + 1) % how.save_every == 0:
                _save(kept, network, optimizers, step + 1)
            right = (logits.argmax(1) == labels).float().mean().item()
            advance(f"loss {loss.item():.2f}, {100 * right:.0f} % right")
    return network.states()


def _optimizers(network: Network, how: PreTraining) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for everything else."""
    matrices, rest = [], []
    for name, weight in network.named_parameters():
        (matrices if ".blocks." in name and weight.dim() == 2 else rest).append(weight)
    muon = torch.optim.Muon(
        matrices, lr=how.matrix_rate, weight_decay=how.decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=how.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    found: list[torch.optim.Optimizer] = [muon, adam]
    for group in (group for one in found for group in one.param_groups):
        group["initial_lr"] = group["lr"]
    return found


def _save(
    kept: Path, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}.tmp")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(
        {"network": network.state_dict(), "optimizers": states, "step": step},
        temporary,
    )
    temporary.replace(kept)
