"""The configuration of `pymerge collect`: read from YAML and checked; errors name the line."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from pymerge.checkpoint.statistics import KINDS
from pymerge.config.problems import validated
from pymerge.config.schema import read_reference
from pymerge.config.yaml_lines import LinedYaml, YamlPath, dotted, read_yaml
from pymerge.errors import RequestError, nearest
from pymerge.statistics import fisher, gram

__all__ = ["FUNCTIONS", "CollectConfig", "ModelToCollect", "read_config"]

# These come from the entry point rather than the config: functions and data.
FUNCTIONS = {"fisher": ("logits",), "gram": ("forward", "mask")}
_COLLECT: dict[str, Callable[..., Any]] = {
    "fisher": fisher.collect_fisher,
    "gram": gram.collect_gram,
}
_CHECKS: dict[str, Callable[..., None]] = {
    "fisher": fisher.check_options,
    "gram": gram.check_options,
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class ModelToCollect:
    """A model of the configuration.

    label: "models[0] (models/german)". at: its position in the document. reference: as given.
    """

    path: str
    adapter: str | None
    name: str
    label: str
    at: YamlPath
    reference: str


class CollectConfig:
    """A configuration that has been checked as far as possible without a model.

    Attributes:
        kind: "fisher" or "gram".
        models: at least one.
        entry, arguments: the entry point and its arguments.
        options: all options of the collecting function, defaults included, as YAML values.
    """

    def __init__(self, values: _Config, document: LinedYaml) -> None:
        self.kind = values.kind
        self.entry = values.entry
        self.arguments = values.arguments
        self._document = document
        problems: list[str] = []
        self.models = self._read_models(values.models, problems)
        known = _defaults(self.kind)
        for key in values.options:
            if key not in known:
                problems.append(self._unknown_option(key, known))
        if not problems:
            self.options = {**known, **values.options}
            try:
                _CHECKS[self.kind](**self.arguments_of_function())
            except RequestError as error:
                problems += [self.located(problem) or problem for problem in error.problems]
        if problems:
            raise RequestError(problems)

    def _unknown_option(self, key: str, known: Mapping[str, Any]) -> str:
        where = f"{self.where(('options', key))}: options.{key}"
        others = [kind for kind in KINDS if kind != self.kind and key in _defaults(kind)]
        if others:
            return f"{where}: is of kind {others[0]}, not {self.kind}"
        if any(key in names for names in FUNCTIONS.values()):
            return f"{where}: is a function: the entry point returns it"
        return f"{where}: unknown option{nearest(key, known)} (known: {', '.join(known)})"

    def where(self, path: YamlPath) -> str:
        """Return `file:line` of a key."""
        return self._document.where(path)

    def located(self, problem: str) -> str | None:
        """Return a problem of the function with the line of the option that it concerns, or None.

        Other problems have no line in the config.
        """
        found = re.match(rf"collect_{self.kind}: (\w+): ", problem)
        if found is None or found.group(1) not in self.options:
            return None
        return f"{self.where(('options', found.group(1)))}: options.{problem[found.start(1) :]}"

    def arguments_of_function(self) -> dict[str, Any]:
        """Return the options in the form that the function takes."""
        given = dict(self.options)
        if "accumulate" in given:
            name = given["accumulate"]
            given["accumulate"] = _DTYPES.get(name, name) if isinstance(name, str) else name
        return given

    def _read_models(
        self, entries: list[str | _Named], problems: list[str]
    ) -> list[ModelToCollect]:
        found = []
        for index, entry in enumerate(entries):
            at: YamlPath = ("models", index)
            value = entry if isinstance(entry, str) else entry.model
            path = at if isinstance(entry, str) else (*at, "model")
            one = read_reference(value, path, lambda p: f"{self.where(p)}: {dotted(p)}", problems)
            if one is None:
                continue
            reference = one.path if one.adapter is None else f"{one.path}+{one.adapter}"
            own = Path(one.path if one.adapter is None else one.adapter)
            plain = own.stem if own.suffix in (".safetensors", ".bin", ".pt", ".pth") else own.name
            name = (None if isinstance(entry, str) else entry.name) or plain or own.resolve().name
            label = f"models[{index}] ({reference})"
            found.append(ModelToCollect(one.path, one.adapter, name, label, at, reference))
        return found


_NAMED = "a path, or {model: ..., name: ...}"


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: StrictStr | dict[str, Any]
    name: StrictStr | None = Field(
        default=None, pattern=r"^[^/\x00]+$", description="a name without slashes"
    )


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["fisher", "gram"]  # as in KINDS
    models: list[Annotated[StrictStr | _Named, Field(description=_NAMED)]] = Field(
        min_length=1, description="a list of at least one model"
    )
    entry: StrictStr = Field(description="package.module:function")
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {}


def _defaults(kind: str) -> dict[str, Any]:
    """Return the options of the collecting function, by name, with their defaults."""
    parameters = inspect.signature(_COLLECT[kind]).parameters.values()
    found = {
        one.name: one.default
        for one in parameters
        if one.kind is inspect.Parameter.KEYWORD_ONLY and one.name not in FUNCTIONS[kind]
    }
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return {
        name: names.get(value, value) if isinstance(value, torch.dtype) else value
        for name, value in found.items()
    }


def read_config(path: str | os.PathLike[str]) -> CollectConfig:
    """Read a configuration.

    Raises:
        RequestError: listing every problem, with `file:line`.
    """
    document, _ = read_yaml(path, "a collect configuration", "kind: ..., models: ..., entry: ...")
    return CollectConfig(validated(_Config, document.data, document), document)
