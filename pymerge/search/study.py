"""Runs a search: asks for points, has them evaluated, and keeps every trial."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymerge.byte_sizes import parse_size
from pymerge.errors import RequestError
from pymerge.merging.files import merge_checkpoints
from pymerge.merging.report import MergeReport
from pymerge.plan import make_plan
from pymerge.search.config import SearchConfig, load_search
from pymerge.search.evaluate import Asked, Limits, Workers
from pymerge.search.journal import Journal, Trial
from pymerge.search.samplers import grid_points, make_batches
from pymerge.search.space import Space, make_space

__all__ = ["SearchResult", "run_search"]

_SAMPLED = 1 << 20  # bytes at both ends of a file of weights that identify it


@dataclass
class SearchResult:
    """The result of a search.

    trials: in their order. best: with the largest value (smallest, if that is sought), the first of
    equal ones; None if all failed. report: of the best and the first point on the data of the
    report. seconds: of searching, over all runs of the study. resumed: trials that already existed.
    """

    config: SearchConfig
    space: Space
    trials: list[Trial]
    best: Trial | None
    seconds: float
    resumed: int = 0
    finished: str = ""
    report: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    merged: MergeReport | None = None

    @property
    def seconds_merging(self) -> float:
        return math.fsum(trial.seconds_merging for trial in self.trials)

    @property
    def seconds_evaluating(self) -> float:
        return math.fsum(trial.seconds_evaluating for trial in self.trials)

    @property
    def failures(self) -> int:
        return sum(trial.state == "failed" for trial in self.trials)

    @property
    def first(self) -> Trial | None:
        """Return the initial point, trial 0, the baseline of the others; a grid has none."""
        return self.trials[0] if self.trials and self.config.sampler != "grid" else None

    def best_config(self) -> dict[str, Any]:
        """Return the merge configuration of the best trial."""
        if self.best is None:
            raise RequestError("search: no trial was evaluated without a failure")
        return self.space.config(self.best.values)


def better(config: SearchConfig, trial: Trial, than: Trial | None) -> bool:
    """Return whether a trial is better than another, or earlier and equally good."""
    if trial.value is None or than is None or than.value is None:
        return trial.value is not None
    sign = 1.0 if config.direction == "maximize" else -1.0
    return (sign * trial.value, -trial.number) > (sign * than.value, -than.number)


def run_search(
    config: str | os.PathLike[str] | Mapping[str, Any] | SearchConfig,
    out: str | os.PathLike[str],
    *,
    metric: str | Callable[..., Any] | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    workers: int | None = None,
    executor: str | None = None,
    memory: int | str = "8GiB",
    threads: int | None = None,
    backend: str | None = "auto",
    merge: bool = False,
    restart: bool = False,
    quiet: bool = True,
    plots: bool = True,
) -> SearchResult:
    """Search for the coefficients of a merge that are best according to a metric.

    Args:
        config: path of a YAML file (docs/search.md), or its content as a mapping.
        out: folder of the study. If it contains one of the same configuration, the search continues
            from there; a search that was killed loses the trials that were being evaluated.
        metric: a function (or class), or its name as `package.module:function`; default the
            config's. It gets the merged tensors by name (or a folder), and returns a number, or a
            mapping of numbers by name.
        evaluations, seconds, seed, workers, executor: override the config's.
        memory: limit for the merged models together, with what merging needs.
        threads: of the merging kernels; default one for each core.
        backend: "auto", "cpu" or "reference".
        merge: write the best model to `out`/merged.
        restart: discard the trials of an earlier run.
        quiet: show no progress.
        plots: draw the results (PNG with matplotlib, HTML with plotly).

    Returns:
        All trials, and the best. `out` gets study.jsonl, best.yml, trials.csv, trials.json,
        search.json, search.html and PNGs.

    Raises:
        RequestError: the request is invalid, or too many trials failed in a row.
        MergeError: a file cannot be written.

    >>> run_search("search.yml", "found", metric=lambda model: -float(model["w"].norm()))
    ... # doctest: +SKIP
    """
    from pymerge.search import results
    from pymerge.search.progress import Progress

    settings = (
        config
        if isinstance(config, SearchConfig)
        else load_search(
            config,
            metric,
            evaluations=evaluations,
            seconds=seconds,
            seed=seed,
            workers=workers,
            executor=executor,
        )
    )
    folder = Path(out)
    limits = Limits(parse_size(memory, "memory"), threads, backend)
    space, inputs, warnings = _look(settings, limits)
    points = grid_points(space) if settings.sampler == "grid" else []
    budget = settings.budget
    if points and budget.evaluations is not None and budget.evaluations < len(points):
        raise RequestError(
            f"budget: evaluations: the grid has {len(points)} points, got {budget.evaluations}; "
            "raise it, give fewer points, or take random"
        )
    if settings.sampler == "cmaes":
        _need_cmaes()
        if len(space.variables) < 2:
            raise RequestError(
                "sampler: cmaes needs at least 2 variables, got 1; take grid or random"
            )
    warnings += results.missing_packages() if plots else []
    made = None
    workers_ = Workers(settings, space, limits)
    try:
        journal = Journal(folder, {**settings.identity(), "inputs": inputs}, restart=restart)
        try:
            with Progress(settings, space, quiet=quiet) as progress:
                made = _Search(settings, space, journal, workers_, progress, points)
                finished = made.run()
            result = SearchResult(
                settings,
                space,
                made.ordered(),
                made.best,
                made.elapsed(),
                made.resumed,
                finished,
                None,
                [*warnings, *journal.warnings],
                inputs,
            )
            result.report = _report(result, workers_)
            results.write(result, folder, plots=plots)
        finally:
            journal.close()
    finally:
        workers_.close()
    if merge and result.best is not None:
        result.merged = merge_checkpoints(
            folder / results.BEST,
            folder / results.MERGED,
            threads=threads,
            backend=backend,
            force=True,
            quiet=quiet,
            search=results.provenance(result),
        )
    return result


def _look(settings: SearchConfig, limits: Limits) -> tuple[Space, list[dict[str, Any]], list[str]]:
    """Open the checkpoints, headers only; return the space, the inputs, and the warnings."""
    with make_plan(settings.merge, memory=limits.memory, threads=limits.threads) as plan:
        names = [name for name, tensor in plan.tensors.items() if tensor.compute is not None]
        inputs = [
            {
                "label": checkpoint.label,
                "files": [[path.name, size, _sampled(path)] for path, size in checkpoint.files],
            }
            for checkpoint in plan.inputs
        ]
        space = make_space(settings.merge.raw, settings.parameters, names)
        return space, inputs, list(plan.warnings)


def _sampled(path: Path) -> str:
    """Return a hash of the beginning and the end of a file, which identifies it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLED))
        file.seek(max(0, path.stat().st_size - _SAMPLED))
        digest.update(file.read(_SAMPLED))
    return digest.hexdigest()[:20]


