"""Generators of the points to evaluate: grids, random points, CMA-ES.

A sampler yields batches of points and is sent their scores (None for a failure). Its points follow
from its arguments and the scores alone, in the order of the points. So an interrupted search
continues by asking again, and the points do not depend on how many are evaluated at a time.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Sequence

import numpy as np

from pymerge.errors import RequestError
from pymerge.search.space import Space

__all__ = ["SAMPLERS", "Batches", "cmaes_points", "grid_points", "random_points"]

SAMPLERS = ("grid", "random", "cmaes")
Point = dict[str, float]
Batches = Generator[list[Point], list["float | None"], None]

_BATCH = 64
_GRID_POINTS = 5
_MOST_POINTS = 100_000


def grid_points(space: Space) -> list[Point]:
    """Return all points of the grid, the last variable changing fastest.

    Raises:
        RequestError: more points than anybody would evaluate.
    """
    axes = [variable.domain.grid(_GRID_POINTS) for variable in space.variables]
    total = 1
    for axis in axes:
        total *= len(axis)
    if total > _MOST_POINTS:
        raise RequestError(
            f"parameters: the grid has {total} points ({' x '.join(str(len(a)) for a in axes)}), "
            f"more than {_MOST_POINTS}; give fewer points, or shared: true, or take random or cmaes"
        )
    names = space.names
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*axes)]


def grid(points: list[Point]) -> Batches:
    """Yield a grid."""
    yield points


def random_points(space: Space, seed: int) -> Batches:
    """Yield the initial point, then points drawn uniformly from the ranges, without end.

    Point n depends only on the seed and on n.
    """
    yield [space.initial]
    for first in itertools.count(1, _BATCH):
        batch = []
        for number in range(first, first + _BATCH):
            generator = np.random.default_rng([seed, number])
            batch.append(space.at(generator.random(len(space.variables)).tolist()))
        yield batch


def cmaes_points(
    space: Space, seed: int, sigma: float | None = None, population: int | None = None
) -> Batches:
    """Yield the initial point, then the generations of CMA-ES (Hansen 2016, arXiv:1604.00772).

    It works in the unit cube, from the initial point with step size `sigma` (default 0.2); points
    outside are drawn again. A failure counts as the worst so far. Once it has converged, it
    restarts from a random point with twice the population (IPOP, Auger and Hansen 2005).
    """
    import cmaes

    count = len(space.variables)
    if count < 2:
        raise RequestError("sampler: cmaes needs at least 2 variables, got 1; take grid or random")
    start = space.initial
    (first,) = yield [start]
    worst = first
    mean = np.clip(np.array(space.units(start)), 0.0, 1.0)
    bounds = np.array([[0.0, 1.0]] * count)
    size = population or 4 + int(3 * np.log(count))
    for restart in itertools.count():
        optimizer = cmaes.CMA(
            mean=mean,
            sigma=sigma or 0.2,
            bounds=bounds,
            seed=int(np.random.SeedSequence([seed, restart]).generate_state(1)[0]),
            population_size=size,
        )
        stopped = False
        while not stopped:
            units = [optimizer.ask() for _ in range(size)]
            scores = yield [space.at(unit.tolist()) for unit in units]
            known = [score for score in scores if score is not None]
            worst = min([*known, *([] if worst is None else [worst])], default=None)
            floor = 0.0 if worst is None else worst
            told = [-(floor if score is None else score) for score in scores]
            optimizer.tell(list(zip(units, told, strict=True)))
            stopped = _stops(optimizer)
        mean = np.random.default_rng([seed, restart]).random(count)
        size *= 2


def _stops(optimizer: object) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return bool(optimizer.should_stop())  # type: ignore[attr-defined]


def make_batches(
    sampler: str,
    space: Space,
    seed: int,
    sigma: float | None = None,
    population: int | None = None,
    points: Sequence[Point] = (),
) -> Batches:
    """Return the batches of a sampler; `points` are those of a grid."""
    if sampler == "grid":
        return grid(list(points))
    if sampler == "random":
        return random_points(space, seed)
    return cmaes_points(space, seed, sigma, population)
