"""YAML with line numbers: plain Python values, and the line of each.

PyYAML's own loader drops positions and lets the last of two equal keys win. But a config needs the
line in every error, and a key given twice is a mistake. Only the types of `yaml.SafeLoader` are
made.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from pymerge.errors import RequestError
from pymerge.strict_json import is_text, read_bytes

__all__ = ["LinedYaml", "YamlPath", "dotted", "load_yaml", "read_yaml"]

YamlPath = tuple[str | int, ...]

# Aliases of aliases grow exponentially; no real config comes near this many values.
_MAX_VALUES = 100_000
_MAX_BYTES = 16 << 20
_MOST_DEPTH = 100
_MERGE = ("a merge configuration", "merge_method: ..., models: ...")
_MERGE_TAG = "tag:yaml.org,2002:merge"


def dotted(path: YamlPath) -> str:
    """Return a path in its readable form: `models[0].parameters.weight`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "config"


@dataclass(frozen=True)
class LinedYaml:
    """A parsed document: its value, and the line of every key and list item by path."""

    name: str
    data: Any
    lines: dict[YamlPath, int] = field(default_factory=dict)

    def part(self, key: str) -> LinedYaml:
        """Return the document below a key."""
        lines = {path[1:]: line for path, line in self.lines.items() if path[:1] == (key,)}
        return LinedYaml(self.name, self.data[key], lines)

    def where(self, path: YamlPath) -> str:
        """Return `file:line` of a path, or of its nearest ancestor that is in the file."""
        for length in range(len(path), -1, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return f"{self.name}:{line}"
        return self.name


def read_yaml(
    path: str | os.PathLike[str], what: str = _MERGE[0], keys: str = _MERGE[1]
) -> tuple[LinedYaml, str]:
    """Read a file with one YAML document whose top level is a mapping; return it and its text.

    Args:
        path: of the file: UTF-8, with or without a byte order mark, at most 16 MiB.
        what, keys: the expected content, for messages: "a merge configuration", and its minimal
            keys.

    Raises:
        RequestError: it cannot be read, or `load_yaml` refuses it.
    """
    name = os.fspath(path)
    content = read_bytes(path, f"{what} in YAML", _MAX_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{name}:{line}: expected UTF-8 text: {error.reason}") from None
    return load_yaml(text, name, what, keys), text


def load_yaml(text: str, name: str, what: str = _MERGE[0], keys: str = _MERGE[1]) -> LinedYaml:
    """Parse one YAML document whose top level is a mapping.

    Args:
        text: the document.
        name: the file's name, for messages.
        what, keys: as for `read_yaml`.

    Raises:
        RequestError: a syntax error, no document or several, a top level that is not a mapping, a
            key that is given twice or is not a string; with `file:line`.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RequestError(f"{name}: expected {what}, got an empty file")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise RequestError(f"{name}:{_line(node)}: expected a mapping ({keys}), got {kind}")
        walker = _Walker(loader, name)
        data = walker.value(node, ())
        if walker.problems:
            raise RequestError(walker.problems)
        return LinedYaml(name, data, walker.lines)
    except yaml.YAMLError as error:
        raise RequestError(_syntax_problem(error, name, text)) from None
    except RecursionError:
        raise RequestError(f"{name}: not a config: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Walker:
    """Turns nodes into values, recording lines and collecting problems."""

    def __init__(self, loader: yaml.SafeLoader, name: str) -> None:
        self.loader = loader
        self.name = name
        self.lines: dict[YamlPath, int] = {}
        self.problems: list[str] = []
        self._open: set[int] = set()
        self._values = 0

    def value(self, node: yaml.Node, path: YamlPath) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise RequestError(
                f"{self.name}:{_line(node)}: expands to more than {_MAX_VALUES} values (aliases of "
                "aliases?)"
            )
        self.lines.setdefault(path, _line(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if len(path) > _MOST_DEPTH:
            raise RequestError(f"{self.name}:{_line(node)}: not a config: nested too deeply")
        if id(node) in self._open:
            raise RequestError(
                f"{self.name}:{_line(node)}: an alias refers to a value it is part of"
            )
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            self._problem(
                node, f"expected a plain mapping, list or value, got the tag {node.tag!r}"
            )
            return None
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if not is_text(node.value):
            self._problem(node, f"{node.value!r} holds what UTF-8 cannot hold")
            return None
        try:
            return self.loader.construct_object(node, deep=True)
        # The date 2024-02-31, or PyYAML's results for "!!int ''", "!!bool x" and "!!timestamp x".
        except (ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
            self._problem(node, f"{node.value!r} is not a valid value: {error}")
            return None

    def _mapping(self, node: yaml.MappingNode, path: YamlPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_line: dict[Hashable, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                merged.append(value_node)
                continue
            key = self._key(key_node)
            if key is None:
                continue
            if key in first_line:
                self._problem(
                    key_node,
                    f"{key!r} is given twice (first on line {first_line[key]}); remove one",
                )
                continue
            first_line[key] = _line(key_node)
            self.lines[(*path, key)] = _line(key_node)
            result[key] = self.value(value_node, (*path, key))
        for value_node in merged:
            self._merge(value_node, path, result)
        return result

    def _key(self, node: yaml.Node) -> str | None:
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, str):
            return key
        text = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        self._problem(
            node, f"expected a string as key, got {text}; put it in quotes if it is meant as one"
        )
        return None

    def _merge(self, node: yaml.Node, path: YamlPath, result: dict[str, Any]) -> None:
        """Apply `<<: *anchor`: adds the keys that neither the mapping itself nor an earlier merge
        has."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self._problem(node, "'<<' expects a mapping or a list of mappings")
                return
            own, self.lines = self.lines, {}
            value = cast(dict[str, Any], self.value(source, path) or {})
            merged, self.lines = self.lines, own
            for key, item in value.items():
                result.setdefault(key, item)
            for key, line in merged.items():
                self.lines.setdefault(key, line)

    def _problem(self, node: yaml.Node, text: str) -> None:
        self.problems.append(f"{self.name}:{_line(node)}: {text}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _syntax_problem(error: yaml.YAMLError, name: str, text: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = error.problem or error.context or "syntax error"
        if "single document" in (error.context or ""):
            return f"{where}: expected one YAML document, got several ('---' starts another)"
        if "'\\t'" in problem or "tab" in problem:
            problem += "; indent with spaces, YAML does not allow tabs"
        return f"{where}: not valid YAML: {problem}"
    reason = " ".join(str(error).split())
    at = getattr(error, "position", None)  # the position of a character that YAML does not allow
    where = name if at is None else f"{name}:{text.count(chr(10), 0, at) + 1}"
    return f"{where}: not valid YAML: {reason}"
