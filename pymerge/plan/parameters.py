"""Resolves the parameters of every tensor, checks them together, and counts passes."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.config import MergeConfig, TensorParameters, layer_depths
from pymerge.errors import RequestError
from pymerge.methods.sparse.record import band_counts
from pymerge.methods.statistics.record import fisher_rule
from pymerge.methods.ties.record import TiesRule, trim_target

__all__ = ["PassCounter", "passes_over_statistics", "resolve_parameters", "unused_filters"]

_GEOMETRY = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")


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
    depths = layer_depths(names)
    for name in names:
        try:
            parameters = config.resolve(name, depths.get(name, 0.0))
            if config.method.name == "ties":
                TiesRule.of(parameters, config.where)
            if config.method.for_tensor is not None:
                parameters = config.method.for_tensor(parameters, name)
        except RequestError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        resolved[name] = parameters
        if config.method.check is not None:
            found = [f"{config.where}: {text}" for text in config.method.check(parameters)]
            problems += [problem for problem in found if problem not in problems]
        weights = config.method.cancelling(parameters)
        if weights is not None:
            cancelling.setdefault(tuple(weights), []).append(name)
    for weights, tensors in cancelling.items():
        models = ", ".join(
            f"{entry.name} {weight:g}" for entry, weight in zip(config.models, weights, strict=True)
        )
        more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
        problems.append(
            f"{config.where}: the weights sum to 0 for '{tensors[0]}'{more} ({models}), and "
            f"{config.method.name} with {config.method.divides}: true divides by the sum; change "
            f"the weights or set {config.method.divides}: false"
        )
    return resolved


def unused_filters(config: MergeConfig, names: Sequence[str]) -> list[str]:
    """Return a warning for each filter that is in no tensor's name."""
    warnings: list[str] = []
    for clause in config.clauses():
        if clause.filter is not None and not any(clause.matches(name) for name in names):
            warnings.append(f"{clause.where}: the filter '{clause.filter}' matches no tensor")
    return warnings


def passes_over_statistics(config: MergeConfig, parameters: TensorParameters) -> int:
    """Return how often the statistics of a tensor are read."""
    if config.method.name == "regmean":
        return 2
    if config.method.name != "fisher":
        return 1
    return 1 if fisher_rule(parameters).normalize == "none" else 2


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
        first = self.selects(parameters, numel) + self._votes_first(parameters)
        if self.config.method.name == "pcb":
            return 4
        if self.config.method.name == "sce":
            return 4 if first else 2
        if self.config.method.name == "arcee_fusion":
            return 4 if first else 1
        return 1 + first + self._adds_up(parameters)

    def _adds_up(self, parameters: TensorParameters) -> bool:
        """Return whether norms or dot products come first."""
        method = self.config.method.name
        if method == "emr":
            return parameters["task"] is not None
        if method == "ramplus_tl":
            return True
        streamed = method.startswith(("dare", "della"))
        return method in _GEOMETRY or (streamed and parameters["rescale"] == "l1")

    def selects(self, parameters: TensorParameters, numel: int) -> bool:
        """Return whether a trim needs an order statistic."""
        method = self.config.method.name
        if method == "pcb":
            return True
        if method == "sce":
            return parameters["select_topk"] < 1.0
        if method == "arcee_fusion":
            return parameters["semantics"] == "exact"
        if method == "dare_ties":
            return parameters["trim"] is not None
        if method in ("breadcrumbs", "breadcrumbs_ties"):
            if parameters["scope"] == "row":
                return False
            pairs = zip(parameters["density"], parameters["gamma"], strict=True)
            return any(band_counts(numel, *pair) != (0, 0) for pair in pairs)
        if method != "ties" and "weighting" not in parameters:
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
        method = self.config.method.name
        if self.config.method.statistics is not None and parameters:
            if passes_over_statistics(self.config, parameters) == 1:
                return "1: read, merge and write in one go"
            what = "sums of Gram matrices" if method == "regmean" else "norms"
            return f"1, and one over the statistics before it: their {what}"
        if method == "pcb":
            return "4: two for the statistics of task vectors, one for scores, then the merge"
        if method == "sce":
            selection = "two for the selection, " if selects else ""
            return f"{4 if selects else 2}: {selection}one for the weights, then the merge"
        if method == "arcee_fusion" and selects:
            return "4: one for the divergence of each row, two for the threshold, then the merge"
        if selects:
            scope = "tensor"
            if method in ("ties", "adamerging"):
                scope = TiesRule.of(parameters, self.config.where).scope
            elif method == "dare_ties":
                scope = str(parameters["trim_scope"])
            over = "over the whole model" if scope == "global" else "in each tensor that is trimmed"
            steps.append(f"the thresholds of |delta| {over}")
        if self._votes_first(parameters):
            steps.append("the majority sign of each tensor")
        if self._adds_up(parameters):
            counts = method == "ramplus_tl"
            what = "counts of what changed in" if counts else "norms and dot products of"
            steps.append(f"{what} each tensor")
        if not steps:
            return "1: read, merge and write in one go"
        return f"{len(steps) + 1}: {', '.join(steps)}, then the merge"
