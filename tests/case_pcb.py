"""Arguments and outputs of the case table's rows of PCB: its statistics and thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.case import padded, weights_of
from tests.case_sums import sums_of


def _pcb_reals(variant: int, models: int) -> list[float]:
    """Return statistics of a realistic size."""
    pairs = models * (models + 1) // 2
    if variant == 0:
        numbers = [-1e-4 - 1e-6 * p for p in range(pairs)] + [4e3 + p for p in range(pairs)]
        numbers += [0.5 + 0.01 * p for p in range(pairs)] + [0.7 + 0.1 * k for k in range(models)]
        numbers += [0.9] * models
    else:
        numbers = [1e-4] * models + [0.02 + 1e-3 * k for k in range(models)]
        numbers += [60.0 - k for k in range(models)] + [1e-6] * models
        numbers += [2e-3] * models + [0.0 if k == 1 else 500.0 for k in range(models)]
    return [*numbers, *weights_of(models), 0.8]


def pcb_statistics(
    variant: int, base: torch.Tensor, models: Sequence[torch.Tensor], ratio: float
) -> list[float]:
    """Return the statistics of these elements, as a merge computes them, with NaN and infinity as
    0."""
    base = base.float().nan_to_num(0.0, 0.0, 0.0)
    tuned = [model.float().nan_to_num(0.0, 0.0, 0.0) for model in models]
    taus = [model - base for model in tuned]
    count, numel = len(models), base.numel()
    if variant == 0:
        pairs = [taus[i] * taus[j] for i in range(count) for j in range(i, count)]
        least = [float(product.min()) for product in pairs]
        inverse = [
            _inverse(float(product.max()) - low) for product, low in zip(pairs, least, strict=True)
        ]
        scaled = [(pair - low) * inv for pair, low, inv in zip(pairs, least, inverse, strict=True)]
        own = [scaled[i * count - i * (i - 1) // 2] * count for i in range(count)]
        norms = [numel / float(x.double().exp().sum()) for x in (*scaled, *own)]
        numbers = [*least, *inverse, *norms]
    else:
        ordered = [tau.abs().sort().values for tau in taus]
        lo = [float(size[int(numel * 0.01)]) for size in ordered]
        hi = [float(size[max(0, int(numel * 0.99 - 1))]) for size in ordered]
        numbers = [*lo, *hi, *(_inverse(b - a) for a, b in zip(lo, hi, strict=True))]
    thresholds = [0.0] * count * (1 if variant == 0 else 3)
    scores = torch.empty(count, padded(numel))
    torch.ops.pymerge.pcb_scores_(
        scores,
        torch.zeros(3, dtype=torch.int64),
        base,
        tuned,
        variant,
        [*numbers, *thresholds, *weights_of(count), 1.0],
        backend="reference",
    )
    ordered = [row[:numel].sort().values for row in scores]
    q = [float(row[min(int(numel * (1 - ratio)), numel - 1)]) for row in ordered]
    numbers += q
    if variant != 0:
        top = [float(row[-1]) for row in ordered]
        numbers += [*top, *(_inverse(high - low) for high, low in zip(top, q, strict=True))]
    return [*numbers, *weights_of(count), 0.8]


def _inverse(spread: float) -> float:
    return min(1 / spread, 3e38) if spread > 0 else 0.0


_last: list[Any] = []  # the inputs of the last statistics, and the statistics


def _known_statistics(variant: int, base: torch.Tensor, models: list[torch.Tensor]) -> list[float]:
    """Return the statistics of elements that are passed repeatedly, to every backend in turn."""
    key = [variant, base, *models]
    if not _last or len(_last[0]) != len(key) or any(map(_differ, _last[0], key)):
        ratio = 0.05 if variant > 1 else 0.1
        _last[:] = [key, pcb_statistics(variant, base, models, ratio)]
    return _last[1]


def _differ(a: Any, b: Any) -> bool:
    return a is not b if isinstance(a, torch.Tensor) else a != b


def pcb_of(variant: int) -> Callable[..., dict[str, Any]]:
    """Return arguments with the statistics and thresholds of the elements, made up if there are
    few."""

    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        if base.numel() < 1000:
            reals = _pcb_reals(variant, len(models))
        else:
            reals = _known_statistics(variant, base, models)
        return {"base": base, "models": models, "variant": variant, "reals": reals}

    return arguments


def pcb_scores_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {
        "scores": torch.full((len(models), padded(base.numel())), 7.0),
        "stats": torch.zeros(3, dtype=torch.int64),
    }


def pcb_exp_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    pairs = len(models) * (len(models) + 1) // 2
    return sums_of("pcb_exp", reals=_pcb_reals(0, len(models))[: 2 * pairs])(base, models)
