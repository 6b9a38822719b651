"""The content of adapter_config.json, checked; unsupported options are refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pymerge.checkpoint.problems import Problems
from pymerge.errors import nearest, shown

__all__ = ["Settings", "matches"]

CONFIG = "adapter_config.json"
_TYPES = ("LORA", "IA3")
_LARGEST = 3.4028234663852886e38  # of float32
# Options of LoRA that do more to a weight than base + scaling * B A.
_REFUSED = {
    "use_dora": "DoRA (weight-decomposed LoRA)",
    "lora_bias": "a bias in lora_B",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA, which depends on the prompt",
    "arrow_config": "Arrow routing, which depends on the input",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that subtract something from the base model: the adapter belongs to a base other
# than the one that its config names.
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def matches(pattern: str, module: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern matches a module, as in PEFT."""
    return re.match(_whole(pattern), module) is not None


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _regex_error(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


class Settings:
    """The part of a config that decides what an adapter computes."""

    def __init__(self, config: Mapping[str, Any], problems: Problems) -> None:
        self.config = config
        self.peft_type = config.get("peft_type")
        self.transposed = self._flag("fan_in_fan_out", problems)
        self.rslora = self._flag("use_rslora", problems)
        self._ranks: dict[str, Any] = {}
        self._alphas: dict[str, Any] = {}
        if self.peft_type not in _TYPES:
            got = shown(self.peft_type)
            problems.add(
                CONFIG,
                f"peft_type: expected one of {', '.join(_TYPES)}, got {got}"
                f"{nearest(str(self.peft_type), _TYPES)}; other kinds of adapters are not "
                "supported",
            )
        elif self.peft_type == "LORA":
            self._read_lora(problems)
        else:
            self._read_ia3(problems)

    def _flag(self, key: str, problems: Problems) -> bool:
        value = self.config.get(key, False)
        if not isinstance(value, bool):
            problems.add(CONFIG, f"{key}: expected true or false, got {shown(value)}")
        return value is True

    def _read_lora(self, problems: Problems) -> None:
        for key, what in _REFUSED.items():
            if self.config.get(key):
                problems.add(CONFIG, f"{key}: not supported: {what}")
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MUTATING):
            problems.add(
                CONFIG,
                f"init_lora_weights: not supported: {start!r} changes the base model; save the "
                "adapter converted to plain LoRA (PEFT: "
                "save_pretrained(path_initial_model_for_weight_conversion=...))",
            )
        self._check_number("r", self.config.get("r"), problems, whole=True)
        self._check_number("lora_alpha", self.config.get("lora_alpha"), problems)
        self._ranks = self._pattern("rank_pattern", problems, whole=True)
        self._alphas = self._pattern("alpha_pattern", problems)

    def _read_ia3(self, problems: Problems) -> None:
        chosen = self.config.get("feedforward_modules")
        if isinstance(chosen, str):
            error = _regex_error(chosen)
            if error is not None:
                text = f"feedforward_modules: {chosen!r} is no regular expression: {error}"
                problems.add(CONFIG, text)
        elif chosen is not None and not (
            isinstance(chosen, list) and all(isinstance(one, str) for one in chosen)
        ):
            problems.add(
                CONFIG,
                f"feedforward_modules: expected names or a regular expression, got {shown(chosen)}",
            )

    def _check_number(
        self, key: str, value: Any, problems: Problems, *, whole: bool = False
    ) -> bool:
        kinds = int if whole else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if fits and (value >= 1 if whole else abs(value) <= _LARGEST):
            return True
        expected = "a whole number of at least 1" if whole else "a number"
        problems.add(CONFIG, f"{key}: expected {expected}, got {shown(value)}")
        return False

    def _pattern(self, key: str, problems: Problems, *, whole: bool = False) -> dict[str, Any]:
        found = self.config.get(key)
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            problems.add(
                CONFIG, f"{key}: expected an object of module -> number, got {shown(found)}"
            )
            return {}
        kept: dict[str, Any] = {}
        for pattern, value in found.items():
            # Of a pattern that begins with flags, only the whole that PEFT makes of it is none.
            error = _regex_error(pattern) or _regex_error(_whole(pattern))
            if error is not None:
                problems.add(CONFIG, f"{key}[{pattern!r}]: is no regular expression: {error}")
                continue
            if self._check_number(f"{key}[{pattern!r}]", value, problems, whole=whole):
                kept[pattern] = value
        return kept

    def rank(self, module: str) -> int:
        """Return the rank that the config assigns to a module."""
        return self._of(self._ranks, module, self.config["r"])

    def scaling(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        alpha = self._of(self._alphas, module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        return next((value for key, value in patterns.items() if matches(key, module)), default)

    def is_feedforward(self, module: str) -> bool:
        """Return whether IA3 rescales the module's input, as PEFT decides it."""
        chosen = self.config.get("feedforward_modules")
        if isinstance(chosen, str):
            return re.fullmatch(chosen, module) is not None
        return isinstance(chosen, Iterable) and any(module.endswith(str(key)) for key in chosen)

    def untouched(self, modules: Iterable[str]) -> list[str]:
        """Return the targets that are listed by name but have no module."""
        targets = self.config.get("target_modules")
        if not isinstance(targets, list):
            return []
        names = list(modules)
        return [
            target
            for target in targets
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
