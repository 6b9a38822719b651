"""Evaluates trials: merges, calls the metric, and records the result; one or several at a time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pymerge.config import load_config
from pymerge.errors import MergeError, RequestError
from pymerge.merging.files import merge_checkpoints
from pymerge.search.config import SearchConfig
from pymerge.search.data import Split
from pymerge.search.journal import Trial
from pymerge.search.metric import Metric, MetricFailure, load_metric
from pymerge.search.remerge import Merged, Remerger
from pymerge.search.space import Space

__all__ = ["Evaluator", "Limits", "Workers"]

Asked = tuple[int, dict[str, float]]


@dataclass(frozen=True)
class Limits:
    """Resources of a merge: memory of all workers together, threads of the kernels, a backend."""

    memory: int = 8 << 30
    threads: int | None = None
    backend: str | None = "auto"
    scratch: str | None = None


class Evaluator:
    """Merges and calls the metric; except for `remerger`, only one thread at a time may use it.

    Args:
        config: the search.
        space: the meaning of the values.
        limits: of a merge.
        remerger: shared with others, if the metric receives tensors.
    """

    def __init__(
        self, config: SearchConfig, space: Space, limits: Limits, remerger: Remerger | None
    ) -> None:
        self._config = config
        self._space = space
        self._limits = limits
        self._remerger = remerger
        self._merged: Merged | None = None
        function = load_metric(config.metric) if isinstance(config.metric, str) else config.metric
        self.metric = Metric(function, config.arguments, config.optimise)

    def evaluate(self, asked: Asked, data: Split | None = None) -> Trial:
        """Return the result for a point, on the search's data unless other data is given."""
        number, values = asked
        split = data or self._config.search_data
        before = time.perf_counter()
        merging = evaluating = 0.0
        folder: Path | None = None
        model: Any = None
        try:
            self.metric.prepare()
            before = time.perf_counter()
            try:
                if self._remerger is not None:
                    model = self._merge_tensors(values)
                else:
                    folder = Path(tempfile.mkdtemp(prefix="pymerge-", dir=self._limits.scratch))
                    model = self._merge_folder(values, folder / "model")
            except (RequestError, MergeError) as error:
                return _failed(number, values, f"merge: {error}", time.perf_counter() - before, 0.0)
            merging = time.perf_counter() - before
            before = time.perf_counter()
            try:
                value, named = self.metric(model, split)
                evaluating = time.perf_counter() - before
                self._check_untouched()
            except MetricFailure as error:
                evaluating = time.perf_counter() - before
                if self._merged is not None and self._merged.was_written() is not None:
                    self._merged.forget()
                return _failed(number, values, f"metric: {error}", merging, evaluating)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        return Trial(number, values, "complete", value, named, None, merging, evaluating)

    def _merge_tensors(self, values: dict[str, float]) -> Any:
        assert self._remerger is not None
        if self._merged is None:
            self._merged = self._remerger.memory_for()
        self._remerger.merge(self._space.config(values), self._merged)
        # A new mapping, so that the metric may change it.
        return dict(self._merged.tensors)

    def _merge_folder(self, values: dict[str, float], out: Path) -> Path:
        merge_checkpoints(
            self._space.config(values),
            out,
            memory=self._limits.memory // self._config.workers,
            threads=self._limits.threads,
            backend=self._limits.backend,
        )
        return out

    def _check_untouched(self) -> None:
        written = self._merged.was_written() if self._merged is not None else None
        if written is not None:
            raise MetricFailure(
                f"wrote to the merged tensor {written!r}, which the next merge uses again; work on "
                "a copy (tensor.clone())"
            )


def _failed(
    number: int, values: dict[str, float], error: str, merging: float, evaluating: float
) -> Trial:
    return Trial(number, values, "failed", None, {}, error, merging, evaluating)


