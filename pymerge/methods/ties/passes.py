"""The passes of TIES: thresholds, the sign that a zero vote takes, the merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pymerge.engine.context import Context, copy_equal, total_bytes
from pymerge.engine.execute import merge_each
from pymerge.engine.select import Cut, Part, Workspace, order_statistics
from pymerge.engine.whole_model import Samples, WholeModel
from pymerge.engine.work import Sink, Source, Work
from pymerge.methods.sums.passes import add_task_vectors
from pymerge.methods.ties.record import TiesRule, trim_target
from pymerge.ops.call import call
from pymerge.ops.runner import fetched, zeros

__all__ = ["run", "zero_elects"]

_PLAIN = 6.0  # standard errors from 0 beyond which a sampled balance of signs counts as clear


def _how(work: Work, rule: TiesRule) -> dict[str, Any]:
    """Return the op's arguments that do not change within a tensor."""
    weights = [float(weight) for weight in work.parameters["weight"]]
    weighting = rule.weighting
    merge = rule.merge
    if merge == "mean":
        merge = "mean_of_weights" if rule.divisor == "weights" else "mean_of_count"
    if all(weight == 1.0 for weight in weights):
        # The same result by a shorter path.
        weighting, weights = "none", []
        merge = "mean_of_count" if merge == "mean_of_weights" else merge
    return {"weights": weights, "weighting": weighting, "merge": merge, "elect": rule.elect}


def zero_elects(rule: TiesRule, balance: int) -> int:
    """Return the sign that a zero vote elects, given the sum of all elected signs of the scope."""
    if rule.zero == "positive":
        return 1
    if rule.zero == "drop":
        return 0
    sign = (balance > 0) - (balance < 0)
    if sign == 0 and rule.zero == "majority" and rule.merge != "max":
        return -1  # the official code takes the negative branch if the sign is not positive
    return sign


def _needs_balance(rule: TiesRule) -> bool:
    return rule.zero in ("majority", "majority_or_drop")


