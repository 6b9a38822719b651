"""The form of an op's specification: schema, roles of the arguments, documentation. See `specs`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, TypeAlias

__all__ = [
    "COLUMNS",
    "COUNTERS",
    "FLAT",
    "OF_A_MODEL",
    "START",
    "Argument",
    "Choice",
    "OpSpec",
    "Role",
    "Table",
]


class _Plain(Enum):
    FLAT = "a tensor of the op's length, or one for each model"
    COUNTERS = "numbers for the whole call, whatever its length"
    OF_A_MODEL = "a tensor of its own length for each model: such a call cannot be split"
    START = "the flat index of the first element"
    COLUMNS = "the length of a row; where it is not 0, a part of a call has whole rows"


FLAT, COUNTERS, OF_A_MODEL, START, COLUMNS = _Plain


@dataclass(frozen=True)
class Table:
    """A table whose last axis runs along the elements.

    Attributes:
        width: the number of elements per column: a number, or the name of the argument that holds
            it. If a column is one element, rows are padded to a multiple of SCORE_ALIGNMENT.
        otherwise: the width if that argument is 0.
        read: whether a table that is written is also read.
    """

    width: int | str
    otherwise: int = 0
    read: bool = False

    def elements(self, named: Mapping[str, Any]) -> int:
        """Return the number of elements per column in a call."""
        return self.width if isinstance(self.width, int) else named[self.width] or self.otherwise


@dataclass(frozen=True)
class Choice:
    """An argument that must be one of a few words.

    Attributes:
        names: the words; kernels may number them in this order.
    """

    names: tuple[str, ...]


Role: TypeAlias = "_Plain | Table | Choice"

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Argument:
    """An argument, as parsed from the schema.

    Attributes:
        type: "Tensor", "Tensor[]", "Tensor?", "int", "float[]", ...
        default: its default value; a tuple for a list.
        written: whether the op writes to it.
        by_name: whether it is keyword-only.
    """

    name: str
    type: str
    default: Any
    written: bool
    by_name: bool


@dataclass(frozen=True)
class OpSpec:
    """The specification of an op, from which everything else about it follows.

    Attributes:
        name: as in `torch.ops.pymerge`; it ends in "_", because an op writes to its arguments.
        schema: the arguments, in torch's schema language. An op returns nothing. The last argument
            is `backend`.
        roles: the role of every tensor argument, and of the other arguments that determine how a
            call can be split or that must be one of a few words.
        doc: what the op does.
        function: the function of a backend that computes the op; by default the op's name without
            "_". It takes the arguments in order, without `backend`.
        forward: called as (backend, *arguments) instead, if the function takes other arguments.
    """

    name: str
    schema: str
    roles: Mapping[str, Role]
    doc: str
    function: str = ""
    forward: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        if not self.function:
            object.__setattr__(self, "function", self.name.removesuffix("_"))

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        found: list[Argument] = []
        by_name = False
        for part in self.schema.split(", "):
            if part == "*":
                by_name = True
                continue
            kind, _, rest = part.partition(" ")
            name, equals, default = rest.partition("=")
            value = ast.literal_eval(default) if equals else _REQUIRED
            value = tuple(value) if isinstance(value, list) else value
            written = "!" in kind
            found.append(Argument(name, re.sub(r"\(.*\)", "", kind), value, written, by_name))
        return tuple(found)

    @cached_property
    def flats(self) -> tuple[str, ...]:
        """The tensors that have the op's length."""
        return tuple(a.name for a in self.arguments if self.roles.get(a.name) is FLAT)

    @cached_property
    def first(self) -> str:
        """The tensor, never optional, that determines the length and the device of a call."""
        optional = {a.name for a in self.arguments if a.type.endswith("?")}
        return next(name for name in self.flats if name not in optional)

    @cached_property
    def written(self) -> frozenset[str]:
        """The arguments that the op writes to."""
        return frozenset(a.name for a in self.arguments if a.written)

    @cached_property
    def tables(self) -> Mapping[str, Table]:
        return {name: role for name, role in self.roles.items() if isinstance(role, Table)}

    @cached_property
    def choices(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The arguments that must be one of a few words, each with these words."""
        return tuple((n, r.names) for n, r in self.roles.items() if isinstance(r, Choice))

    def having(self, role: Role) -> str | None:
        """Return the argument that has a role which at most one argument has, or None."""
        return next((name for name, own in self.roles.items() if own is role), None)

    def bind(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments of a call by name, in the order of the schema, including defaults.

        Raises:
            TypeError: an argument is missing, unknown or given twice, or there are too many.
        """
        named = self._defaults.copy()
        named.update(zip(self._positions, arguments, strict=False))  # `_check` refuses too many
        named.update(keywords)
        count = len(arguments)
        if not self._required <= count <= len(self._positions) or not (
            self._by_name.issuperset(keywords)
        ):
            self._check(count, keywords)
        return named

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return {argument.name: argument.default for argument in self.arguments}

    @cached_property
    def _positions(self) -> dict[str, int]:
        """The arguments that may be given by position, with their positions."""
        names = [argument.name for argument in self.arguments if not argument.by_name]
        return {name: position for position, name in enumerate(names)}

    @cached_property
    def _by_name(self) -> frozenset[str]:
        return frozenset(self._defaults).difference(self._positions)

    @cached_property
    def _required(self) -> int:
        return sum(argument.default is _REQUIRED for argument in self.arguments)

    def _check(self, count: int, keywords: Mapping[str, Any]) -> None:
        if count > len(self._positions):
            raise TypeError(
                f"{self.name}: expected at most {len(self._positions)} arguments by position, got "
                f"{count}"
            )
        given = list(self._positions)[:count]
        for name in keywords:
            if name not in self._defaults:
                raise TypeError(f"{self.name}: there is no argument {name!r}")
            if name in given:
                raise TypeError(f"{self.name}: argument {name!r} is given twice")
        missing = [
            argument.name
            for argument in self.arguments
            if argument.default is _REQUIRED and argument.name not in {*given, *keywords}
        ]
        if missing:
            raise TypeError(f"{self.name}: missing arguments: {', '.join(missing)}")
