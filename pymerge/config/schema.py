"""The shape of a configuration: its keys and their types, dtype names, and how models are named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictStr, ValidationError

from pymerge.config.yaml_lines import YamlPath
from pymerge.errors import nearest, shown
from pymerge.methods import METHODS

__all__ = [
    "Reference",
    "dotted",
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

_EXPECTED: dict[str | int, str] = {
    "merge_method": "the name of a method (" + ", ".join(sorted(METHODS)) + ")",
    "base_model": "the path of a model",
    "models": "a list of {model: ..., parameters: ...}",
    "model": "the path of a model",
    "parameters": "a mapping of parameters",
    "dtype": "the name of a dtype",
    "out_dtype": "the name of a dtype",
}


@dataclass(frozen=True)
class Reference:
    """A model that a config names: a path, and that of an adapter to fold into it, or None."""

    path: str
    adapter: str | None = None


class _ModelSection(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: StrictStr | dict[str, Any]
    parameters: dict[str, Any] | None = None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    merge_method: StrictStr
    models: list[_ModelSection]
    base_model: StrictStr | dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None
    dtype: StrictStr | None = None
    out_dtype: StrictStr | None = None


def unsupported(data: Mapping[str, Any], where: Where) -> list[str]:
    """Return a problem for each key of mergekit's language that pymerge does not know yet."""
    return [
        f"{where((key,))}: not supported yet: {what}; remove the key"
        for key, what in _UNSUPPORTED_KEYS.items()
        if data.get(key) is not None
    ]


def structure_problems(data: Mapping[str, Any], where: Where) -> list[str]:
    """Return what is wrong with the keys and types of a document, parameters aside."""
    rest = {key: value for key, value in data.items() if key not in _UNSUPPORTED_KEYS}
    # slices and modules stand in the place of models, and are refused by name already
    replaced = data.get("slices") is not None or data.get("modules") is not None
    problems: list[str] = []
    try:
        _Document.model_validate(rest)
    except ValidationError as error:
        seen: set[YamlPath] = set()
        for problem in error.errors():
            path = _yaml_path(problem["loc"])
            if path in seen or (replaced and path == ("models",) and problem["type"] == "missing"):
                continue
            seen.add(path)
            problems.append(_structure_problem(path, problem["type"], problem["input"], where))
    return problems


def _structure_problem(path: YamlPath, kind: str, got: Any, where: Where) -> str:
    last = path[-1]
    if kind == "extra_forbidden":
        in_model = path[0] == "models" and len(path) > 1
        known = list((_ModelSection if in_model else _Document).model_fields)
        if any(spec.parameter(str(last)) for spec in METHODS.values()):
            return f"{where(path)}: '{last}' is a parameter; put it under 'parameters:'"
        return (
            f"{where(path)}: unknown key '{last}'{nearest(str(last), known)} "
            f"(known: {', '.join(known)})"
        )
    if kind == "missing":
        return f"{where(path[:-1])}: '{last}' is missing; expected {_EXPECTED[last]}"
    expected = _EXPECTED.get(last, "{model: ..., parameters: ...}")
    return f"{where(path)}: expected {expected}, got {shown(got)}"


def _yaml_path(location: tuple[str | int, ...]) -> YamlPath:
    """Drop what pydantic adds to a location to name the member of a union."""
    path: list[str | int] = []
    for part in location:
        if part == "str" or (isinstance(part, str) and part.startswith("dict[")):
            break
        path.append(part)
    return tuple(path)


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
        path: where it stands in the document.
    """
    if isinstance(value, Mapping):
        return _read_reference_mapping(value, path, where, problems)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        problems.append(f"{where(path)}: expected the path of a model, got {shown(value)}")
        return None
    # "model+lora" and "model@revision" are mergekit's; a directory really called so is taken as it
    # is.
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
    """Split MODEL+ADAPTER: at the first "+" before which there is a model, else at the first."""
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


def dotted(path: YamlPath) -> str:
    """Return a path as people write it: `models[0].parameters.weight`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "config"
