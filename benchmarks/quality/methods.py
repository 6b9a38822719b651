"""The methods that the suites compare: their settings, and how each merges the fine-tunes.

Every method that has a coefficient is tried with SETTINGS settings of it on validation data; one of
them is the one that its paper or its code recommends without a search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import pymerge

__all__ = ["METHODS", "SETTINGS", "Method", "Models", "NotAvailable", "State", "available"]

State = dict[str, torch.Tensor]
Statistics = Callable[[str], Sequence[Any]]
SETTINGS = 5


class NotAvailable(Exception):
    """A function of pymerge that this version does not have."""


@dataclass(frozen=True)
class Models:
    """The models to merge.

    `statistics(kind)` returns the Fisher information ("fisher") or the Gram matrices ("gram") of
    the models, `adapt(**settings)` the state that AdaMerging learns; both are costly and cached.
    `ridge` is RegMean's, above 0 if inputs of a layer are 0 in every example. `kept` is for values
    that a method needs again.
    """

    base: State
    tuned: Sequence[State]
    statistics: Statistics
    adapt: Callable[..., State]
    seed: int = 0
    ridge: float = 0.0
    kept: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    `make(models, value)` returns a state dict, or one for each task if `per_task`. `values` are the
    settings of the coefficient `symbol`; `default` is the recommended one. `data`: what it needs of
    the models besides their weights.
    """

    key: str
    label: str
    make: Callable[[Models, float], State | list[State]]
    symbol: str = ""
    values: tuple[float, ...] = (1.0,)
    default: float = 1.0
    per_task: bool = False
    data: str = ""

    def __post_init__(self) -> None:
        if self.default not in self.values or len(self.values) not in (1, SETTINGS):
            raise ValueError(f"{self.key}: {self.default} of {self.values}")


def available(name: str) -> Any:
    """Return a function or class of pymerge.

    Raises:
        NotAvailable: this version does not have it.
    """
    found = getattr(pymerge, name, None)
    if found is None:
        raise NotAvailable(f"pymerge.{name}")
    return found


Make = Callable[["Models", float], "State | list[State]"]


def _merged(method: str, **fixed: Any) -> Make:
    def make(models: Models, value: float) -> State:
        return pymerge.merge(method, models.base, models.tuned, scale=value, **fixed)

    return make


def _dare(method: str, **fixed: Any) -> Make:
    def make(models: Models, value: float) -> State:
        return pymerge.merge(
            method, models.base, models.tuned, scale=value, seed=models.seed, **fixed
        )

    return make


def _emr(models: Models, value: float) -> list[State]:
    count = len(models.tuned)
    return [pymerge.emr(models.base, models.tuned, task=number) for number in range(count)]


def _tall(models: Models, value: float) -> list[State]:
    return [
        pymerge.tall_masks(models.base, models.tuned, task=number, threshold=value)
        for number in range(len(models.tuned))
    ]


def _fisher(models: Models, value: float) -> State:
    merge = available("fisher_merge")
    merged = merge(models.tuned, models.statistics("fisher"))
    # the method has no coefficient: as for the others, the step away from the base is scaled
    return pymerge.merge("task_arithmetic", models.base, [merged], scale=value)


def _tsv_m(models: Models, value: float) -> State:
    # minutes for a language model, and the scale only stretches the step away from the base
    if "tsv_m" not in models.kept:
        models.kept["tsv_m"] = pymerge.merge("tsv_m", models.base, models.tuned)
    return pymerge.merge("task_arithmetic", models.base, [models.kept["tsv_m"]], scale=value)


def _regmean(models: Models, value: float) -> State:
    # 1, no reduction at all, is not among the settings: the rows that a layer sees are outputs of a
    # LayerNorm, which are linearly dependent
    merge = available("regmean_merge")
    grams = models.statistics("gram")
    return merge(models.tuned, grams, off_diagonal=value, ridge=models.ridge)


def _adamerging(granularity: str, trimmed: bool) -> Make:
    def make(models: Models, value: float) -> State:
        available("AdaMerging")
        return models.adapt(granularity=granularity, trimmed=trimmed, init=0.3, steps=int(value))

    return make


def _average(models: Models, value: float) -> State:
    return pymerge.merge("linear", None, models.tuned)


_SUM = (0.1, 0.2, 0.3, 0.4, 0.6)
# sums are shorter where disagreeing values are left out
_ELECTED_SUM = (0.2, 0.3, 0.4, 0.6, 0.9)
_MEAN = (0.7, 1.0, 1.4, 2.0, 2.8)
_STEPS = (10, 20, 40, 70, 100)
_PCB: Mapping[str, str] = {
    "paper": "PCB, paper",
    "root": "PCB, code (root)",
    "vision": "PCB, code (vision)",
    "vision_es": "PCB, code (vision ES)",
    "nlp": "PCB, code (nlp)",
}

METHODS: tuple[Method, ...] = (
    Method("averaging", "averaging", _average),
    Method("fisher", "Fisher", _fisher, "scale", _MEAN, 1.0, data="fisher"),
    Method(
        "regmean", "RegMean", _regmean, "off-diagonal", (0.1, 0.5, 0.8, 0.9, 0.95), 0.9, data="gram"
    ),
    Method("task_arithmetic", "task arithmetic", _merged("task_arithmetic"), "lambda", _SUM, 0.4),
    Method("ties", "TIES, mean", _merged("ties", density=0.2), "lambda", _MEAN, 1.0),
    Method(
        "ties_sum",
        "TIES, sum",
        _merged("ties", density=0.2, semantics="adamerging"),
        "lambda",
        _ELECTED_SUM,
        0.3,
    ),
    Method("dare", "DARE", _dare("dare_linear", density=0.5), "lambda", _SUM, 0.3),
    Method(
        "dare_ties",
        "DARE + TIES",
        _dare("dare_ties", density=0.5, trim=0.2, trim_scope="global"),
        "lambda",
        _ELECTED_SUM,
        0.3,
    ),
    *(
        Method(f"pcb_{variant}", label, _merged("pcb", variant=variant), "lambda", _MEAN, 1.0)
        for variant, label in _PCB.items()
    ),
    Method("consensus", "Consensus TA", _merged("consensus_ta"), "lambda", _SUM, 0.3),
    Method("tsv_m", "TSV-M", _tsv_m, "lambda", (0.4, 0.7, 1.0, 1.4, 2.0), 1.0),
    *(
        Method(
            f"ada_{granularity}{'_pp' if trimmed else ''}",
            f"AdaMerging{'++' if trimmed else ''}, {granularity}s",
            _adamerging(granularity, trimmed),
            "steps",
            _STEPS,
            _STEPS[-1],
        )
        for granularity in ("task", "layer")
        for trimmed in (False, True)
    ),
    Method("emr", "EMR", _emr, per_task=True),
    Method("tall", "TALL masks", _tall, "threshold", (0.2, 0.3, 0.4, 0.5, 0.6), 0.4, per_task=True),
)
