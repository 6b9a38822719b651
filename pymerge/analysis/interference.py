"""The expected loss of a weighted sum of task vectors, from their Gram matrix alone.

The rule. Let tau_k be what fine-tuning added, m the merged model's distance from the base. Write
m = c_k tau_k + r_k with r_k orthogonal to tau_k. Assume that model k's loss on its own task is
quadratic with its minimum at the fine-tune, and that its curvature in the other directions is
`across` times that along tau_k. Then the merge loses the following share of the fine-tune's gain
over the base:

    lost_k = (1 - c_k)^2 + across * |r_k|^2 / |tau_k|^2,

with c_k = <m, tau_k> / |tau_k|^2: a second-order expansion, as in the theory of Fisher merging
(Matena & Raffel 2022, arXiv:2111.09832). The first term is a step that is too short or too long,
the second is interference proper. It is not a fitted model and has no power to rank methods;
docs/analysis.md shows how well it predicted measured merges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pymerge.analysis.records import Analysis, Group
from pymerge.errors import RequestError

__all__ = ["ACROSS", "Interference", "predict_interference"]

# Curvature across a task vector relative to that along it. 0 means no interference at all, 1 a loss
# with equal curvature in all directions. Measurements (docs/analysis.md) are near the lower end.
ACROSS = 0.1


@dataclass(frozen=True)
class Interference:
    """A prediction for each of K models.

    scale: of the weighted sum. along: [K] c_k, how far the merge goes along the model's own task
        vector; 1 is all the way. across: [K] |r_k|^2 / |tau_k|^2, how far it goes astray, squared.
    lost: [K] predicted share of the fine-tune's gain that is lost; above 1 the merge is expected to
        be worse than the base. All are None for a task vector of 0. mean: of `lost`.
    """

    models: tuple[str, ...]
    scale: float
    along: tuple[float | None, ...]
    across: tuple[float | None, ...]
    lost: tuple[float | None, ...]
    mean: float | None


def predict_interference(
    analysis: Analysis,
    scale: float,
    *,
    weights: Sequence[float] | None = None,
    across: float = ACROSS,
    group: Group | None = None,
) -> Interference:
    """Predict what each model loses in `base + scale * sum_k weights[k] * tau_k`.

    Args:
        analysis: of exactly the models that are merged.
        scale: lambda, any finite number; 1 / K averages.
        weights: [K] finite numbers (default: all 1).
        across: curvature across a task vector relative to that along it, at least 0 (default 0.1).
        group: of the analysis, such as a layer (default: the whole model).

    Returns:
        The prediction: shares of each model's own gain, so nothing has to be evaluated.

    Raises:
        RequestError: numbers that are not finite, a negative `across`, weights of another number.

    Example:
        >>> import torch, pymerge
        >>> base = {"w": torch.zeros(2)}
        >>> models = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]
        >>> found = predict_interference(pymerge.analyze(base, models), 0.5, across=0.1)
        >>> [round(share, 3) for share in found.lost]
        [0.275, 0.275]
    """
    group = analysis.whole if group is None else group
    count = len(analysis.models)
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise RequestError(
            f"predict_interference: weights: expected {count} numbers, got {len(weights)}"
        )
    if not all(math.isfinite(x) for x in (scale, across, *weights)) or across < 0:
        raise RequestError(
            "predict_interference: scale and weights: expected finite numbers, across: at least 0;"
            f" got {scale}, {weights}, {across}"
        )
    dot = [[x or 0.0 for x in row] for row in group.dot]
    steps = [scale * weight for weight in weights]
    length = math.fsum(steps[i] * steps[j] * dot[i][j] for i in range(count) for j in range(count))
    along: list[float | None] = []
    astray: list[float | None] = []
    for k in range(count):
        own = dot[k][k]
        if own <= 0.0:
            along.append(None)
            astray.append(None)
            continue
        c = math.fsum(steps[j] * dot[j][k] for j in range(count)) / own
        along.append(c)
        # |m|^2 = c^2 |tau|^2 + |r|^2; rounding may leave a tiny negative remainder
        astray.append(max(0.0, length / own - c * c))
    lost = [
        None if c is None or r is None else (1.0 - c) ** 2 + across * r
        for c, r in zip(along, astray, strict=True)
    ]
    known = [x for x in lost if x is not None]
    return Interference(
        analysis.labels,
        scale,
        tuple(along),
        tuple(astray),
        tuple(lost),
        math.fsum(known) / len(known) if known else None,
    )
