"""The search space: variables, their ranges, and the merge configuration that values produce."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pymerge.config import MergeConfig, load_config
from pymerge.errors import RequestError, nearest
from pymerge.methods import Parameter
from pymerge.search.groups import filters_of, group_tensors

__all__ = ["Domain", "Space", "Variable", "make_space"]

_PATH = re.compile(r"(?:models\[(\*|[0-9]+)\]\.)?parameters\.(\w+)")


@dataclass(frozen=True)
class Domain:
    """The values of a variable.

    low, high: bounds, both included. log: evenly spread logarithms. integer: whole numbers.
    values: the only ones, in order, instead of bounds. points: of a grid between the bounds.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    values: tuple[float, ...] = ()
    points: int | None = None

    def at(self, unit: float) -> float:
        """Return the value at a position in [0, 1]."""
        unit = min(max(float(unit), 0.0), 1.0)
        if self.values:
            return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]
        if self.integer:
            # each whole number has an equally long stretch
            return float(min(math.floor(self.low + unit * (self.high - self.low + 1)), self.high))
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            value = math.exp(low + unit * (high - low))
        else:
            value = self.low + unit * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def unit(self, value: float) -> float:
        """Return a position in [0, 1] whose value equals this one, or is nearest to it."""
        if self.values:
            places = range(len(self.values))
            place = min(places, key=lambda n: abs(self.values[n] - value))
            return (place + 0.5) / len(self.values)
        if self.high == self.low:
            return 0.5
        if self.integer:
            return (value - self.low + 0.5) / (self.high - self.low + 1)
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(value) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def grid(self, default_points: int) -> list[float]:
        """Return the values of a grid."""
        if self.values:
            return list(self.values)
        if self.integer:
            count = int(self.high - self.low) + 1
            if self.points is None or self.points >= count:
                return [self.low + n for n in range(count)]
        count = self.points or default_points
        if count == 1:
            return [self.at(0.5)]
        found = [self.at(n / (count - 1)) for n in range(count)]
        return list(dict.fromkeys(found))

    def holds(self, value: float) -> bool:
        """Return whether a value is in the domain."""
        if self.values:
            return value in self.values
        whole = not self.integer or float(value).is_integer()
        return self.low <= value <= self.high and whole


@dataclass(frozen=True)
class Variable:
    """One number to search for: its place in the config, and its range."""

    name: str
    parameter: str
    models: tuple[int, ...] | None
    group: str | None
    domain: Domain
    initial: float


