"""The model card: a README.md that describes what was merged and how, in the hub's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pymerge.config import MergeConfig

__all__ = ["model_card"]


def model_card(
    name: str,
    config: MergeConfig,
    *,
    version: str,
    side_files: Sequence[str] = (),
    search: Mapping[str, Any] | None = None,
) -> str:
    """Return the README.md of a merged model.

    Args:
        name: of the model, usually that of its directory.
        config: the configuration that was merged.
        version: of pymerge.
        side_files: names of the files copied beside the weights; if config.json is among them, it
            is a model of the transformers library.
        search: how the coefficients were chosen; see `pymerge.search`.
    """
    method = config.method
    metadata: dict[str, object] = {}
    if "config.json" in side_files:
        metadata["library_name"] = "transformers"
    metadata["tags"] = ["merge", "pymerge"]
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    models = "\n".join(
        f"* {_code(_shown_model(entry.path, entry.adapter))}" for entry in config.models
    )
    base = ""
    if config.base_model is not None and method.with_base(True):
        base = f" with {_code(_shown_model(config.base_model, config.base_adapter))} as the base"
    # a fence longer than any in the text
    ticks = max((len(run) for run in re.findall(r"`{3,}", config.text)), default=2) + 1
    fence = "`" * max(ticks, 3)
    text = config.text if config.text.endswith("\n") else config.text + "\n"
    return f"""---
{front}---
# {_escape(name)}

A merge of models made with pymerge {version}.

## Method

[{method.title}]({method.url}){base}: {method.summary}

    {method.formula}

{method.source}.

## Models

{models}
{"" if search is None else _searched(search)}
## Configuration

{fence}yaml
{text}{fence}
"""


def _shown_model(path: str, adapter: str | None) -> str:
    return _shown(path) if adapter is None else f"{_shown(path)}+{_shown(adapter)}"


def _searched(search: Mapping[str, Any]) -> str:
    data = search["data"]
    shown = _code(data["name"])
    if data.get("hash"):
        shown += f" (sha256 {_code(data['hash'])})"
    text = (
        f"\n## Coefficients\n\nChosen by pymerge search ({_escape(search['sampler'])}, "
        f"{search['evaluations']} evaluations, seed {search['seed']}): the best value of "
        f"{_code(search['metric'])}, {search['value']:.6g} ({search['direction']}), on the data "
        f"{shown}. Results on this data are no estimate of results on other data.\n"
    )
    if search["allow_test_split"]:
        text += "\n`allow_test_split` was set: the data may be test data.\n"
    return text


def _shown(path: str) -> str:
    """Return a path without the directories of the machine on which it was merged."""
    return Path(path).name if Path(path).is_absolute() else path


def _code(text: str) -> str:
    """Return text as inline code, whatever backticks and line breaks it contains."""
    text = " ".join(text.split())
    ticks = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", " ".join(text.split()))