class Workers:
    """Evaluates points in one worker, in threads, or in processes.

    Threads share opened files and everything known about them; each has a merged model and an
    object of the metric's class. Processes share nothing except the page cache.
    """

    def __init__(self, config: SearchConfig, space: Space, limits: Limits) -> None:
        self._config, self._space, self._limits = config, space, limits
        self._local = threading.local()
        self._guard = threading.Lock()
        self._spare: list[Evaluator] = []
        self._pool: ThreadPoolExecutor | ProcessPoolExecutor | None = None
        self._remerger: Remerger | None = None
        self.processes = config.workers > 1 and config.executor == "processes"
        if self.processes:
            if not isinstance(config.metric, str):
                raise RequestError(
                    "metric: processes import it by its name: expected package.module:function, "
                    f"got {config.metric_name}"
                )
            load_metric(config.metric)
        elif config.receives == "tensors":
            self._remerger = Remerger(
                config.merge,
                memory=limits.memory,
                threads=limits.threads,
                backend=limits.backend,
                copies=config.workers,
            )
        try:
            # Here, so that a metric that cannot be created stops the search before it begins.
            self.first = None if self.processes else self._own()
            if self.first is not None:
                self.first.metric.prepare()
                self._spare.append(self.first)
        except BaseException:
            self.close()
            raise

    def _own(self) -> Evaluator:
        found = getattr(self._local, "evaluator", None)
        if found is None:
            # The main thread's evaluator also serves one thread: they do not work simultaneously.
            with self._guard:
                found = self._spare.pop() if self._spare else None
            if found is None:
                found = Evaluator(self._config, self._space, self._limits, self._remerger)
            self._local.evaluator = found
        return found

    def run(self, asked: Iterable[Asked]) -> Iterator[Trial]:
        """Yield trials as they are completed."""
        count = self._config.workers
        if count == 1:
            for one in asked:
                yield self._own().evaluate(one)
            return
        points = iter(asked)
        waiting: set[Future[Trial]] = set()
        pool = self._opened()
        try:
            while True:
                while len(waiting) < count and (one := next(points, None)) is not None:
                    waiting.add(self._submit(pool, one))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, pool: ThreadPoolExecutor | ProcessPoolExecutor, one: Asked) -> Future[Trial]:
        if self.processes:
            return pool.submit(_evaluate_here, one)
        return pool.submit(lambda: self._own().evaluate(one))

    def _opened(self) -> ThreadPoolExecutor | ProcessPoolExecutor:
        count = self._config.workers
        if self._pool is None and not self.processes:
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="pymerge-search")
        elif self._pool is None:
            tensors = self._config.receives == "tensors"  # a folder's merge divides memory itself
            share = Limits(
                self._limits.memory // (count if tensors else 1),
                self._limits.threads or max(1, (os.cpu_count() or 1) // count),
                self._limits.backend,
                self._limits.scratch,
            )
            self._pool = ProcessPoolExecutor(
                count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_here,
                initargs=(
                    replace(self._config, merge=None),  # type: ignore[arg-type]
                    self._config.merge.raw,
                    replace(self._space, base=None),  # type: ignore[arg-type]
                    share,
                ),
            )
        assert self._pool is not None
        return self._pool

    def evaluate_on(self, asked: Asked, data: Split) -> Trial:
        """Return the trial of one point on another part of the data."""
        if self.processes:
            return self._opened().submit(_evaluate_here, asked, data).result()
        return self._own().evaluate(asked, data)

    def takes_data(self) -> bool:
        """Return whether the metric accepts a `data` argument."""
        if self.first is not None:
            return self.first.metric.takes_data
        assert isinstance(self._config.metric, str)
        return Metric(load_metric(self._config.metric)).takes_data

    def close(self) -> None:
        """Stop the workers and release the files."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._remerger is not None:
            self._remerger.close()


_here: Evaluator | None = None


def _begin_here(config: SearchConfig, raw: dict[str, Any], space: Space, limits: Limits) -> None:
    global _here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    merge = load_config(raw)  # records of methods are compared by identity, and are not pickled
    config, space = replace(config, merge=merge), replace(space, base=merge)
    remerger = None
    if config.receives == "tensors":
        remerger = Remerger(
            config.merge,
            memory=limits.memory,
            threads=limits.threads,
            backend=limits.backend,
        )
    _here = Evaluator(config, space, limits, remerger)


def _end_with_parent() -> None:
    """End this process when its parent is gone, even if it was killed: nobody waits for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _evaluate_here(asked: Asked, data: Split | None = None) -> Trial:
    assert _here is not None
    return _here.evaluate(asked, data)
