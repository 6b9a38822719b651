"""Values of parameters in a config: one scalar, or different values by `filter` and by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pymerge.config.yaml_lines import YamlPath
from pymerge.errors import RequestError, nearest
from pymerge.methods import MethodSpec, Parameter

__all__ = ["Clause", "Gradient", "Setting", "layer_depths", "read_settings"]

Scope = Literal["method", "model"]
_LAYER = re.compile(r"((?:[^.]*[^.0-9][^.]*\.)*)([0-9]+)\.")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*\Z", re.ASCII)


@dataclass(frozen=True)
class Gradient:
    """Values from the first layer to the last: numbers are interpolated, others jump."""

    values: tuple[Any, ...]
    numeric: bool

    def at(self, depth: float) -> Any:
        """Return the value at a depth: 0 for the first layer, 1 for the last."""
        last = len(self.values) - 1
        if not self.numeric:
            return self.values[int(depth * last)]
        # The same operations as in mergekit, so that numbers agree to the last bit.
        low = int(depth * last)
        share = depth * last - low
        return (1 - share) * self.values[low] + share * self.values[min(last, low + 1)]


@dataclass(frozen=True)
class Clause:
    """A value, and the substring of the tensor names that it applies to (None: all)."""

    filter: str | None
    value: Any
    where: str

    def matches(self, tensor: str) -> bool:
        return self.filter is None or self.filter in tensor


@dataclass(frozen=True)
class Setting:
    """The clauses that a config has for one parameter, in order of precedence."""

    clauses: tuple[Clause, ...]
    where: str

    @property
    def by_tensor(self) -> bool:
        """Whether different tensors may have different values."""
        return any(
            clause.filter is not None or isinstance(clause.value, Gradient)
            for clause in self.clauses
        )

    def value_for(self, tensor: str, depth: float = 0.0) -> Any:
        """Return the value of the first clause that matches, or None if none does.

        depth: of the tensor's layer, as `layer_depths` has it.
        """
        for clause in self.clauses:
            if clause.matches(tensor):
                value = clause.value
                return value.at(depth) if isinstance(value, Gradient) else value
        return None


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """Return the relative depth of each tensor's layer: 0 for the first of its stack, 1 for the
    last.

    The first number in a name is its layer, and the text before it the stack. Tensors outside of
    layers (embeddings, the last norm, the head) are at 0, and the layer of a stack of one is at 1,
    as in mergekit.
    """
    layers: dict[str, tuple[str, int]] = {}
    deepest: dict[str, int] = {}
    for name in names:
        found = _LAYER.match(name)
        if found is None:
            continue
        layers[name] = (found[1], int(found[2]))
        deepest[found[1]] = max(deepest.get(found[1], 0), int(found[2]))
    return {
        name: number / deepest[stack] if deepest[stack] > 0 else 1.0
        for name, (stack, number) in layers.items()
    }


def read_settings(
    data: Mapping[str, Any],
    path: YamlPath,
    spec: MethodSpec,
    scope: Scope,
    where: Callable[[YamlPath], str],
) -> tuple[dict[str, Setting], list[str], list[str]]:
    """Check a `parameters` section.

    Args:
        data: the section.
        path: its position in the document.
        spec: the method, which defines its parameters.
        scope: "model" for the section of one model, "method" for the global one.
        where: returns `file:line: key` for a path.

    Returns:
        settings by `Parameter.name`, problems, warnings.
    """
    settings: dict[str, Setting] = {}
    given: dict[str, YamlPath] = {}
    problems: list[str] = []
    warnings: list[str] = []
    for key, value in data.items():
        at = (*path, key)
        parameter = spec.parameter(key) if isinstance(key, str) else None
        if parameter is None:
            known = ", ".join(spec.spellings)
            problems.append(
                f"{where(at)}: {spec.name} has no parameter "
                f"{key!r}{nearest(str(key), spec.spellings)} (known: {known})"
            )
            continue
        if parameter.name in given:
            problems.append(
                f"{where(at)}: is the same parameter as {where(given[parameter.name])}; give one "
                "of the two"
            )
            continue
        given[parameter.name] = at
        if scope == "model" and parameter.scope == "method" and not parameter.no_effect:
            problems.append(
                f"{where(at)}: {key!r} is one value for the whole merge; move it to the top-level "
                "'parameters'"
            )
            continue
        setting, bad, odd = _read_setting(value, at, parameter, where)
        problems.extend(bad)
        warnings.extend(odd)
        if setting is not None and parameter.no_effect:
            warnings.append(f"{where(at)}: has no effect in {spec.name}: {parameter.doc}")
        elif setting is not None:
            settings[parameter.name] = setting
    return settings, problems, warnings


def _read_setting(
    value: Any, path: YamlPath, parameter: Parameter, where: Callable[[YamlPath], str]
) -> tuple[Setting | None, list[str], list[str]]:
    problems: list[str] = []
    warnings: list[str] = []
    if isinstance(value, Mapping):
        items, paths = [value], [path]
    elif isinstance(value, list):
        items, paths = value, [(*path, index) for index in range(len(value))]
        if not items:
            return None, [f"{where(path)}: expected {parameter.expected}, got an empty list"], []
        if not all(isinstance(item, Mapping) for item in items):
            if any(isinstance(item, Mapping) for item in items):
                problem = (
                    "expected a list of {filter: ..., value: ...} only, got other items among them"
                )
                return None, [f"{where(path)}: {problem}"], []
            clause = _read_clause(None, value, path, parameter, where, problems)
            if clause is not None and not parameter.per_tensor:
                problems.append(
                    f"{where(path)}: expected one value for all tensors ({parameter.expected}), "
                    "got a list of values over the layers"
                )
            return (
                (None if problems or clause is None else Setting((clause,), where(path))),
                (problems),
                [],
            )
    else:
        clause = _read_clause(None, value, path, parameter, where, problems)
        return (Setting((clause,), where(path)) if clause else None), problems, []

    clauses: list[Clause] = []
    for item, at in zip(items, paths, strict=True):
        if clauses and clauses[-1].filter is None:
            warnings.append(
                f"{where(at)}: is never used, because the entry before it matches every tensor"
            )
        clause = _read_conditional(item, at, parameter, where, problems)
        if clause is not None:
            clauses.append(clause)
    setting = Setting(tuple(clauses), where(path))
    if not problems and setting.by_tensor and not parameter.per_tensor:
        problems.append(
            f"{where(path)}: expected one value for all tensors ({parameter.expected}), got a "
            "filter list"
        )
    return (None if problems else setting), problems, warnings


def _read_conditional(
    item: Mapping[str, Any],
    path: YamlPath,
    parameter: Parameter,
    where: Callable[[YamlPath], str],
    problems: list[str],
) -> Clause | None:
    found = len(problems)
    for key in item:
        if key not in ("filter", "value"):
            problems.append(
                f"{where((*path, key))}: unknown key "
                f"{key!r}{nearest(str(key), ('filter', 'value'))} (known: filter, value)"
            )
    pattern = item.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        problems.append(
            f"{where((*path, 'filter'))}: expected part of a tensor name, got {pattern!r}"
        )
    if "value" not in item:
        problems.append(f"{where(path)}: 'value' is missing; expected {parameter.expected}")
    if len(problems) > found:
        return None
    value = item["value"]
    # "" is a substring of every name
    everything = pattern is None or pattern in ("*", "")
    return _read_clause(
        None if everything else pattern, value, (*path, "value"), parameter, where, problems
    )


def _read_clause(
    pattern: str | None,
    value: Any,
    path: YamlPath,
    parameter: Parameter,
    where: Callable[[YamlPath], str],
    problems: list[str],
) -> Clause | None:
    try:
        if isinstance(value, list):
            return Clause(pattern, _read_gradient(value, path, parameter, where), where(path))
        checked = parameter.check(_coerce(value, parameter), where(path))
    except RequestError as error:
        problems.extend(error.problems)
        return None
    return Clause(pattern, checked, where(path))


def _read_gradient(
    values: list[Any], path: YamlPath, parameter: Parameter, where: Callable[[YamlPath], str]
) -> Gradient:
    """Return values over the layers.

    Raises:
        RequestError: there is none, or one is not a value of the parameter.
    """
    if not values:
        raise RequestError(f"{where(path)}: expected {parameter.expected}, got an empty list")
    checked = tuple(
        parameter.check(_coerce(value, parameter), where((*path, index)))
        for index, value in enumerate(values)
    )
    return Gradient(checked, numeric=parameter.kind == "float")


def _coerce(value: Any, parameter: Parameter) -> Any:
    """Convert mergekit's spellings: `1e-3` (a string to PyYAML), and 0 and 1 for booleans."""
    if parameter.kind in ("float", "int") and isinstance(value, str) and _NUMBER.match(value):
        return (
            float(value)
            if parameter.kind == "float" or not value.strip().lstrip("+-").isdigit()
            else int(value)
        )
    if parameter.kind == "bool":
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value in (0, 1):
            return bool(value)
    return value