def _need_cmaes() -> None:
    try:
        import cmaes as cmaes
    except ImportError:
        raise RequestError(
            "sampler: cmaes needs the package cmaes: pip install 'pymerge-kernels[search]'"
        ) from None


class _Search:
    """Goes through a sampler's batches; trials in the journal are not evaluated again."""

    def __init__(
        self,
        settings: SearchConfig,
        space: Space,
        journal: Journal,
        workers: Workers,
        progress: Any,
        points: list[dict[str, float]],
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._workers = workers
        self._progress = progress
        self._batches = make_batches(
            settings.sampler, space, settings.seed, settings.sigma, settings.population, points
        )
        self._before = max((trial.elapsed for trial in journal.trials.values()), default=0.0)
        self._started = time.perf_counter()
        self._failed_in_a_row = 0
        self._total = settings.budget.evaluations or (len(points) or None)
        self.best: Trial | None = None
        self.resumed = len(self.ordered())
        for trial in self.ordered():
            self._take(trial)

    def elapsed(self) -> float:
        return self._before + time.perf_counter() - self._started

    def ordered(self) -> list[Trial]:
        """Return the trials within the budget, which may be smaller than before."""
        most = self._settings.budget.evaluations
        found = (self._journal.trials[number] for number in sorted(self._journal.trials))
        return [trial for trial in found if most is None or trial.number < most]

    def _take(self, trial: Trial) -> None:
        if better(self._settings, trial, self.best):
            self.best = trial

    def _is_over(self) -> bool:
        limit = self._settings.budget.seconds
        return limit is not None and self.elapsed() >= limit

    def run(self) -> str:
        """Search until the budget is used up; return why it ended."""
        self._progress.begin(self._total, len(self.ordered()), self.best)
        number = 0
        scores: list[float | None] | None = None
        sign = 1.0 if self._settings.direction == "maximize" else -1.0
        while True:
            try:
                batch = next(self._batches) if scores is None else self._batches.send(scores)
            except StopIteration:
                return "the grid is done"
            asked = list(enumerate(batch, number))
            number += len(batch)
            most = self._settings.budget.evaluations
            within = asked if most is None else [one for one in asked if one[0] < most]
            self._evaluate(within)
            done = self._journal.trials
            if any(one[0] not in done for one in within):
                return "the seconds are used up"
            if len(within) < len(asked) or (most is not None and number >= most):
                return "the evaluations are used up"
            if self._is_over():
                return "the seconds are used up"
            values = [done[one[0]].value for one in asked]
            scores = [None if value is None else sign * value for value in values]

    def _evaluate(self, asked: list[Asked]) -> None:
        """Evaluate the points that the journal does not have."""
        todo = []
        for number, values in asked:
            known = self._journal.trials.get(number)
            if known is None:
                todo.append((number, values))
            elif not _same(known.values, values):
                raise RequestError(
                    f"out: trial {number} of the study has other values than the sampler gives "
                    "now (another version of numpy or cmaes?); begin anew with --restart"
                )

        def until_over() -> Iterator[Asked]:
            for one in todo:
                if self._is_over():
                    return
                yield one

        for trial in self._workers.run(until_over()):
            trial = replace(trial, elapsed=self.elapsed())
            self._journal.add(trial)
            self._take(trial)
            self._progress.trial(trial, self.best)
            self._count_failure(trial)

    def _count_failure(self, trial: Trial) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if trial.state == "failed" else 0
        if self._failed_in_a_row >= self._settings.max_failures:
            raise RequestError(
                f"search: {self._failed_in_a_row} trials failed in a row (max_failures), the last "
                f"one, trial {trial.number}, because: {trial.error}"
            )


def _same(known: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    """Return whether values are equal; those of another processor may differ in the last place."""
    return known.keys() == asked.keys() and all(
        math.isclose(known[name], value, rel_tol=1e-9, abs_tol=1e-12)
        for name, value in asked.items()
    )


def _report(result: SearchResult, workers: Workers) -> dict[str, Any] | None:
    """Evaluate the best and the first point once on the data of the report."""
    split = result.config.report_data
    if split is None or result.best is None:
        return None
    if not workers.takes_data():
        result.warnings.append(
            f"data.report: {result.config.metric_name} takes no argument 'data', so it was not "
            "evaluated there"
        )
        return None
    found: dict[str, Any] = {"data": split.to_dict()}
    for key, trial in (("best", result.best), ("first", result.first)):
        if trial is not None:
            own = workers.evaluate_on((trial.number, trial.values), split)
            found[key] = {"trial": own.number, "value": own.value, "named": own.named}
            if own.error is not None:
                found[key]["error"] = own.error
    return found
