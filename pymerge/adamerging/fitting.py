"""Checks the arguments of a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pymerge.adamerging.join import JOINS, Join, concatenate
from pymerge.adamerging.losses import ENTROPIES
from pymerge.errors import RequestError

if TYPE_CHECKING:
    from pymerge.adamerging.module import AdaMerging

__all__ = ["Fitting", "check_fitting"]


@dataclass(frozen=True)
class Fitting:
    """The checked arguments of `fit`."""

    steps: int
    lr: float
    batches: int
    weights: tuple[float, ...]
    entropy: str
    tokens: int | None
    autocast: torch.dtype | None
    seed: int
    accumulate: str
    join: Join | None
    patience: int | None
    min_delta: float
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool
    progress: bool


def check_fitting(
    ada: AdaMerging,
    loaders: Any,
    steps: Any,
    *,
    lr: Any,
    batches_per_task: Any,
    entropy: Any,
    weights: Any,
    tokens: Any,
    autocast: Any,
    seed: Any,
    accumulate: Any,
    join: Any,
    patience: Any,
    min_delta: Any,
    checkpoint: Any,
    checkpoint_every: Any,
    resume: Any,
    progress: Any,
) -> Fitting:
    """Return the arguments of `fit`, completed with the preset's defaults.

    Raises:
        RequestError: lists every invalid argument.
    """
    preset = ada.preset
    problems: list[str] = []
    tasks = len(ada.names) if ada.heads is not None else None
    if not isinstance(loaders, Sequence) or isinstance(loaders, str) or not loaders:
        problems.append(f"loaders: expected a list, one loader per task; got {loaders!r:.60}")
    elif tasks is not None and len(loaders) != tasks:
        problems.append(f"loaders: expected {tasks}, one for each head; got {len(loaders)}")

    def integer(name: str, value: Any, default: int, least: int) -> int:
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            problems.append(f"{name}: expected an integer >= {least}, got {value!r}")
            return least
        return value

    rate = preset.lr if lr is None else lr
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        problems.append(f"lr: expected a positive number, got {rate!r}")
    count = len(loaders) if isinstance(loaders, Sequence) else 0
    if weights is None:
        weights = [1.0] * count
    elif not _positive(weights) or len(weights) != count:
        problems.append(f"weights: expected {count} positive numbers, got {weights!r:.60}")
        weights = [1.0] * count
    kind = entropy or preset.entropy
    if kind not in ENTROPIES:
        problems.append(f"entropy: expected one of {', '.join(ENTROPIES)}; got {kind!r}")
    if accumulate not in ("coefficients", "gradients"):
        problems.append(f"accumulate: expected 'coefficients' or 'gradients', got {accumulate!r}")
    if join is not None and join not in JOINS and not callable(join):
        problems.append(f"join: expected {', '.join(JOINS)} or a function, got {join!r:.60}")
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        problems.append(f"autocast: expected torch.bfloat16 or torch.float16, got {autocast!r}")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        problems.append(f"checkpoint: the directory {path.parent} does not exist")
    delta = min_delta
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 <= delta < math.inf:
        problems.append(f"min_delta: expected a number >= 0, got {delta!r}")
        delta = 0.0
    result = Fitting(
        steps=integer("steps", steps, preset.steps, 0),
        lr=float(rate) if isinstance(rate, (int, float)) else 0.0,
        batches=integer("batches_per_task", batches_per_task, preset.batches_per_task, 1),
        weights=tuple(map(float, weights)),
        entropy=kind,
        tokens=None if tokens is None else integer("tokens", tokens, 1, 1),
        autocast=autocast,
        seed=integer("seed", seed, 0, 0),
        accumulate=accumulate,
        join=concatenate if join in JOINS else join,
        patience=None if patience is None else integer("patience", patience, 1, 1),
        min_delta=float(delta),
        checkpoint=path,
        checkpoint_every=integer("checkpoint_every", checkpoint_every, 25, 1),
        resume=bool(resume),
        progress=bool(progress),
    )
    if problems:
        raise RequestError(problems)
    return result


def _positive(values: Any) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf for x in values
    )
