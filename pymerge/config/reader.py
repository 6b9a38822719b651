"""Reads a configuration: a YAML file or a mapping becomes a `MergeConfig`.

All problems that need no look at a checkpoint are found here at once, each with its line. Features
of mergekit's language that pymerge does not support (yet) are refused by name, never ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pymerge.config.records import MergeConfig, ModelEntry
from pymerge.config.schema import (
    Reference,
    dtype_code,
    read_reference,
    structure_problems,
    unsupported,
)
from pymerge.config.settings import Scope, Setting, read_settings
from pymerge.config.yaml_lines import LinedYaml, YamlPath, dotted, read_yaml
from pymerge.errors import RequestError, shown
from pymerge.methods import MethodSpec
from pymerge.methods import get as get_method

__all__ = ["config_of", "load_config", "plain_config", "read_document", "yaml_text"]


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], label: str = "config"
) -> MergeConfig:
    """Read and check a merge configuration.

    Args:
        source: the path of a YAML file (a string is always a path), or an already parsed mapping.
        label: the name of a mapping in messages; a file is named by its path.

    Raises:
        RequestError: listing everything that is wrong, each as `file:line: key: expected ..., got
            ...`.
    """
    return config_of(*read_document(source, label))


def read_document(
    source: str | os.PathLike[str] | Mapping[str, Any], label: str = "config"
) -> tuple[LinedYaml, str]:
    """Return the YAML document of a configuration, and its text."""
    if isinstance(source, Mapping):
        data = _plain(source)
        return LinedYaml(label, data), yaml_text(data)
    return read_yaml(source)


def plain_config(
    method: MethodSpec, models: Sequence[ModelEntry], dtype: str | None = None, *, where: str
) -> MergeConfig:
    """Return the configuration of a merge that sets no parameters.

    Args:
        models: the models to merge; there is no base.
        dtype: name of the result's dtype; default that of each tensor.
        where: the name of the configuration in messages.

    Raises:
        RequestError: the dtype is unknown.
    """
    raw: dict[str, Any] = {
        "merge_method": method.name,
        "models": [
            {"model": e.path if e.adapter is None else {"model": e.path, "lora": e.adapter}}
            for e in models
        ],
    }
    problems: list[str] = []
    code = None
    if dtype is not None:
        raw["dtype"] = dtype
        code = dtype_code(dtype, ("dtype",), lambda path: f"{where}: {dotted(path)}", problems)
    if problems:
        raise RequestError(problems)
    return MergeConfig(method, None, tuple(models), {}, code, None, yaml_text(raw), where, raw=raw)


def yaml_text(data: Mapping[str, Any]) -> str:
    """Return plain values as YAML."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)


def config_of(document: LinedYaml, text: str) -> MergeConfig:
    """Check the configuration that a document holds; see `load_config`."""
    return _Reader(document, text).read()