@dataclass
class Space:
    """All variables, and the configuration into which they are inserted.

    `groups` has, for each parameter with groups, the filters by their group.
    """

    raw: dict[str, Any]
    base: MergeConfig
    variables: list[Variable] = field(default_factory=list)
    filters: dict[tuple[tuple[int, ...] | None, str], list[tuple[str, str]]] = field(
        default_factory=dict
    )

    @property
    def names(self) -> list[str]:
        return [variable.name for variable in self.variables]

    @property
    def initial(self) -> dict[str, float]:
        """Return the initial values."""
        return {variable.name: variable.initial for variable in self.variables}

    def at(self, units: Sequence[float]) -> dict[str, float]:
        """Return the values at a position in the unit cube."""
        return {v.name: v.domain.at(u) for v, u in zip(self.variables, units, strict=True)}

    def units(self, values: Mapping[str, float]) -> list[float]:
        """Return a position of these values in the unit cube."""
        return [v.domain.unit(values[v.name]) for v in self.variables]

    def config(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Return the merge configuration with these values."""
        raw = copy.deepcopy(self.raw)
        grouped: dict[tuple[tuple[int, ...] | None, str], dict[str, float]] = {}
        for variable in self.variables:
            value = self._written(variable.parameter, values[variable.name])
            if variable.group is None:
                for section in _sections(raw, variable.models):
                    self._set(section, variable.parameter, value)
            else:
                key = variable.models, variable.parameter
                grouped.setdefault(key, {})[variable.group] = value
        for (models, parameter), by_group in grouped.items():
            filters = self.filters[models, parameter]
            clauses = [{"filter": text, "value": by_group[group]} for text, group in filters]
            for section in _sections(raw, models):
                self._set(section, parameter, clauses + self._others(section, parameter))
        return raw

    def _written(self, parameter: str, value: float) -> float | int:
        spec = self.base.method.parameter(parameter)
        return int(value) if spec is not None and spec.kind == "int" else float(value)

    def _spellings(self, parameter: str) -> tuple[str, ...]:
        spec = self.base.method.parameter(parameter)
        assert spec is not None
        return tuple({*spec.yaml_names, spec.name})

    def _set(self, section: dict[str, Any], parameter: str, value: Any) -> None:
        for name in self._spellings(parameter):
            section.pop(name, None)
        section[parameter] = value

    def _others(self, section: Mapping[str, Any], parameter: str) -> list[dict[str, Any]]:
        """Return the configuration's settings for tensors in no group."""
        for name in self._spellings(parameter):
            if name in section:
                value = section[name]
                if isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
                    return list(value)  # filters; else values over the layers
                return [dict(value) if isinstance(value, Mapping) else {"value": value}]
        return []


def _sections(raw: dict[str, Any], models: tuple[int, ...] | None) -> list[dict[str, Any]]:
    holders = [raw] if models is None else [raw["models"][index] for index in models]
    for holder in holders:
        holder["parameters"] = holder.get("parameters") or {}
    return [holder["parameters"] for holder in holders]


def make_space(
    merge: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
    tensors: Sequence[str],
    where: str = "parameters",
) -> Space:
    """Return the search space of a merge configuration and its searched parameters.

    Args:
        merge: a merge configuration.
        parameters: by path (`models[0].parameters.weight`, `models[*].parameters.weight`,
            `parameters.lambda`), a mapping of `low`, `high`, `scale`, `values`, `points`,
            `initial`, `groups`, `shared`.
        tensors: names of the merged tensors.

    Raises:
        RequestError: listing all problems.
    """
    space = Space(copy.deepcopy(dict(merge)), load_config(merge))
    problems: list[str] = []
    if not parameters:
        problems.append(f"{where}: expected at least one parameter to search, got none")
    for path, settings in parameters.items():
        problems += _try(space, path, settings, tensors, f"{where}: {path}")
    names = space.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{where}: {name} is searched twice; remove one" for name in doubled]
    if not problems:
        try:
            load_config(space.config(space.initial))
        except RequestError as error:
            problems += [f"{where}: the initial values: {text}" for text in error.problems]
    if problems:
        raise RequestError(problems)
    return space


def _try(
    space: Space, path: str, settings: Mapping[str, Any], tensors: Sequence[str], where: str
) -> list[str]:
    try:
        _add(space, path, settings, tensors, where)
    except RequestError as error:
        return error.problems
    return []


def _add(
    space: Space, path: str, settings: Mapping[str, Any], tensors: Sequence[str], where: str
) -> None:
    method = space.base.method
    found = _PATH.fullmatch(path)
    if found is None:
        raise RequestError(
            f"{where}: unknown path; expected models[0].parameters.NAME, "
            "models[*].parameters.NAME or parameters.NAME"
        )
    index, name = found[1], found[2]
    parameter = method.parameter(name)
    if parameter is None or parameter.no_effect or parameter.only is not None:
        numeric = [p.yaml_names[0] for p in method.parameters if _is_number(p)]
        raise RequestError(
            f"{where}: {method.name} has no parameter {name!r}{nearest(name, numeric)} (numbers "
            f"that can be searched: {', '.join(numeric) or 'none'})"
        )
    if not _is_number(parameter):
        raise RequestError(f"{where}: is no number: {parameter.expected}")
    if index is not None and parameter.scope == "method":
        raise RequestError(
            f"{where}: {name!r} is one value for the whole merge; search parameters.{name}"
        )
    models = _models(space, index, where)
    if models is None and parameter.scope == "model":
        _check_effect(space, parameter, where)
    domain = _domain(settings, parameter, where)
    groups = settings.get("groups")
    if groups is not None and not parameter.per_tensor:
        raise RequestError(f"{where}: groups: {name!r} is one value for all tensors")
    shared = bool(settings.get("shared", False))
    if shared and index != "*":
        raise RequestError(f"{where}: shared: is for models[*] only")
    labels: list[str | None] = [None]
    members = {}
    if groups is not None:
        members = group_tensors(groups, tensors, where)
        labels = list(members)
    each = [models] if models is None or shared else [(one,) for one in models]
    for own in each:
        if members:
            space.filters[own, name] = filters_of(members, tensors, where)
        for label in labels:
            initial = _initial(space, settings, parameter, own, domain, where)
            shown = path if own is None or shared else f"models[{own[0]}].parameters.{name}"
            shown += f" [{label}]" if label is not None else ""
            space.variables.append(Variable(shown, name, own, label, domain, initial))


def _is_number(parameter: Parameter) -> bool:
    numeric = parameter.kind in ("float", "int")
    return numeric and not parameter.no_effect and parameter.only is None


def _models(space: Space, index: str | None, where: str) -> tuple[int, ...] | None:
    """Return positions in the file's list of models, without a base that is listed there."""
    if index is None:
        return None
    taken = [entry.name for entry in space.base.models]
    places = [n for n in range(len(space.raw["models"])) if f"models[{n}]" in taken]
    if index == "*":
        return tuple(places)
    if int(index) not in places:
        known = ", ".join(f"models[{place}]" for place in places)
        raise RequestError(f"{where}: no such model is merged (there are: {known})")
    return (int(index),)


def _check_effect(space: Space, parameter: Parameter, where: str) -> None:
    if all(parameter.name in entry.parameters for entry in space.base.models):
        raise RequestError(
            f"{where}: has no effect: every model has its own {parameter.yaml_names[0]!r}; search "
            f"models[*].parameters.{parameter.yaml_names[0]}"
        )


def _domain(settings: Mapping[str, Any], parameter: Parameter, where: str) -> Domain:
    values, low, high = settings.get("values"), settings.get("low"), settings.get("high")
    log = settings.get("scale", "linear") == "log"
    points = settings.get("points")
    if points is not None and points < 1:
        raise RequestError(f"{where}: points: expected at least 1, got {points}")
    if values is not None:
        if low is not None or high is not None:
            raise RequestError(f"{where}: expected values, or low and high; got both")
        if not values:
            raise RequestError(f"{where}: values: expected at least one number, got an empty list")
        checked = [float(parameter.check(v, f"{where}: values")) for v in values]
        if len(set(checked)) < len(checked):
            raise RequestError(f"{where}: values: expected different numbers, got {values}")
        return Domain(min(checked), max(checked), values=tuple(sorted(checked)))
    if low is None or high is None:
        lacking = "low" if low is None else "high"
        raise RequestError(f"{where}: {lacking}: is missing; give low and high, or values")
    low = float(parameter.check(low, f"{where}: low"))
    high = float(parameter.check(high, f"{where}: high"))
    if low >= high:
        raise RequestError(f"{where}: low and high: expected low < high, got {low:g} and {high:g}")
    if log and low <= 0:
        raise RequestError(f"{where}: low: a logarithmic scale needs more than 0, got {low:g}")
    integer = parameter.kind == "int"
    if log and integer:
        raise RequestError(f"{where}: scale: log is for numbers that are not whole; give values")
    return Domain(low, high, log=log, integer=integer, points=points)


def _initial(
    space: Space,
    settings: Mapping[str, Any],
    parameter: Parameter,
    models: tuple[int, ...] | None,
    domain: Domain,
    where: str,
) -> float:
    given = settings.get("initial")
    if given is not None:
        if not domain.holds(given):
            what = f"one of {domain.values}" if domain.values else f"[{domain.low}, {domain.high}]"
            raise RequestError(f"{where}: initial: expected {what}, got {given}")
        return float(given)
    current = space.base.value(parameter.name)
    if models is not None:
        entry = next(e for e in space.base.models if e.name == f"models[{models[0]}]")
        setting = entry.parameters.get(parameter.name)
        own = None if setting is None else setting.value_for("")
        current = current if own is None else own
    implied = space.base.method.implied
    if current is None and implied is not None:
        current = implied(parameter.name, space.base.value)
    if not isinstance(current, (int, float)) or not domain.holds(current):
        return domain.at(0.5)
    return float(current)
