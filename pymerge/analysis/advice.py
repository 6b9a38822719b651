"""Rules of thumb from an analysis: where to begin a search.

These are heuristics. No published statistic predicts reliably how good a merge will be, and neither
do these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pymerge.analysis.records import Analysis
from pymerge.errors import RequestError

__all__ = ["Advice", "advise", "averaging_coefficient"]

DECISIVE = 0.05  # a difference of scores that leaves no doubt which model is better
KEPT_NORM = 0.6  # a trim at density 0.2 keeps 0.65 of the squared norm of normal numbers
_SPREAD = (0.5, 1.5)


@dataclass(frozen=True)
class Advice:
    """Where to begin.

    scale: lambda of task arithmetic with weights 1, and `scale_range` to search in; None if the
        task vectors cancel out or are zero. density: of TIES; None if no analysed one is suitable.
    averages: for each pair (i, j), alpha of alpha theta_i + (1 - alpha) theta_j; None if a task
        vector is zero; empty without scores. texts: the same in words.
    """

    scale: float | None
    scale_range: tuple[float, float] | None
    density: float | None
    averages: tuple[tuple[int, int, float | None], ...]
    texts: tuple[str, ...]


def averaging_coefficient(
    cosine: float, score_a: float, score_b: float, *, decisive: float = DECISIVE
) -> float:
    """Return a heuristic alpha for alpha theta_a + (1 - alpha) theta_b.

    alpha = 1/2 + p (1 - max(cosine, 0)) / 2,  p = clamp((score_a - score_b) / decisive, -1, 1)

    Task vectors that point the same way are averaged evenly, whichever model is better. The less
    they have in common, the more the weight moves to the better model; with cosine 0 and a decisive
    difference, all of it.

    Args:
        cosine: of the two task vectors, in [-1, 1].
        score_a, score_b: of the models on validation data, the larger the better, in the same unit.
        decisive: the difference of scores from which one model is simply better; above 0.

    Raises:
        RequestError: a cosine out of range, scores that are not finite, decisive not above 0.

    >>> averaging_coefficient(1.0, 0.9, 0.5)
    0.5
    >>> averaging_coefficient(0.2, 0.90, 0.88)
    0.66
    """
    problems = []
    if not -1.0 <= cosine <= 1.0:
        problems.append(f"averaging_coefficient: cosine: expected -1 to 1, got {cosine!r}")
    if not (math.isfinite(score_a) and math.isfinite(score_b)):
        problems.append(
            f"averaging_coefficient: scores: expected finite numbers, got {score_a!r}, {score_b!r}"
        )
    if not decisive > 0:
        problems.append(f"averaging_coefficient: decisive: expected above 0, got {decisive!r}")
    if problems:
        raise RequestError(problems)
    preference = max(-1.0, min(1.0, (score_a - score_b) / decisive))
    return round(0.5 + preference * (1.0 - max(cosine, 0.0)) / 2, 4)


def advise(
    analysis: Analysis, *, scores: Sequence[float] | None = None, decisive: float = DECISIVE
) -> Advice:
    """Return rules of thumb for coefficients and densities: heuristics, where to begin a search.

    Scale: the merged task vector is to be as long as those that went into it on average (root mean
    square), lambda = sqrt(mean ||tau_k||^2) / ||sum tau_k||: 1 / sqrt(K) for orthogonal ones (0.35
    for the eight tasks of Ilharco et al. 2023, who found 0.3 to 0.4), 1 / K for equal ones. Search
    from half of it to one and a half times it.

    Density: the lowest analysed one at which a trim keeps 60 % of the squared norm of every task
    vector; for normal numbers, 0.2 keeps 65 %.

    Averages of two: `averaging_coefficient`, from cosine and scores.

    Args:
        analysis: the result of `pymerge.analyze`.
        scores: of each model on validation data (not on the test data by which the merge will be
            judged), the larger the better; without them there is no advice on averages.
        decisive: see `averaging_coefficient`.

    Raises:
        RequestError: not one finite score for each model.

    >>> import torch, pymerge
    >>> base = torch.zeros(2)
    >>> found = pymerge.analyze(base, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
    >>> round(advise(found).scale, 3)
    0.707
    """
    count = len(analysis.models)
    if scores is not None and len(scores) != count:
        raise RequestError(f"scores: expected {count}, one for each model; got {len(scores)}")
    texts = []
    scale, span = _scale(analysis)
    if count > 1 and scale is not None and span is not None:
        texts.append(
            f"Task arithmetic: begin with lambda {scale:.2f}, search {span[0]:.2f} to "
            f"{span[1]:.2f}. With it the merged task vector is as long as those of the models."
        )
    elif count > 1:
        texts.append("Task arithmetic: the task vectors cancel out or are zero; no lambda fits.")
    density = _density(analysis)
    if density is not None:
        texts.append(
            f"TIES: begin with density {density:g}, the least analysed one that keeps "
            f"{KEPT_NORM:.0%} of the squared norm of every task vector; lambda about 1."
        )
    elif analysis.densities:
        texts.append(
            f"TIES: no analysed density keeps {KEPT_NORM:.0%} of the squared norm of every task "
            f"vector; trim less than {analysis.densities[-1]:g}."
        )
    averages = []
    for i in range(count if scores is not None else 0):
        for j in range(i + 1, count):
            assert scores is not None
            cosine = analysis.whole.cosine[i][j]
            alpha = None
            if cosine is not None:
                alpha = averaging_coefficient(cosine, scores[i], scores[j], decisive=decisive)
                a, b = analysis.labels[i], analysis.labels[j]
                texts.append(
                    f"Average of {a} and {b}: begin with {alpha:.2f} and {1 - alpha:.2f} (cosine "
                    f"{cosine:.3f}, scores {scores[i]:g} and {scores[j]:g})."
                )
            averages.append((i, j, alpha))
    return Advice(scale, span, density, tuple(averages), tuple(texts))


def _scale(analysis: Analysis) -> tuple[float | None, tuple[float, float] | None]:
    dots = [[value or 0.0 for value in row] for row in analysis.whole.dot]
    mean = math.fsum(dots[k][k] for k in range(len(dots))) / len(dots)
    total = math.fsum(value for row in dots for value in row)
    if mean <= 0 or total <= 1e-6 * mean:
        return None, None
    scale = math.sqrt(mean / total)
    return scale, (_SPREAD[0] * scale, _SPREAD[1] * scale)


def _density(analysis: Analysis) -> float | None:
    for trimmed in analysis.whole.trimmed:
        shares = [share for share in trimmed.kept_norm if share is not None]
        if shares and min(shares) >= KEPT_NORM:
            return trimmed.density
    return None
