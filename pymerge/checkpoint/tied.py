"""Finds the output embedding that a checkpoint leaves out because it is tied to the input's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["tied_aliases"]

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_BODIES = ("model", "transformer", "gpt_neox", "backbone")


def tied_aliases(names: Iterable[str], config: dict[str, Any] | None) -> dict[str, str]:
    """Return {name of the missing output embedding: the input embedding it equals}, or {}.

    Args:
        names: of the checkpoint's tensors.
        config: config.json, if there is one; only a true `tie_word_embeddings` in it (or in its
            `text_config`) creates an alias.
    """
    if config is None or not _says_tied(config):
        return {}
    names = list(names)
    if any(_ends_in(name, _HEAD) for name in names):
        return {}
    embeddings = [name for name in names if any(_ends_in(name, e) for e in _EMBEDDINGS)]
    if len(embeddings) != 1:
        return {}
    # language_model.model.embed_tokens.weight belongs to language_model.lm_head.weight, but
    # model.language_model.embed_tokens.weight to lm_head.weight: the head lies beside the body.
    parts = embeddings[0].split(".")
    body = next((i for i, part in enumerate(parts) if part in _BODIES), 0)
    return {".".join([*parts[:body], _HEAD]): embeddings[0]}


def _says_tied(config: dict[str, Any]) -> bool:
    inner = config.get("text_config")
    return config.get("tie_word_embeddings") is True or (
        isinstance(inner, dict) and inner.get("tie_word_embeddings") is True
    )


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
