"""Resolves the parameters of every tensor, checks them together, and counts what is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pymerge.config import MergeConfig, TensorParameters, layer_depths
from pymerge.engine.select import most_passes
from pymerge.engine.steps import MERGE, Step
from pymerge.errors import RequestError
from pymerge.methods import MethodSpec

__all__ = ["StepCounter", "passes_text", "resolve_parameters", "unused_filters"]


def resolve_parameters(
    config: MergeConfig, names: Sequence[str], problems: list[str]
) -> dict[str, TensorParameters]:
    """Resolve the parameters of the named tensors, and check them together.

    Args:
        config: the configuration.
        names: the tensors that are computed (not copied).
        problems: gets the problems: weights that sum to 0, details of a dialect that contradict
            each other, a required parameter that is not set.
    """
    resolved: dict[str, TensorParameters] = {}
    cancelling: dict[tuple[float, ...], list[str]] = {}
    depths = layer_depths(names)
    for name in names:
        try:
            parameters = config.resolve(name, depths.get(name, 0.0))
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
    """Return a warning for each filter that matches no tensor's name."""
    warnings: list[str] = []
    for clause in config.clauses():
        if clause.filter is not None and not any(clause.matches(name) for name in names):
            warnings.append(f"{clause.where}: the filter '{clause.filter}' matches no tensor")
    return warnings


class StepCounter:
    """Counts what a merge reads, from the steps that the method's record names.

    Attributes:
        total: computed elements of the whole model.
    """

    def __init__(self, method: MethodSpec, total: int) -> None:
        self.method = method
        self.total = total

    def steps(self, parameters: TensorParameters, numel: int) -> tuple[Step, ...]:
        """Return the steps of a tensor with this many elements, the merge last."""
        return self.method.steps(parameters, numel, self.total)

    def passes(self, parameters: TensorParameters, numel: int) -> int:
        """Return how often a tensor's inputs are normally read."""
        return sum(step.passes for step in self._over(parameters, numel, statistics=False))

    def most_passes(self, parameters: TensorParameters, numel: int, wide: bool) -> int:
        """Return how often a tensor's inputs are read in the worst case."""
        steps = self._over(parameters, numel, statistics=False)
        return sum(_most(step, wide) for step in steps)

    def statistics_passes(self, parameters: TensorParameters, numel: int) -> int:
        """Return how often the statistics of a tensor are read."""
        return 1 + len(self._over(parameters, numel, statistics=True))

    def selects(self, parameters: TensorParameters, numel: int) -> bool:
        """Return whether a tensor needs an order statistic."""
        return any(step.selects for step in self.steps(parameters, numel))

    def _over(self, parameters: TensorParameters, numel: int, statistics: bool) -> list[Step]:
        return [step for step in self.steps(parameters, numel) if step.statistics == statistics]


def _most(step: Step, wide: bool) -> int:
    """Return the passes of a step in the worst case."""
    if step.most is not None:
        return step.most
    return most_passes(wide) if step.selects else step.passes


def passes_text(steps: Iterable[tuple[Step, ...]], passes: int, most: int) -> str:
    """Return what a merge reads, in words.

    Args:
        steps: of all computed tensors; they differ if some are trimmed and others are not.
        passes: of the tensor that is normally read most often.
        most: of the same tensor in the worst case.
    """
    all_steps = {step.name: step for own in steps for step in own}
    before = [step for step in all_steps.values() if step.name != MERGE.name]
    if any(step.statistics for step in before):
        words = ", ".join(step.words for step in before)
        return f"1, and one over the statistics before it: their {words}"
    if not before:
        return "1: read, merge and write in one go"
    words = ", ".join(
        step.words + (f" ({step.passes} times)" if step.passes > 1 else "") for step in before
    )
    rarely = f"; at most {most}" if most > passes else ""
    return f"{passes}: {words}, then the merge{rarely}"
