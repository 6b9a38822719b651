"""Groups of tensors that share a coefficient, and the `filter` lists that express them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pymerge.errors import RequestError

__all__ = ["REST", "filters_of", "group_tensors"]

REST = "rest"
_LAYER = re.compile(r"(?:^|\.)([0-9]+)\.")
_NAMED = {2: ("lower half", "upper half"), 3: ("lower third", "middle third", "upper third")}


def group_tensors(
    groups: str | int | Mapping[str, str], names: Sequence[str], where: str
) -> dict[str, list[str]]:
    """Return the tensors of each group.

    Args:
        groups: "thirds" or a number of equal stretches of depth (tensors in no layer are the group
            "rest"); "layers" for each layer alone; or regular expressions by the group's name, of
            which the first that matches a tensor's name takes it (others keep the config's value).
        names: of all tensors that are merged.
        where: its name in messages.

    Raises:
        RequestError: an invalid expression, or one that matches no tensor; no layers.
    """
    if isinstance(groups, Mapping):
        return _by_expressions(groups, names, where)
    layers = {name: int(layer[1]) for name in names if (layer := _LAYER.search(name))}
    if not layers:
        raise RequestError(
            f"{where}: groups: no tensor has the number of a layer in its name (as in "
            "layers.0.weight); give regular expressions by name"
        )
    depth = max(layers.values()) + 1
    count = 3 if groups == "thirds" else depth if groups == "layers" else groups
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RequestError(
            f"{where}: groups: expected thirds, layers, a number of stretches, or regular "
            f"expressions by name; got {groups!r}"
        )
    if count > depth:
        raise RequestError(f"{where}: groups: expected at most {depth}, the layers; got {count}")
    if groups == "layers":
        labels = [f"layer {number}" for number in range(count)]
    else:
        labels = list(_NAMED.get(count, [f"part {n + 1} of {count}" for n in range(count)]))
    found: dict[str, list[str]] = {label: [] for label in labels}
    for name, layer in layers.items():
        found[labels[layer * count // depth]].append(name)
    rest = [name for name in names if name not in layers]
    return {label: own for label, own in found.items() if own} | ({REST: rest} if rest else {})


def _by_expressions(
    groups: Mapping[str, str], names: Sequence[str], where: str
) -> dict[str, list[str]]:
    if not groups:
        raise RequestError(f"{where}: groups: expected regular expressions by name, got none")
    problems: list[str] = []
    found: dict[str, list[str]] = {}
    left = list(names)
    for label, pattern in groups.items():
        try:
            expression = re.compile(pattern)
        except re.error as error:
            problems.append(f"{where}: groups: {label}: not a regular expression: {error}")
            continue
        found[label] = [name for name in left if expression.search(name)]
        left = [name for name in left if not expression.search(name)]
        if not found[label]:
            taken = any(expression.search(name) for name in names)
            why = "only tensors that a group before it takes" if taken else "no tensor"
            problems.append(f"{where}: groups: {label}: {pattern!r} finds {why}")
    if problems:
        raise RequestError(problems)
    return found


def filters_of(
    groups: Mapping[str, Sequence[str]], names: Sequence[str], where: str
) -> list[tuple[str, str]]:
    """Return (filter, group) in order of precedence: substrings that select each group's tensors.

    A filter takes every tensor whose name contains it, so the longest come first: whole layers
    ("model.layers.3.") if that is enough, else whole names.

    Raises:
        RequestError: the name of a tensor in no group contains the name of one in a group.
    """
    home = {name: label for label, own in groups.items() for name in own}
    short: set[tuple[str, str]] = set()
    for name, label in home.items():
        found = _LAYER.search(name)
        prefix = name[: found.end()] if found else name
        alone = all(home.get(other) == label for other in names if prefix in other)
        short.add((prefix if alone else name, label))
    for filters in (short, set(home.items())):
        ordered = sorted(filters, key=lambda item: (-len(item[0]), item[0]))
        if all(_first(ordered, name) == home.get(name) for name in names):
            return ordered
    odd = next(name for name in names if _first(ordered, name) != home.get(name))
    raise RequestError(
        f"{where}: groups: the tensor {odd!r} is in no group, but a filter for "
        f"{_first(ordered, odd)!r} would take it; put it into a group"
    )


def _first(filters: Sequence[tuple[str, str]], name: str) -> str | None:
    return next((label for pattern, label in filters if pattern in name), None)
