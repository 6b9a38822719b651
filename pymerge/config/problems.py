"""Validates a document against a pydantic model; every error has the file, the line and the key.

The expected content of a key is described with its type: by the type itself ("an integer", "linear
or log"), or by `Field(description=...)`, also within `Annotated`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from pymerge.config.yaml_lines import LinedYaml, YamlPath, dotted
from pymerge.errors import RequestError, nearest, shown

__all__ = ["Fault", "Number", "check_number", "validated"]

M = TypeVar("M", bound=BaseModel)


def check_number(value: Any) -> float | int:
    """Return a YAML number unchanged; raise ValueError for booleans and text, which pydantic
    accepts.

    NaN is rejected, and so is an integer too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError("expected a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError("expected a number") from None
    return value


Number = Annotated[float | int, BeforeValidator(check_number)]


@dataclass(frozen=True)
class Fault:
    """An error in a key.

    expected: its expected content. known: the keys allowed in its place.
    """

    kind: Literal["missing", "unknown", "wrong"]
    path: YamlPath
    value: Any
    expected: str
    known: tuple[str, ...]


def validated(
    model: type[M],
    data: Mapping[str, Any],
    document: LinedYaml,
    words: Callable[[Fault], str | None] = lambda _: None,
) -> M:
    """Return a document as a model.

    Args:
        data: of the document; keys that are none of the model's business may be left out.
        words: for a fault, instead of those that are the same everywhere; None for these, "" for
            nothing.

    Raises:
        RequestError: listing every fault, with `file:line: key`.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = _faults(model, data, error)
    texts = [words(fault) for fault in faults]
    problems = [
        _words(fault, document) if text is None else text
        for fault, text in zip(faults, texts, strict=True)
    ]
    raise RequestError([problem for problem in problems if problem])


def _words(fault: Fault, document: LinedYaml) -> str:
    key = dotted(fault.path)
    where = f"{document.where(fault.path)}: {key}"
    if fault.kind == "missing":
        top = len(fault.path) == 1
        return f"{document.name}: {key}: is missing" if top else f"{where}: is missing"
    if fault.kind == "unknown":
        known = ", ".join(fault.known)
        return f"{where}: unknown key{nearest(str(fault.path[-1]), fault.known)} (known: {known})"
    return f"{where}: expected {fault.expected}, got {shown(fault.value)}"


def _faults(model: type[BaseModel], data: Any, error: ValidationError) -> list[Fault]:
    """Return one fault for each key; of a key and what is in it, what is in it.

    A value that may be of several kinds has an error for each of them.
    """
    found: dict[YamlPath, Fault] = {}
    for one in error.errors():
        kind = {"missing": "missing", "extra_forbidden": "unknown"}.get(one["type"], "wrong")
        path = _path(data, one["loc"], kind == "missing")
        spots, around = _spots(model, path), _spots(model, path[:-1])
        expected = " or ".join(dict.fromkeys(text for spot in spots if (text := _kind(spot))))
        known = (key for spot in around for key in _keys(spot))
        value = None if kind == "missing" else _value(data, path)
        fault = Fault(kind, path, value, expected, tuple(dict.fromkeys(known)))  # type: ignore[arg-type]
        found.setdefault(path, fault)
    inner = {path[:length] for path in found for length in range(len(path))}
    return [fault for path, fault in found.items() if path not in inner]


def _path(data: Any, location: tuple[int | str, ...], missing: bool) -> YamlPath:
    """Return the keys of the document in a location, which names branches of types too."""
    path: list[int | str] = []
    for part in location:
        holds = isinstance(data, Mapping) and part in data
        if holds or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]  # type: ignore[index]
            path.append(part)
    return (*path, location[-1]) if missing else tuple(path)


def _value(data: Any, path: YamlPath) -> Any:
    for part in path:
        data = data[part]
    return data


Spot = tuple[Any, str | None]  # a type, and a description of it


def _spots(model: type[BaseModel], path: YamlPath) -> list[Spot]:
    """Return the types that a model has at a path."""
    spots: list[Spot] = [(model, None)]
    for part in path:
        every = [kind for spot in spots for kind, _ in _kinds(spot)]
        spots = [found for kind in every for found in _step(kind, part)]
    return spots


def _kinds(spot: Spot) -> Iterator[Spot]:
    """Yield the members of a union."""
    kind, text = spot
    if typing.get_origin(kind) is Annotated:
        inner, *metadata = typing.get_args(kind)
        texts = [one.description for one in metadata if isinstance(one, FieldInfo)]
        yield from _kinds((inner, text or next(iter(texts), None)))
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        for inner in typing.get_args(kind):
            yield from _kinds((inner, text))
    elif kind is not type(None):
        yield kind, text


def _step(kind: Any, part: int | str) -> Iterator[Spot]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and isinstance(part, int):
        yield inner[0], None
    elif origin is dict and isinstance(part, str):
        yield inner[1], None
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        if field is not None:
            yield field.annotation, field.description


def _keys(spot: Spot) -> Iterator[str]:
    for kind, _ in _kinds(spot):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from kind.model_fields


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping",
}


def _kind(spot: Spot) -> str:
    """Return what a spot is to hold, in words."""
    words: list[str] = []
    for kind, text in _kinds(spot):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if text is not None:
            words.append(text)
        elif origin is Literal:
            words += [str(one) for one in inner]
        elif origin is list:
            words.append("a list of numbers" if _kind((inner[0], None)) == "a number" else "a list")
        else:
            words.append(_NAMES.get(origin or kind, "a mapping"))
    words = list(dict.fromkeys(words))
    if "a number" in words:
        words = [word for word in words if word != "an integer"]
    return " or ".join(words)
