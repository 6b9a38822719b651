"""The structure of a configuration: its keys and their types, dtype names, references to models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from pymerge.config.problems import Fault, validated
from pymerge.config.yaml_lines import LinedYaml, YamlPath, dotted
from pymerge.errors import RequestError, nearest, shown
from pymerge.methods import METHODS

__all__ = [
    "Reference",
    "dtype_code",
    "read_reference",
    "structure_problems",
    "unsupported",
]

Where = Callable[[YamlPath], str]

_DTYPES = {
    "float32": "F32",
    "float": "F32",
    "fp32": "F32",
    "f32": "F32",
    "float16": "F16",
    "half": "F16",
    "fp16": "F16",
    "f16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float64": "F64",
    "double": "F64",
    "fp64": "F64",
    "f64": "F64",
}
_DTYPES_SHOWN = ("float32", "float16", "bfloat16", "float64")

_UNSUPPORTED_KEYS = {
    "slices": "merging slices of layers",
    "modules": "merging module by module",
    "tokenizer_source": "building a tokenizer (pymerge copies the base's)",
    "tokenizer": "building a tokenizer (pymerge copies the base's)",
    "chat_template": "setting a chat template (pymerge copies the base's)",
}


@dataclass(frozen=True)
class Reference:
    """A model named in a config: its path, and the path of an adapter to fold into it, or None."""

    path: str
    adapter: str | None = None


_Model = Annotated[StrictStr | dict[str, Any], Field(description="the path of a model")]
_Parameters = Annotated[dict[str, Any], Field(description="a mapping of parameters")]
_Dtype = Annotated[StrictStr, Field(description="the name of a dtype")]
_METHOD = "the name of a method (" + ", ".join(sorted(METHODS)) + ")"
_SECTION = "{model: ..., parameters: ...}"


class _ModelSection(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: _Model
    parameters: _Parameters | None = None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    merge_method: StrictStr = Field(description=_METHOD)
    models: list[Annotated[_ModelSection, Field(description=_SECTION)]] = Field(
        description=f"a list of {_SECTION}"
    )
    base_model: _Model | None = None
    parameters: _Parameters | None = None
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None


def unsupported(data: Mapping[str, Any], where: Where) -> list[str]:
    """Return a problem for each key of mergekit's language that pymerge does not support yet."""
    return [
        f"{where((key,))}: not supported yet: {what}; remove the key"
        for key, what in _UNSUPPORTED_KEYS.items()
        if data.get(key) is not None
    ]


def structure_problems(document: LinedYaml) -> list[str]:
    """Return the problems with the keys and types of a document, except parameters."""
    data: Mapping[str, Any] = document.data
    rest = {key: value for key, value in data.items() if key not in _UNSUPPORTED_KEYS}
    # slices and modules replace models, and are already refused by name
    replaced = data.get("slices") is not None or data.get("modules") is not None

    def words(fault: Fault) -> str | None:
        last, around = fault.path[-1], fault.path[:-1]
        if fault.kind == "missing":
            if replaced and fault.path == ("models",):
                return ""
            where = document.where(around) + (f": {dotted(around)}" if around else "")
            return f"{where}: '{last}' is missing; expected {fault.expected}"
        where = f"{document.where(fault.path)}: {dotted(fault.path)}"
        if fault.kind == "unknown" and any(spec.parameter(str(last)) for spec in METHODS.values()):
            return f"{where}: '{last}' is a parameter; put it under 'parameters:'"
        if fault.kind == "unknown":
            return (
                f"{where}: unknown key '{last}'{nearest(str(last), fault.known)} "
                f"(known: {', '.join(fault.known)})"
            )
        return None

    try:
        validated(_Document, rest, document, words)
    except RequestError as error:
        return error.problems
    return []


def dtype_code(name: str, path: YamlPath, where: Where, problems: list[str]) -> str | None:
    """Return the safetensors code of a dtype name such as `bfloat16`, `torch.float32` or `fp16`."""
    code = _DTYPES.get(name.removeprefix("torch.").lower())
    if code is None:
        problems.append(
            f"{where(path)}: expected one of {', '.join(_DTYPES_SHOWN)}, got {name!r}"
            f"{nearest(name, _DTYPES_SHOWN)}"
        )
    return code


def read_reference(
    value: Any, path: YamlPath, where: Where, problems: list[str]
) -> Reference | None:
    """Return the local paths that a model reference names.

    Args:
        value: a string, "MODEL" or "MODEL+ADAPTER"; `{path: ...}`; or `{model: <one of these>,
            lora: ADAPTER or {path: ADAPTER}}`.
        path: its position in the document.
    """
    if isinstance(value, Mapping):
        return _read_reference_mapping(value, path, where, problems)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        problems.append(f"{where(path)}: expected the path of a model, got {shown(value)}")
        return None
    # "model+lora" and "model@revision" are mergekit's syntax; a directory with such a name is taken
    # literally.
    if os.path.exists(value):
        return Reference(value)
    model, adapter = _split(value)
    for part in (model, adapter or ""):
        if "@" in part and not os.path.exists(part):
            problems.append(
                f"{where(path)}: not supported yet: revisions of Hugging Face models; got {value!r}"
            )
            return None
    if adapter == "" or (adapter is not None and not model):
        problems.append(f"{where(path)}: expected MODEL+ADAPTER, two paths, got {value!r}")
        return None
    return Reference(model, adapter)


def _split(value: str) -> tuple[str, str | None]:
    """Split MODEL+ADAPTER at the first "+" that follows an existing model, else at the first
    one."""
    marks = [position for position, letter in enumerate(value) if letter == "+"]
    if not marks:
        return value, None
    at = next((mark for mark in marks if os.path.exists(value[:mark])), marks[0])
    return value[:at], value[at + 1 :]


def _read_reference_mapping(
    value: Mapping[str, Any], path: YamlPath, where: Where, problems: list[str]
) -> Reference | None:
    refused = {
        "revision": "revisions of Hugging Face models",
        "override_architecture": "overriding the architecture",
    }
    for key, item in value.items():
        if key in refused:
            if item is not None:
                problems.append(f"{where((*path, key))}: not supported yet: {refused[key]}")
        elif key not in ("model", "path", "lora"):
            known = ("model", "path", "lora", *refused)
            problems.append(
                f"{where((*path, key))}: unknown key '{key}'{nearest(key, known)} "
                f"(known: {', '.join(known)})"
            )
    inner = [key for key in ("model", "path") if key in value]
    if len(inner) != 1:
        problems.append(
            f"{where(path)}: expected the path of a model, as a string or one of {{path: ...}}, "
            f"{{model: ...}}"
        )
        return None
    found = read_reference(value[inner[0]], (*path, inner[0]), where, problems)
    if value.get("lora") is None:
        return found
    at = (*path, "lora")
    adapter = read_reference(value["lora"], at, where, problems)
    if found is None or adapter is None:
        return None
    if found.adapter is not None or adapter.adapter is not None:
        problems.append(f"{where(at)}: expected one adapter for a model, got more")
        return None
    return Reference(found.path, adapter.path)
