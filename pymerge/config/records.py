"""A checked configuration: the method, the models, and the settings for each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pymerge.config.settings import Clause, Setting
from pymerge.errors import RequestError
from pymerge.methods import REQUIRED, MethodSpec, Parameter

__all__ = ["MergeConfig", "ModelEntry", "TensorParameters"]

# The resolved parameters of a tensor: a list of K values for scope "model", else one value.
TensorParameters = dict[str, Any]


@dataclass(frozen=True)
class ModelEntry:
    """One fine-tuned model of a config.

    `name` is its name in messages ("models[0]", by its position in the file); `where` adds the line
    ("config.yml:7: models[0]"). `adapter` is the path of an adapter to fold into the model, or
    None.
    """

    path: str
    parameters: dict[str, Setting]
    where: str
    name: str
    adapter: str | None = None

    @property
    def shown(self) -> str:
        """The paths as a config has them: MODEL or MODEL+ADAPTER."""
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


@dataclass(frozen=True)
class MergeConfig:
    """A valid configuration.

    `models` are the fine-tuned models: a base listed among them is removed for methods that need a
    base. `parameters` are the global settings by `Parameter.name`; `dtype` and `out_dtype` are
    safetensors codes; `text` is the YAML as given, `raw` its value.
    """

    method: MethodSpec
    base_model: str | None
    models: tuple[ModelEntry, ...]
    parameters: dict[str, Setting]
    dtype: str | None
    out_dtype: str | None
    text: str
    where: str
    base_where: str = ""
    raw: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    base_adapter: str | None = None

    @property
    def base(self) -> ModelEntry | None:
        """The base, whether the method uses it or only its other files are taken."""
        if self.base_model is None:
            return None
        return ModelEntry(self.base_model, {}, self.base_where, "base_model", self.base_adapter)

    @property
    def side_files_from(self) -> str:
        """The model whose config, tokenizer and other files go into the output."""
        return self.base_model if self.base_model is not None else self.models[0].path

    @property
    def paths(self) -> list[str]:
        """Every model and adapter, the base's first."""
        pairs = [(self.base_model, self.base_adapter)]
        pairs += [(entry.path, entry.adapter) for entry in self.models]
        return [path for pair in pairs for path in pair if path is not None]

    @property
    def dialect(self) -> MethodSpec:
        """The method's record, with the backends that support its semantics."""
        has = self.method.parameter("semantics") is not None
        return self.method.in_dialect(self.value("semantics") if has else None)

    def resolve(self, tensor: str, depth: float = 0.0) -> TensorParameters:
        """Return every parameter of one tensor, by `Parameter.name`.

        A model's own setting wins over the global one, which wins over the default. In a `filter`
        list the first entry that matches the tensor's name wins; if none matches, the parameter
        counts as not set.

        Args:
            tensor: its name.
            depth: of its layer, as `layer_depths` has it.

        Raises:
            RequestError: a parameter without default is set nowhere.
        """
        resolved: TensorParameters = {}
        for parameter in self.method.parameters:
            if parameter.no_effect or parameter.only is not None or parameter.kind == "path":
                continue  # no effect, or not a parameter of tensors
            shared = self.value(parameter.name, tensor, depth)
            if parameter.scope == "method":
                resolved[parameter.name] = self._required(parameter, shared, tensor, self.where)
                continue
            values = []
            for entry in self.models:
                setting = entry.parameters.get(parameter.name)
                own = None if setting is None else setting.value_for(tensor, depth)
                value = shared if own is None else own
                values.append(self._required(parameter, value, tensor, entry.where))
            resolved[parameter.name] = values
        return resolved

    def value(self, name: str, tensor: str = "", depth: float = 0.0) -> Any:
        """Return the global value of a parameter for a tensor, or its default."""
        setting = self.parameters.get(name)
        value = None if setting is None else setting.value_for(tensor, depth)
        if value is not None:
            return value
        parameter = self.method.parameter(name)
        assert parameter is not None
        return self.default(parameter)

    def default(self, parameter: Parameter) -> Any:
        """Return a parameter's default in YAML.

        `yaml_defaults` describe one dialect. If another one is chosen, only the default of the
        dialect itself applies.
        """
        defaults = self.method.yaml_defaults
        dialects = "semantics" in defaults and parameter.name != "semantics"
        if dialects and self.value("semantics") != defaults["semantics"]:
            return parameter.default
        return defaults.get(parameter.name, parameter.default)

    def clauses(self) -> Iterator[Clause]:
        """Yield every value that is set, globally and per model."""
        for holder in (self.parameters, *(entry.parameters for entry in self.models)):
            for setting in holder.values():
                yield from setting.clauses

    def _required(self, parameter: Parameter, value: Any, tensor: str, where: str) -> Any:
        if value is REQUIRED:
            raise RequestError(
                f"{where}: {self.method.name} needs the parameter '{parameter.yaml_names[0]}', "
                f"which is not set for tensor '{tensor}'"
            )
        return value
