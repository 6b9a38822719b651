"""TIES: its record, and the dialects in which codes and papers disagree.

A dialect (`semantics=`) determines how many elements a trim keeps, over which scope, how signs are
elected, what a zero sum elects, what is summed and what it is divided by. `TiesRule` is one fully
resolved choice; the engine and the kernels see nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pymerge.engine.steps import MERGE, Step
from pymerge.engine.trim import TrimTarget
from pymerge.errors import RequestError, nearest
from pymerge.methods.parameters import INT8_MASK, NAN, NO_RESCALE, SCALE, WEIGHT
from pymerge.methods.spec import MethodSpec, Parameter

__all__ = ["RECORDS", "SEMANTICS", "TiesRule", "ties_reads", "ties_rule", "trim_target"]

Count = Literal["official", "mergelm", "mergekit", "peft", "sd_mecha"]


@dataclass(frozen=True)
class TiesRule:
    """One resolved dialect of TIES.

    scope: "global" trims all parameters of a task vector together, "tensor" each tensor alone.
    count: whose arithmetic turns density into a number of elements.
    exact_k: True keeps exactly that many (among equal magnitudes, the lowest flat index first);
        False keeps every element at or above the threshold.
    elect: "mass" takes the sign of the sum, "count" the sign of the sum of signs.
    zero: what a zero sum elects: "majority" (the sign of the sum of all elected signs over the
        scope, 0 acting as negative), "majority_or_drop" (the same, but 0 keeps nothing),
        "positive", or "drop".
    weighting: "before" scales the trimmed task vectors before the election, "after" only what is
        summed.
    merge: "mean", "sum" or "max" (largest magnitude) over the models that agree with the elected
        sign.
    divisor: "count" of the agreeing models, or the sum of their "weights"; used by "mean" only.
    """

    scope: Literal["global", "tensor"]
    count: Count
    exact_k: bool
    elect: Literal["mass", "count"]
    zero: Literal["majority", "majority_or_drop", "positive", "drop"]
    weighting: Literal["before", "after"]
    merge: Literal["mean", "sum", "max"]
    divisor: Literal["count", "weights"]

    @classmethod
    def of(cls, parameters: Mapping[str, Any], where: str) -> TiesRule:
        """Return the dialect that resolved parameters of `ties` describe."""
        overrides = ("scope", "merge", "exact_k", "elect", "normalize")
        rule = ties_rule(
            parameters["semantics"], **{name: parameters[name] for name in overrides}, where=where
        )
        return replace(rule, weighting=parameters.get("weighting", rule.weighting))


_OFFICIAL = TiesRule("global", "official", False, "mass", "majority", "before", "mean", "count")

SEMANTICS: dict[str, TiesRule] = {
    "official": _OFFICIAL,
    "adamerging": replace(_OFFICIAL, merge="sum"),
    "fusionbench": replace(_OFFICIAL, merge="sum"),
    "mergelm": replace(_OFFICIAL, count="mergelm", zero="majority_or_drop"),
    "mergekit": TiesRule(
        "tensor", "mergekit", True, "mass", "positive", "before", "mean", "weights"
    ),
    "peft": TiesRule("tensor", "peft", True, "mass", "positive", "after", "mean", "count"),
    "sd_mecha": TiesRule("tensor", "sd_mecha", False, "count", "drop", "before", "mean", "count"),
}


def ties_rule(
    semantics: str,
    *,
    scope: str | None = None,
    merge: str | None = None,
    exact_k: bool | None = None,
    elect: str | None = None,
    normalize: bool | None = None,
    where: str = "ties_merge",
) -> TiesRule:
    """Return a dialect with the details that override it.

    Raises RequestError for an unknown name, and if `normalize` (mergekit's word: true is "mean",
    false is "sum") contradicts `merge`.
    """
    if semantics not in SEMANTICS:
        known = ", ".join(SEMANTICS)
        hint = nearest(semantics, SEMANTICS)
        raise RequestError(f"{where}: semantics must be one of {known}; got {semantics!r}{hint}")
    rule = SEMANTICS[semantics]
    if normalize is not None:
        implied = "mean" if normalize else "sum"
        if merge is not None and merge != implied:
            raise RequestError(
                f"{where}: normalize={str(normalize).lower()} means merge={implied!r}, but "
                f"merge={merge!r} was given too; give one of the two"
            )
        merge = implied
    for name, value, known_values in (
        ("scope", scope, ("global", "tensor")),
        ("merge", merge, ("mean", "sum", "max")),
        ("elect", elect, ("mass", "count")),
    ):
        if value is not None and value not in known_values:
            raise RequestError(
                f"{where}: {name} must be one of {', '.join(known_values)}; got {value!r}"
                f"{nearest(value, known_values)}"
            )
    changes = {"scope": scope, "merge": merge, "exact_k": exact_k, "elect": elect}
    return replace(rule, **{name: value for name, value in changes.items() if value is not None})


def trim_target(rule: TiesRule, density: float, total: int) -> TrimTarget:
    """Return the order statistic to which the dialect's own code would turn a density.

    The products are computed in double precision and truncated, as the codes do: `int(total *
    density)` and `int(total * (1 - density))` differ for some sizes. Where a code would fail
    (official and MergeLM at density 1), everything is kept.
    """
    if total == 0:
        return TrimTarget("all")
    if rule.count in ("mergekit", "peft") and density >= 1.0:
        return TrimTarget("all")
    if rule.count == "official":
        rank = total - int(total * density)
    elif rule.count == "mergelm":
        rank = int(total * (1.0 - density))
    elif rule.count == "sd_mecha":
        if rule.exact_k and density >= 1.0:
            return TrimTarget("all")
        rank = max(int((1.0 - density) * total), 1)
    elif rule.count == "mergekit":
        if density <= 0.0:
            return TrimTarget("none")
        rank = total - max(1, int(density * total)) + 1
    else:
        kept = int(density * total)
        if kept == 0:
            return TrimTarget("none")
        rank = total - kept + 1
    if rule.exact_k and rule.count in ("official", "mergelm", "sd_mecha"):
        rank += 1
        if rank > total:
            return TrimTarget("none")
    if rank <= 0:
        return TrimTarget("all")
    return TrimTarget("rank", rank, rule.exact_k)


def ties_reads(parameters: Mapping[str, Any], numel: int, total: int) -> tuple[Step, ...]:
    """Return what a merge by TIES reads for a tensor.

    Over a whole model, a sample gives a first bracket for the thresholds, and guesses the sign that
    zero votes take. If the sample does not make that sign clear, it is counted first; if it does,
    the merge itself counts, and is repeated in the rare case that the guess was wrong.
    """
    rule = TiesRule.of(parameters, "ties")
    whole = rule.scope == "global"
    scope: Literal["model", "tensor"] = "model" if whole else "tensor"
    targets = [trim_target(rule, d, total if whole else numel) for d in parameters["density"]]
    trims = any(target.keep == "rank" for target in targets)
    votes = rule.zero.startswith("majority")
    over = "over the whole model" if whole else "in each tensor that is trimmed"
    steps = []
    if whole and (trims or votes):
        steps.append(Step("sample", "a sample of all tensors", "model"))
    if trims:
        thresholds = f"the thresholds of |delta| {over}"
        steps.append(Step("thresholds", thresholds, scope, selects=True))
    if votes:
        of = "the whole model" if whole else "each tensor"
        steps.append(Step("signs", f"the majority sign of {of}", scope))
    return (*steps, MERGE._replace(most=2) if whole and votes else MERGE)


def _check(parameters: Mapping[str, Any]) -> list[str]:
    """Return the contradictions of a dialect's details."""
    try:
        TiesRule.of(parameters, "")
    except RequestError as error:
        return [problem.removeprefix(": ") for problem in error.problems]
    return []


