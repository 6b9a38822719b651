"""The function that a search optimises: found by name, called, and its result checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.entry import load_function as load_metric
from pymerge.errors import RequestError

if TYPE_CHECKING:
    from pymerge.search.data import Split

__all__ = ["Metric", "MetricFailure", "check_answer", "load_metric"]


class MetricFailure(Exception):
    """A metric raised, or its result is not a finite number."""


class Metric:
    """A metric, called in the way the search needs.

    A class is instantiated once, with `arguments`, and its object is called with the model. A
    function is called with the model and `arguments`. Either also gets `data=Split` if it accepts
    an argument of that name.

    Args:
        function: the function or class.
        arguments: keyword arguments.
        optimise: the name of the value to optimise, if there are several.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        optimise: str | None = None,
    ) -> None:
        self._function = function
        self._arguments = dict(arguments or {})
        self._optimise = optimise
        self._call: Callable[..., Any] | None = None
        called = function.__call__ if inspect.isclass(function) else function
        self.takes_data = _takes(called, "data")

    def prepare(self) -> None:
        """Create the object of a class.

        Raises:
            RequestError: its constructor raised.
        """
        if self._call is not None:
            return
        function: Any = self._function
        if not inspect.isclass(function):
            self._call = function
            return
        try:
            made: Any = function(**self._arguments)
        except (Exception, SystemExit) as error:
            raise RequestError(
                f"metric: {function.__name__}(...) raised {type(error).__name__}: {error}"
            ) from error
        self._call = made
        self._arguments = {}

    def __call__(
        self, model: Mapping[str, Any] | Path, data: Split | None
    ) -> tuple[float, dict[str, float]]:
        """Return the value to optimise, and all values by name.

        Raises:
            MetricFailure: it raised, or its result is not a finite number.
        """
        self.prepare()
        assert self._call is not None
        extra: dict[str, Any] = {"data": data} if self.takes_data else {}
        try:
            answer = self._call(model, **self._arguments, **extra)
        except (Exception, SystemExit) as error:
            raise MetricFailure(f"raised {type(error).__name__}: {error}") from error
        return check_answer(answer, self._optimise)


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or any_name


def check_answer(answer: Any, optimise: str | None) -> tuple[float, dict[str, float]]:
    """Return the value to optimise, and all values by name, from the result of a metric.

    Raises:
        MetricFailure: the value to optimise is missing, or is not a finite number.
    """
    if not isinstance(answer, Mapping):
        if optimise is not None:
            raise MetricFailure(
                f"returned {type(answer).__name__}, no mapping that has {optimise!r}"
            )
        return _number(answer, "returned"), {}
    if not answer:
        raise MetricFailure("returned an empty mapping")
    chosen = next(iter(answer)) if optimise is None else optimise
    if chosen not in answer:
        raise MetricFailure(
            f"returned no {chosen!r} (optimise); it has {', '.join(map(str, answer))}"
        )
    named = {}
    for name, value in answer.items():
        if name == chosen:
            named[str(name)] = _number(value, f"returned for {name!r}")
        else:
            named[str(name)] = _number_or_nan(value)
    return named[str(chosen)], named


def _number_or_nan(value: Any) -> float:
    """Return a value that is not optimised, which may be anything, as a number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise MetricFailure(f"{what} {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise MetricFailure(f"{what} {number}")
    return number
