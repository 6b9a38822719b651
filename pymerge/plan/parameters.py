"""Resolves the parameters of every tensor, checks them together, and counts passes."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.config import MergeConfig, TensorParameters
from pymerge.errors import RequestError
from pymerge.methods.ties import TiesRule, trim_target

__all__ = ["PassCounter", "resolve_parameters", "unused_filters"]

# Methods whose `normalize` divides by the plain sum of the weights.
_DIVIDE_BY_WEIGHTS = ("linear", "task_arithmetic")


def resolve_parameters(
    config: MergeConfig, names: Sequence[str], problems: list[str]
) -> dict[str, TensorParameters]:
    """Resolve the parameters of the named tensors, and check them together.

    Args:
        config: the configuration.
        names: the tensors that are computed (not copied).
        problems: gets what is wrong: weights that sum to 0, details of a dialect that contradict
            each other, a required parameter that is not set.
    """
    resolved: dict[str, TensorParameters] = {}
    cancelling: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        try:
            parameters = config.resolve(name)
            if config.method.name == "ties":
                TiesRule.of(parameters, config.where)
        except RequestError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        resolved[name] = parameters
        if config.method.name in _DIVIDE_BY_WEIGHTS and parameters["normalize"]:
            weights = parameters["weight"]
            if abs(sum(weights)) < 1e-8:
                cancelling.setdefault(tuple(weights), []).append(name)
    for weights, tensors in cancelling.items():
        models = ", ".join(
            f"{entry.name} {weight:g}" for entry, weight in zip(config.models, weights, strict=True)
        )
        more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
        problems.append(
            f"{config.where}: the weights sum to 0 for '{tensors[0]}'{more} ({models}), and "
            f"{config.method.name} with normalize: true divides by the sum; change the weights or "
            "set normalize: false"
        )
    return resolved


def unused_filters(config: MergeConfig, names: Sequence[str]) -> list[str]:
    """Return a warning for each filter that is in no tensor's name."""
    warnings: list[str] = []
    for clause in config.clauses():
        if clause.filter is not None and not any(clause.matches(name) for name in names):
            warnings.append(f"{clause.where}: the filter '{clause.filter}' matches no tensor")
    return warnings


class PassCounter:
    """Tells how often a tensor's inputs are read.

    A merge is one pass. TIES reads once before it where its trim needs an order statistic of
    |delta| (over the tensor or the whole model), and once more where a zero vote takes the majority
    sign of its tensor. The majority of a whole model is guessed from a sample and seen in the merge
    itself, which is repeated in the rare case that the guess was wrong and mattered: that is not
    counted.
    """

    def __init__(self, config: MergeConfig, numel: int) -> None:
        self.config = config
        self.numel = numel  # computed elements of the whole model

    def passes(self, parameters: TensorParameters, numel: int) -> int:
        """Return the number of passes over a tensor of that many elements."""
        return 1 + self.selects(parameters, numel) + self._votes_first(parameters)

    def selects(self, parameters: TensorParameters, numel: int) -> bool:
        """Return whether a trim needs an order statistic."""
        if self.config.method.name != "ties":
            return False
        rule = TiesRule.of(parameters, self.config.where)
        total = self.numel if rule.scope == "global" else numel
        return any(
            trim_target(rule, density, total).keep == "rank" for density in parameters["density"]
        )

    def _votes_first(self, parameters: TensorParameters) -> bool:
        if self.config.method.name != "ties" or not parameters:
            return False
        rule = TiesRule.of(parameters, self.config.where)
        return rule.scope == "tensor" and rule.zero.startswith("majority")

    def text(self, parameters: TensorParameters, selects: bool) -> str:
        """Explain the passes of the whole merge in words.

        Args:
            parameters: of any computed tensor; the dialect is the same for all.
            selects: whether any tensor is trimmed.
        """
        steps: list[str] = []
        if selects:
            scope = TiesRule.of(parameters, self.config.where).scope
            over = "over the whole model" if scope == "global" else "in each tensor that is trimmed"
            steps.append(f"the thresholds of |delta| {over}")
        if self._votes_first(parameters):
            steps.append("the majority sign of each tensor")
        if not steps:
            return "1: read, merge and write in one go"
        return f"{len(steps) + 1}: {', '.join(steps)}, then the merge"
