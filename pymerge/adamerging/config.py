"""The configuration of `pymerge ada`."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)

from pymerge.adamerging.arguments import model_names
from pymerge.config.problems import Number, check_number, validated
from pymerge.config.schema import Reference, read_reference
from pymerge.config.yaml_lines import LinedYaml, dotted, read_yaml
from pymerge.errors import RequestError, nearest

__all__ = ["AdaConfig", "read_config"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_table(value: Any) -> Any:
    """Validate a number, or arbitrarily nested lists of numbers."""
    return [_check_table(one) for one in value] if isinstance(value, list) else check_number(value)


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("a path")
    return value


_Path = Annotated[str, BeforeValidator(_path), Field(description="a path")]
_Table = Annotated[
    Any,
    BeforeValidator(_check_table),
    Field(description="a number, a list with one number or list per model"),
]


_NAMED = "a path, or {model: ..., name: ...}"


class _Fit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: StrictInt | None = None
    lr: Number | None = None
    batches_per_task: StrictInt | None = None
    entropy: StrictStr | None = None
    weights: list[Number] | None = None
    tokens: StrictInt | None = None
    autocast: StrictStr | None = None
    seed: StrictInt = 0
    accumulate: StrictStr = "gradients"
    join: StrictStr | None = None
    patience: StrictInt | None = None
    min_delta: Number = 1e-4
    checkpoint_every: StrictInt = 25


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: _Path | dict[str, Any]
    name: StrictStr | None = None


def _nothing(value: Any) -> Any:
    """Treat a key without a value (its lines may be comments) as an empty mapping."""
    return {} if value is None else value


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base_model: _Path
    models: list[Annotated[_Path | _Named, Field(description=_NAMED)]] = Field(
        min_length=1, description="a list of at least one model"
    )
    entry: StrictStr = Field(description="package.module:function")
    arguments: Annotated[dict[StrictStr, Any], BeforeValidator(_nothing)] = {}
    granularity: StrictStr | list[StrictStr] = Field(
        "layer", description="layer, module, task or a list of regular expressions"
    )
    trimmed: StrictBool = False
    density: Number = Field(0.2, description="a number in [0, 1]")
    init: _Table = 0.3
    preset: StrictStr = "official"
    clamp: list[Number] | StrictStr | None = Field(
        "preset", description="a list of two numbers, null or preset"
    )
    fixed: StrictStr = "equal"
    fit: Annotated[_Fit, BeforeValidator(_nothing)] = _Fit()


# Arguments that the entry point provides.
_OF_ENTRY = ("model", "loaders", "heads", "inputs", "labels")


class AdaConfig:
    """A configuration, checked as far as is possible without the model.

    Attributes:
        values: its keys, including defaults.
        base, paths: paths of the base and of the models; MODEL+ADAPTER where an adapter is given.
        names: names of the models.
        files: all paths of the base and of the models.
        fit: the keyword arguments of `AdaMerging.fit`.
    """

    def __init__(self, values: _Config, document: LinedYaml) -> None:
        self.values, self._document = values, document
        entries = [_Named(model=one) if isinstance(one, str) else one for one in values.models]
        problems: list[str] = []
        found = [self._reference(values.base_model, ("base_model",), problems)]
        for k, entry in enumerate(entries):
            inner = () if isinstance(values.models[k], str) else ("model",)
            found.append(self._reference(entry.model, ("models", k, *inner), problems))
        if problems:
            raise RequestError(problems)
        parts = [(one.path, one.adapter) for one in found if one is not None]
        self.files = [part for pair in parts for part in pair if part is not None]
        self.base, *self.paths = ["+".join(part for part in pair if part) for pair in parts]
        self.names = model_names(self.paths, [entry.name for entry in entries])
        # Every key is an argument of `AdaMerging.fit`.
        self.fit: dict[str, Any] = dict(values.fit)
        if (cast := values.fit.autocast) is not None:
            if cast not in _DTYPES:
                raise RequestError(
                    f"{self.where('fit', 'autocast')}: expected one of {', '.join(_DTYPES)}, got "
                    f"{cast!r}{nearest(cast, _DTYPES)}"
                )
            self.fit["autocast"] = _DTYPES[cast]

    def _reference(self, value: Any, at: Any, problems: list[str]) -> Reference | None:
        return read_reference(value, at, lambda path: self.where(*path), problems)

    def where(self, *path: str | int) -> str:
        """Return `file:line: key` for a key: the beginning of messages about it."""
        return f"{self._document.where(path)}: {dotted(path)}"

    def located(self, error: RequestError) -> RequestError:
        """Return an error of `AdaMerging` with the line numbers of the keys that it is about."""
        return type(error)([self._located(problem) for problem in error.problems])

    def _located(self, problem: str) -> str:
        if (found := re.match(r"models\[(\d+)\]", problem)) is not None:
            return f"{self._document.where(('models', int(found.group(1))))}: {problem}"
        found = re.match(r"\w+", problem)
        name = "" if found is None else found.group()
        if name in _OF_ENTRY:
            return f"{self.where('entry')}: {self.values.entry}: {problem}"
        key = {"base": "base_model", "names": "models"}.get(name, name)
        if key in _Config.model_fields:
            return f"{self._document.where((key,))}: {problem}"
        if name in _Fit.model_fields:
            return f"{self._document.where(('fit', name))}: fit.{problem}"
        return problem


def read_config(path: str | os.PathLike[str]) -> AdaConfig:
    """Read and validate a configuration.

    Raises:
        RequestError: lists every problem with its `file:line`.
    """
    keys = "base_model: ..., models: ..., entry: ..."
    document, _ = read_yaml(path, "an AdaMerging configuration", keys)
    return AdaConfig(validated(_Config, document.data, document), document)