def stretches(
    cuts: Sequence[Cut], part: int, start: int, stop: int, numel: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (begin, end, thresholds) of the stretches of [start, stop) within which no threshold
    changes."""
    if start == stop:
        return
    tables = [cut.thresholds(part, numel) for cut in cuts]
    borders = sorted({end for table in tables for end, _ in table if start < end < stop} | {stop})
    begin = start
    for end in borders:
        yield begin, end, [next(key for until, key in table if begin < until) for table in tables]
        begin = end


class _Merge:
    """The merge pass over tensors whose thresholds are known."""

    def __init__(self, source: Source, sink: Sink, context: Context) -> None:
        self.source = source
        self.sink = sink
        self.context = context

    def tensor(
        self, work: Work, rule: TiesRule, part: int, cuts: list[Cut], zero_sign: int
    ) -> None:
        """Merge one tensor; the context's `stats` add up the balance of signs if the rule needs
        it."""
        how = _how(work, rule)
        base, models = self.source.load(work.name)
        assert base is not None
        for start, out in self.sink.pieces(work.name):
            stop = start + out.numel()
            for begin, end, thresholds in stretches(cuts, part, start, stop, work.numel):
                call(
                    "ties_",
                    out[begin - start : end - start],
                    self.context.stats,
                    base[begin:end],
                    [model[begin:end] for model in models],
                    thresholds,
                    zero_sign=zero_sign,
                    scale=work.parameters["scale"],
                    want_signs=_needs_balance(rule) and rule.scope == "global",
                    wide=work.wide,
                    backend=self.context.backend,
                    **how,
                )
            self.context.check(2, self.source, work.name, start, stop)
            self.context.progress.advance(sum(t[start:stop].nbytes for t in (base, *models)))

    def signs(self, work: Work, rule: TiesRule, part: int, cuts: list[Cut]) -> np.ndarray:
        """Return [balance of elected signs, zero votes that kept something, _] of one tensor."""
        how = _how(work, rule)
        del how["merge"]
        base, models = self.source.load(work.name)
        assert base is not None
        stats = zeros(self.context.backend, (3,), "int64")
        for begin, end, thresholds in stretches(cuts, part, 0, work.numel, work.numel):
            call(
                "ties_signs_",
                stats,
                base[begin:end],
                [model[begin:end] for model in models],
                thresholds,
                wide=work.wide,
                backend=self.context.backend,
                **how,
            )
        return fetched(stats)


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> dict[str, int]:
    """Run TIES over all works, trimming over the whole model or tensor by tensor."""
    merged = [work for work in works if not work.copied and not work.parameters.get("fixed")]
    rules = {work.name: TiesRule.of(work.parameters, "ties") for work in merged}
    if any(rule.scope == "global" for rule in rules.values()):
        return _run_global(works, merged, rules, source, sink, context)
    return _run_tensors(works, rules, source, sink, context)


def _run_tensors(
    works: Sequence[Work],
    rules: dict[str, TiesRule],
    source: Source,
    sink: Sink,
    context: Context,
) -> dict[str, int]:
    merge = _Merge(source, sink, context)
    passes, workspace = 0, Workspace()

    def merge_tensor(work: Work, source: Source, _sink: Sink, context: Context) -> None:
        nonlocal passes
        rule = rules[work.name]
        base, models = source.load(work.name)
        assert base is not None
        part: Part = (0, base, models)
        targets = [trim_target(rule, density, work.numel) for density in work.parameters["density"]]
        cuts, counted = context.remembered(
            ("cuts", work.name, work.wide, *targets),
            lambda: order_statistics(
                lambda: iter((part,)),
                targets,
                work.numel,
                bins=context.bins,
                sample=context.sample,
                wide=work.wide,
                backend=context.backend,
                workspace=workspace,
            ),
        )
        passes = max(passes, counted)
        zero_sign = zero_elects(rule, 0)
        if _needs_balance(rule):
            signs = merge.signs(work, rule, 0, cuts)
            zero_sign = zero_elects(rule, int(signs[0]))
        merge.tensor(work, rule, 0, cuts, zero_sign)

    merge_each(works, source, sink, context, merge_tensor)
    return {"selection_passes": passes}


def _run_global(
    works: Sequence[Work],
    merged: Sequence[Work],
    rules: dict[str, TiesRule],
    source: Source,
    sink: Sink,
    context: Context,
) -> dict[str, int]:
    first = merged[0]
    rule = rules[first.name]  # scope, count and election are the same for all tensors
    model = WholeModel(merged, source, context)
    targets = [trim_target(rule, density, model.total) for density in first.parameters["density"]]
    samples: Samples = []
    if _needs_balance(rule) or any(target.keep == "rank" for target in targets):
        samples = model.samples()
    cuts, passes = model.cuts(targets, samples)

    # The sign of a zero vote is a statistic of the whole merge. If a sample makes it clear, merge
    # with that and verify it; else count first.
    merge = _Merge(source, sink, context)
    balance, sampled_numel = _guess_balance(first, rule, samples, cuts, model.wide, context)
    counts_first = _needs_balance(rule) and abs(balance) <= _PLAIN * math.sqrt(sampled_numel)
    memo = {} if context.memo is None else context.memo
    if counts_first and "balance" in memo:
        # With other weights it is usually the same sign, and the merge verifies it.
        counts_first, balance = False, memo["balance"]
    if counts_first:
        context.begin("signs", model.works, source)
        balance = 0
        for number, work in enumerate(model.works):
            balance += int(merge.signs(work, rules[work.name], number, cuts)[0])
            source.release(work.name)
    attempts = 0
    while True:
        attempts += 1
        context.stats[:] = 0
        context.progress.phase(context.method.name, total_bytes(works, source))
        source.announce([work.name for work in works])
        with context.phase():
            for work in works:
                if work.copied:
                    copy_equal(work, source, sink, context)
                elif work.name not in model.numbers:  # the base's, whatever the models contain
                    add_task_vectors(work, source, sink, context)
                else:
                    own, number = rules[work.name], model.numbers[work.name]
                    zero_sign = zero_elects(own, balance)
                    merge.tensor(model.work(work.name), own, number, cuts, zero_sign)
                source.release(work.name)
        context.settle()
        counted = fetched(context.stats)
        guess, balance, undecided = balance, int(counted[0]), int(counted[1])
        right = all(zero_elects(own, guess) == zero_elects(own, balance) for own in rules.values())
        # If nothing was kept, the sign shows in a maximum of nothing: -0 instead of 0.
        matters = undecided > 0 or any(own.merge == "max" for own in rules.values())
        if right or not matters:
            break
        sink.restart()
    memo["balance"] = balance
    return {"selection_passes": passes, "merge_passes": attempts, "zero_votes": undecided}


def _guess_balance(
    work: Work,
    rule: TiesRule,
    samples: Samples,
    cuts: Sequence[Cut],
    wide: bool,
    context: Context,
) -> tuple[int, int]:
    """Return the balance of signs in the sample, and the number of elements in it."""
    if not _needs_balance(rule):
        return 0, 0
    how = _how(work, rule)
    del how["merge"]
    stats = np.zeros(3, np.int64)
    for base, models in samples:
        call(
            "ties_signs_",
            stats,
            base,
            list(models),
            [cut.key for cut in cuts],
            wide=wide,
            backend=context.backend,
            **how,
        )
    return int(stats[0]), sum(base.numel() for base, _ in samples)