class _Reader:
    """Turns a document into a `MergeConfig`, collecting every problem on the way."""

    def __init__(self, document: LinedYaml, text: str) -> None:
        self.document = document
        self.text = text
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def read(self) -> MergeConfig:
        data = self.document.data
        self.problems += unsupported(data, self._where)
        self.problems += structure_problems(self.document)
        # Even if the structure is wrong, the parameters can be checked if the method is known.
        spec = self._method(data.get("merge_method"))
        base = self._reference(data.get("base_model"), ("base_model",))
        shared = self._settings(data.get("parameters"), ("parameters",), spec, "method")
        entries = self._entries(data.get("models"), spec)
        dtypes = {key: self._dtype(data.get(key), (key,)) for key in ("dtype", "out_dtype")}
        if spec is None or self.problems:
            raise RequestError(sorted(self.problems, key=self._line))

        config = MergeConfig(
            method=spec,
            base_model=None if base is None else base.path,
            models=self._without_base(spec, base, entries, shared),
            parameters=shared,
            dtype=dtypes["dtype"],
            out_dtype=dtypes["out_dtype"],
            text=self.text,
            where=self.document.name,
            base_where=self._where(("base_model",)),
            raw=data,
            warnings=self.warnings,
            base_adapter=None if base is None else base.adapter,
        )
        self._check_counts(config, len(entries))
        self._check_whole_model_density(config)
        if self.problems:
            raise RequestError(self.problems)
        self._warn(config)
        return config

    def _where(self, path: YamlPath) -> str:
        """Return `file:line: models[0].parameters.weight`."""
        where = self.document.where(path)
        return f"{where}: {dotted(path)}" if path else where

    def _line(self, problem: str) -> int:
        """Return the line number of a problem, for sorting in the file's order."""
        number = problem.removeprefix(f"{self.document.name}:").split(":", 1)[0]
        return int(number) if number.isdecimal() else 0

    def _method(self, name: Any) -> MethodSpec | None:
        if not isinstance(name, str):
            return None
        try:
            return get_method(name, self._where(("merge_method",)))
        except RequestError as error:
            self.problems += error.problems
            return None

    def _dtype(self, name: Any, path: YamlPath) -> str | None:
        return dtype_code(name, path, self._where, self.problems) if isinstance(name, str) else None

    def _reference(self, value: Any, path: YamlPath) -> Reference | None:
        """Return the paths of a model; values of other types are reported as structure problems."""
        if not isinstance(value, (str, Mapping)):
            return None
        return read_reference(value, path, self._where, self.problems)

    def _settings(
        self, data: Any, path: YamlPath, spec: MethodSpec | None, scope: Scope
    ) -> dict[str, Setting]:
        if spec is None or not isinstance(data, Mapping):
            return {}
        settings, problems, warnings = read_settings(data, path, spec, scope, self._where)
        self.problems += problems
        self.warnings += warnings
        return settings

    def _entries(self, sections: Any, spec: MethodSpec | None) -> list[ModelEntry]:
        entries: list[ModelEntry] = []
        for index, section in enumerate(sections if isinstance(sections, list) else []):
            if not isinstance(section, Mapping):
                continue
            at: YamlPath = ("models", index)
            found = self._reference(section.get("model"), (*at, "model")) or Reference("")
            settings = self._settings(section.get("parameters"), (*at, "parameters"), spec, "model")
            entries.append(
                ModelEntry(found.path, settings, self._where(at), dotted(at), found.adapter)
            )
        return entries

    def _without_base(
        self,
        spec: MethodSpec,
        base: Reference | None,
        entries: list[ModelEntry],
        shared: dict[str, Setting],
    ) -> tuple[ModelEntry, ...]:
        """Return the models to merge, without the base if the method has one."""
        if base is None:
            return tuple(entries)
        real = _real(base.path, base.adapter)
        others = [entry for entry in entries if _real(entry.path, entry.adapter) != real]
        if spec.with_base(True):
            for entry in entries:
                if entry not in others and entry.parameters:
                    names = ", ".join(sorted(entry.parameters))
                    self.warnings.append(
                        f"{entry.where}: is the base_model; its parameters are not used, as in "
                        f"mergekit: {names}"
                    )
            return tuple(others)
        if len(others) < len(entries):
            return tuple(entries)
        where = self._where(("base_model",))
        if "weight" in shared:
            # mergekit adds an unlisted base to the inputs; the global weight applies to it
            self.warnings.append(
                f"{where}: is not listed under models, and is averaged with them at the global "
                "weight, as in mergekit; to take only its config and tokenizer files, list it with "
                "weight 0"
            )
            return (*entries, ModelEntry(base.path, {}, where, "base_model", base.adapter))
        self.warnings.append(
            f"{where}: is not listed under models, so it gives its config and tokenizer files "
            f"only; {spec.name} does not average it"
        )
        return tuple(entries)

    def _check_counts(self, config: MergeConfig, listed: int) -> None:
        spec, where, count = config.method, self._where(("models",)), len(config.models)
        if spec.needs_base and config.base_model is None:
            self.problems.append(
                f"{config.where}: 'base_model' is missing; {spec.name} needs the model that the "
                "others were fine-tuned from"
            )
        beside = " beside base_model" if spec.with_base(config.base_model is not None) else ""
        if listed == 0:
            self.problems.append(
                f"{where}: expected at least {_models(spec.min_models)}{beside}, got an empty list"
            )
        elif count < spec.min_models:
            removed = " (base_model itself does not count)" if count < listed else ""
            self.problems.append(
                f"{where}: {spec.name} needs at least {_models(spec.min_models)}{beside}, got "
                f"{count}{removed}"
            )
        if spec.max_models is not None and count > spec.max_models:
            self.problems.append(
                f"{where}: {spec.name} takes at most {_models(spec.max_models)}{beside}, got "
                f"{count}"
            )

    def _check_whole_model_density(self, config: MergeConfig) -> None:
        """Refuse a density that differs between tensors if one trim spans them all."""
        names = [name for name in ("semantics", "scope") if config.method.parameter(name)]
        chosen = {name: config.value(name) for name in names}
        if not config.method.spans_model(chosen):
            return
        for holder in (config.parameters, *(entry.parameters for entry in config.models)):
            density = holder.get("density")
            if density is not None and density.by_tensor:
                self.problems.append(
                    f"{density.where}: expected one number, because the trim is over the whole "
                    f"model (semantics: {chosen['semantics']}), got a value by tensor; scope: "
                    "tensor allows that"
                )

    def _warn(self, config: MergeConfig) -> None:
        first: dict[tuple[str, str], str] = {}
        for entry in config.models:
            real = _real(entry.path, entry.adapter)
            if real in first:
                self.warnings.append(
                    f"{entry.where}: is the same model as {first[real]}: {entry.shown}"
                )
            first.setdefault(real, entry.name)
        density = config.method.parameter("density")
        holders = (config.parameters, *(entry.parameters for entry in config.models))
        if (
            density is not None
            and not density.no_effect
            and config.default(density) == 1.0
            and not any("density" in holder for holder in holders)
        ):
            self.warnings.append(
                f"{config.where}: density is not set and is 1.0, as in mergekit: nothing is trimmed"
            )


def _real(path: str, adapter: str | None) -> tuple[str, str]:
    """Return a key that is equal for two references to the same model."""
    return os.path.realpath(path), "" if adapter is None else os.path.realpath(adapter)


def _plain(value: Any) -> Any:
    """Convert Python values to YAML's own types: tuples become lists, paths strings."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"config: expected strings as keys, got {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or type(value) in (str, int, float, bool):
        return value
    try:
        return _plain(value.item())  # numpy and torch scalars
    except (AttributeError, ValueError, RuntimeError):
        raise RequestError(
            f"config: expected strings, numbers, lists and mappings, got {shown(value)}"
        ) from None


def _models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"
