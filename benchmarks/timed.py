"""Additions to pytest-benchmark: turns with another function, and no figure without a check."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["Timed", "Turns"]


@dataclass(frozen=True)
class Turns:
    """Seconds of a function and of the one that took turns with it, round by round."""

    seconds: tuple[float, ...]
    beside: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Return how many times as fast as the other function it is: the median of the rounds.

        Each call is compared with the other's just before it, so the ratio is unaffected by
        anything that slows both for a while.
        """
        pairs = zip(self.beside, self.seconds, strict=True)
        return statistics.median(beside / own for beside, own in pairs)


@dataclass(frozen=True)
class Timed:
    """Times functions with pytest-benchmark, and discards the time of one whose result is wrong.

    seconds: stop after this many, but neither before `least` rounds nor after `most`.
    """

    benchmark: BenchmarkFixture
    seconds: float
    least: int
    most: int = 25

    def __call__(
        self,
        function: Callable[[], object],
        *,
        check: Callable[[], None],
        beside: Callable[[], object] | None = None,
        prepare: Callable[[], object] | None = None,
        rounds: int | None = None,
    ) -> Turns | None:
        """Time a function in turns with another (A B A B ...), then check its last result.

        Args:
            function: the benchmarked function.
            check: raises if the result is wrong.
            beside: called and timed before each call of `function`.
            prepare: called before each call of `function`, not timed.
            rounds: None takes as many as fit.

        Returns:
            The seconds of both; None if timing is off (--benchmark-disable).
        """
        others: list[float] = []

        def setup() -> None:
            if beside is not None:
                started = time.perf_counter()
                beside()
                others.append(time.perf_counter() - started)
            if prepare is not None:
                prepare()

        try:
            if self.benchmark.enabled:
                setup()
                function()
                rounds = rounds or self._rounds(setup, function)
                others.clear()
            self.benchmark.pedantic(function, setup=setup, rounds=rounds or 1)
            check()
        except BaseException:  # an interrupted benchmark has not been checked either
            self._forget()
            raise
        if self.benchmark.stats is None:
            return None
        seconds = tuple(self.benchmark.stats["data"])
        return Turns(seconds, tuple(others[: len(seconds)]))

    def _rounds(self, setup: Callable[[], object], function: Callable[[], object]) -> int:
        """Return how many rounds fit, by the time that one takes."""
        started = time.perf_counter()
        setup()
        function()
        once = time.perf_counter() - started
        return max(self.least, min(self.most, math.ceil(self.seconds / once)))

    def _forget(self) -> None:
        """Remove the line from pytest-benchmark's table and the entry from its JSON."""
        self.benchmark.has_error = True
        if self.benchmark.stats is not None:
            self.benchmark.stats.stats.data.clear()
