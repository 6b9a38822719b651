"""Decides which tensors of a checkpoint an adapter can change, and names their modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pymerge.checkpoint import TensorInfo
from pymerge.checkpoint.peft.adapter import Kind
from pymerge.dtypes import FLOATS
from pymerge.errors import RequestError

__all__ = ["Chooser", "shortest", "task_type"]

_EMBEDDING = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared)\.weight$|relative_attention_bias")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|score|classifier|cls|pooler)\.")
# Classes of transformers whose Conv1D weights are [in, out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

Targets = str | Sequence[str] | None


class Chooser:
    """Decides which weights become modules of a LoRA."""

    def __init__(
        self,
        modules: Targets,
        exclude: Targets,
        config: Mapping[str, Any] | None,
        fan_in_fan_out: bool | None,
    ) -> None:
        """
        Args:
            modules: as target_modules in PEFT: last parts of names, or a regular expression that
                matches the whole name; None for all matrices except embeddings and heads.
            exclude: modules to leave out, in the same form.
            config: config.json of the model.
            fan_in_fan_out: whether weights are [in, out]; None to decide by the config.
        """
        self._modules = modules
        self._exclude = exclude
        self._conv1d = (config or {}).get("model_type") in _CONV1D_MODELS
        self._transposed = fan_in_fan_out
        for name, targets in (("modules", modules), ("exclude", exclude)):
            if isinstance(targets, str):
                try:
                    re.compile(targets)
                except re.error as error:
                    raise RequestError(
                        f"extract_lora: {name}: expected names, or a regular expression, got "
                        f"{targets!r}: {error}"
                    ) from None

    def kind(self, info: TensorInfo) -> Kind | None:
        """Return the kind of module that has this tensor as its weight, or None."""
        if len(info.shape) != 2 or info.numel == 0 or info.dtype not in FLOATS:
            return None
        if not info.name.endswith(".weight"):
            return None
        module = info.name.removesuffix(".weight")
        if self._exclude is not None and _among(module, self._exclude):
            return None
        embedding = _EMBEDDING.search(info.name) is not None
        if self._modules is None:
            left_out = embedding or _HEAD.search(info.name) is not None
            return None if left_out else "linear"
        if not _among(module, self._modules):
            return None
        return "embedding" if embedding else "linear"

    def transposed(self, name: str) -> bool:
        """Return whether a linear module's weight is [in, out]."""
        if self._transposed is not None:
            return self._transposed
        return self._conv1d and _CONV1D.search(name) is not None


def _among(module: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def shortest(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return names that match these modules and none of the others: last parts if possible."""
    modules = set(modules)
    taken = {name.rpartition(".")[2] for name in others}
    return sorted(
        {
            name.rpartition(".")[2] if name.rpartition(".")[2] not in taken else name
            for name in modules
        }
    )


def task_type(config: Mapping[str, Any] | None) -> str | None:
    """Return PEFT's name for the task of a config's architecture, or None."""
    for architecture in (config or {}).get("architectures") or ():
        for ending, task in _TASKS.items():
            if isinstance(architecture, str) and architecture.endswith(ending):
                return task
    return None