TIES = MethodSpec(
    name="ties",
    function="ties_merge",
    run="pymerge.methods.ties.passes:run",
    reads=ties_reads,
    check=_check,
    spans_model=lambda chosen: (
        ties_rule(chosen["semantics"], scope=chosen["scope"]).scope == "global"
    ),
    title="TIES (trim, elect sign, disjoint merge)",
    summary="Keeps each task vector's largest elements, elects signs, merges what agrees.",
    formula=(
        "theta = theta_0 + scale * merge over {k: sgn(t_k) = s} of t_k, "
        "t_k = w_k top_density(theta_k - theta_0), s = sgn(sum_k t_k)"
    ),
    source="Yadav et al., TIES-Merging, 2023",
    url="https://arxiv.org/abs/2306.01708",
    needs_base=True,
    passes="2 (an order statistic of |delta|, then the merge)",
    parameters=(
        WEIGHT,
        Parameter(
            "density",
            "float",
            0.2,
            "Share of each task vector that is kept.",
            scope="model",
            minimum=0.0,
            maximum=1.0,
            default_doc="0.2; 1.0 in YAML with semantics mergekit, as in mergekit",
        ),
        SCALE,
        Parameter(
            "semantics",
            "str",
            "official",
            "Whose TIES: see docs/methods.md.",
            choices=tuple(SEMANTICS),
            per_tensor=False,
            default_doc="official; mergekit in YAML",
        ),
        Parameter(
            "scope",
            "str",
            None,
            "Trim over the whole model or tensor by tensor.",
            choices=("global", "tensor"),
            per_tensor=False,
            default_doc="the semantics'",
        ),
        Parameter(
            "merge",
            "str",
            None,
            "What is taken of the values that agree with the elected sign.",
            choices=("mean", "sum", "max"),
            default_doc="the semantics'",
        ),
        Parameter(
            "normalize",
            "bool",
            None,
            "mergekit's word for merge: true is mean, false is sum.",
            default_doc="the semantics'",
        ),
        Parameter(
            "exact_k",
            "bool",
            None,
            "Keep exactly k elements (lowest flat index first among equal magnitudes), or all at "
            "or above the threshold.",
            default_doc="the semantics'",
            per_tensor=False,
        ),
        Parameter(
            "elect",
            "str",
            None,
            "Elect the sign of the sum (mass) or of the sum of signs (count).",
            choices=("mass", "count"),
            default_doc="the semantics'",
            per_tensor=False,
        ),
        NAN,
        INT8_MASK,
        NO_RESCALE,
    ),
    yaml_defaults={"semantics": "mergekit", "density": 1.0},
)

RECORDS = (TIES,)
