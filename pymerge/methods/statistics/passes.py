"""Methods that weight by statistics collected from data: Fisher, gradient matching, RegMean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TYPE_CHECKING, Any

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.sums import add_up
from pymerge.engine.work import Sink, Source, TensorStatistics, Work, slices
from pymerge.errors import RequestError
from pymerge.methods.statistics.record import fisher_rule, off_diagonal_of
from pymerge.ops.array import Flat, as_tensor
from pymerge.ops.call import call
from pymerge.ops.constants import SOLVED_AT_ONCE
from pymerge.ops.threads import torch_threads

if TYPE_CHECKING:
    import torch

__all__ = ["run_fisher", "run_gradient_matching", "run_regmean"]

_AT_ONCE = 1 << 16  # elements: the temporaries of a tile stay in the cache
_SUMMED_AT_ONCE = 1 << 20
_ASYMMETRY = 1e-4  # of the largest diagonal element; sums in float32 are off by less


Merge = Callable[[Work, TensorStatistics, ThreadPoolExecutor], None]


def run_fisher(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Weight by Fisher information, normalized by its norms."""
    norms: dict[str, list[float]] = {}

    def merge(work: Work, statistics: TensorStatistics, pool: ThreadPoolExecutor) -> None:
        rule = _fisher(work, norms.get(work.name, []))
        _run_pointwise(work, statistics, rule, source, sink, context, pool)

    _run(works, source, sink, context, merge, lambda: norms.update(_norms(works, source, context)))


def run_gradient_matching(
    works: Sequence[Work], source: Source, sink: Sink, context: Context
) -> None:
    """Precondition task vectors by squared gradients."""

    def merge(work: Work, statistics: TensorStatistics, pool: ThreadPoolExecutor) -> None:
        _run_pointwise(work, statistics, _matching(work), source, sink, context, pool)

    _run(works, source, sink, context, merge)


def run_regmean(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Solve the least squares of each linear layer."""

    def merge(work: Work, statistics: TensorStatistics, pool: ThreadPoolExecutor) -> None:
        _run_regmean(work, statistics, source, sink, context, pool)

    _run(works, source, sink, context, merge)


def _run(
    works: Sequence[Work],
    source: Source,
    sink: Sink,
    context: Context,
    merge: Merge,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Merge tensor by tensor, on our own threads; tensors without statistics are averaged."""
    with torch_threads(1) as threads:
        prepare()
        # Each tile and block is computed on a single thread, whichever it is.
        with ThreadPoolExecutor(context.solvers or threads, "pymerge-compute") as pool:

            def merge_tensor(work: Work, source: Source, sink: Sink, context: Context) -> None:
                statistics = source.statistics(work.name)
                if all(flat is None for flat in statistics.models):
                    _run_mean(work, source, sink, context)
                else:
                    merge(work, statistics, pool)

            merge_each(works, source, sink, context, merge_tensor)


# ------------------------------------------------------------------ without statistics


def _run_mean(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Average a tensor without statistics: a buffer, a frozen parameter, or one that belongs to no
    linear layer."""
    base, models = source.load(work.name)
    weights = [float(weight) for weight in work.parameters["weight"]]
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        parts = [model[start:stop] for model in models]
        total, how = float(sum(weights)), {"wide": work.wide, "backend": context.backend}
        if base is None:
            call("weighted_sum_", out, context.stats, parts, weights, total, **how)
        else:
            own = base[start:stop]
            scale = float(work.parameters["scale"])
            call("task_arithmetic_", out, context.stats, own, parts, weights, scale, total, **how)
        context.check(0, source, work.name, start, stop)
        context.progress.advance(sum(flat[start:stop].nbytes for flat in _inputs(base, models)))


def _inputs(base: Flat | None, models: Sequence[Flat]) -> list[Flat]:
    return [*models, *([] if base is None else [base])]


# ------------------------------------------------------------------ element by element


def _norms(works: Sequence[Work], source: Source, context: Context) -> dict[str, list[float]]:
    """Return the norm of each model's Fisher information by tensor, 1 if it is not divided."""
    computed = [work for work in works if not work.copied]
    if not computed:
        return {}
    kind = fisher_rule(computed[0].parameters).normalize
    found = {}
    squares: dict[str, list[float]] = {}
    if kind != "none":
        known = {
            work.name: [flat for flat in source.statistics(work.name).models if flat is not None]
            for work in computed
        }
        total = sum(flat.nbytes for flats in known.values() for flat in flats)
        context.progress.phase("norms", total)
        for name, flats in known.items():
            if flats:
                squares[name] = [_square(flat, context) for flat in flats]
                context.progress.advance(sum(flat.nbytes for flat in flats))
    whole = [math.sqrt(math.fsum(column)) for column in zip(*squares.values(), strict=True)]
    for work in computed:
        count = len(work.parameters["weight"])
        own = [math.sqrt(value) for value in squares.get(work.name, [])]
        norms = {"none": [1.0] * count, "global": whole, "tensor": own}[kind]
        rule = fisher_rule(work.parameters)
        # "add" adds the floor to the norm too, as MergeLM does. A norm of 0 is not used.
        added = rule.floor if rule.floor_rule == "add" and kind != "none" else 0.0
        found[work.name] = [
            1.0 if not math.isfinite(norm) or norm + added == 0 else norm + added for norm in norms
        ]
    return found


def _square(flat: Flat, context: Context) -> float:
    """Return the sum of squares, in an order that depends only on the length."""
    sums = [
        add_up("gram", None, [flat[a:b]], wide=False, backend=context.backend)[0]
        for a, b in slices(flat.numel(), _SUMMED_AT_ONCE)
    ]
    return math.fsum(sums) if all(math.isfinite(value) for value in sums) else math.inf


def _run_pointwise(
    work: Work,
    statistics: TensorStatistics,
    rule: Callable[..., torch.Tensor],
    source: Source,
    sink: Sink,
    context: Context,
    pool: ThreadPoolExecutor,
) -> None:
    base, models = source.load(work.name)
    inputs, collected = _inputs(base, models), _labelled(statistics)

    def compute(a: int, b: int, out: torch.Tensor) -> bool:
        """Compute elements [a, b), and return whether the models are finite there."""
        parts = [as_tensor(model[a:b]) for model in models]
        own = None if base is None else as_tensor(base[a:b])
        extra = [
            None
            if flat is None
            else _checked(as_tensor(flat[a:b]), a, k, work, statistics).to(parts[0].device)
            for k, flat in enumerate(collected)
        ]
        result = rule(own, parts, extra)
        out.copy_(result if work.wide else result.float())
        return all(_is_finite(part) for part in ([own] if own is not None else []) + parts)

    for start, out in sink.pieces(work.name):
        piece = as_tensor(out)
        tiles = list(slices(piece.numel(), _AT_ONCE))
        found = pool.map(
            lambda tile, start=start, piece=piece: compute(
                start + tile[0], start + tile[1], piece[tile[0] : tile[1]]
            ),
            tiles,
        )
        for (begin, end), finite in zip(tiles, found, strict=True):
            context.check_finite(int(not finite), source, work.name, start + begin, start + end)
        stop = start + piece.numel()
        read = [*inputs, *(flat for flat in collected if flat is not None)]
        context.progress.advance(sum(flat[start:stop].nbytes for flat in read))


def _labelled(statistics: TensorStatistics) -> list[Flat | None]:
    """Return all statistics in the order of the labels: the base's first, if it has a label."""
    with_base = len(statistics.labels) > len(statistics.models)
    return [*([statistics.base] if with_base else []), *statistics.models]


def _fisher(work: Work, norms: Sequence[float]) -> Callable[..., torch.Tensor]:
    from pymerge.ops.reference.statistics import fisher

    rule = fisher_rule(work.parameters)
    weights = [float(weight) for weight in work.parameters["weight"]]
    coefficients = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    return lambda _, parts, extra: fisher(
        parts, extra, weights, coefficients, rule.floor, rule.floor_rule
    )


def _matching(work: Work) -> Callable[..., torch.Tensor]:
    from pymerge.ops.reference.statistics import gradient_matching

    parameters = work.parameters
    numbers = [float(parameters[name]) for name in ("scale", "base_weight", "delta")]
    weights = [float(weight) for weight in parameters["weight"]]

    def rule(base: Any, parts: Any, extra: Any) -> torch.Tensor:
        own = extra[0] if len(extra) > len(parts) else None
        return gradient_matching(base, parts, extra[-len(parts) :], own, weights, *numbers)

    return rule


def _checked(
    part: torch.Tensor, start: int, which: int, work: Work, statistics: TensorStatistics
) -> torch.Tensor:
    """Return squared gradients; raise RequestError unless they are finite and not negative."""
    least, most = _range(part)
    if not (least >= 0 and math.isfinite(most)):  # NaN is neither
        index = int((~((part >= 0) & part.isfinite())).nonzero()[0])
        raise RequestError(
            f"{statistics.labels[which]}: {work.name!r} holds {float(part[index])} at flat index "
            f"{start + index}; Fisher information is finite and not negative"
        )
    return part


# ------------------------------------------------------------------ matrix by matrix


def _run_regmean(
    work: Work,
    statistics: TensorStatistics,
    source: Source,
    sink: Sink,
    context: Context,
    pool: ThreadPoolExecutor,
) -> None:
    import torch

    from pymerge.ops.reference.statistics import RegMean, Singular

    _, flats = source.load(work.name)
    # A convolution's weight [out, in, *kernel] is that of a linear layer on patches.
    rows, columns = work.shape[0], prod(work.shape[1:])
    models = [as_tensor(flat).reshape(rows, columns) for flat in flats]
    finite = all(_is_finite(model) for model in models)
    inputs, outputs = (rows, columns) if statistics.transposed else (columns, rows)
    grams = [
        _gram(flat, inputs, label, work).to(models[0].device)
        for flat, label in zip(statistics.models, statistics.labels, strict=True)
        if flat is not None
    ]
    context.check_finite(int(not finite), source, work.name, 0, work.numel)
    if not finite:  # non-finite values are to be kept: such a system has no solution, so average
        _run_mean(work, source, sink, context)
        return
    result = torch.empty(
        (rows, columns),
        dtype=torch.float64 if work.wide else torch.float32,
        device=models[0].device,
    )
    across = [model if statistics.transposed else model.T for model in models]  # [in, out]
    target = result if statistics.transposed else result.T
    try:
        system = RegMean(
            grams,
            [float(weight) for weight in work.parameters["weight"]],
            off_diagonal_of(work.parameters),
            float(work.parameters["ridge"]),
        )
    except Singular as error:
        raise RequestError(
            f"regmean: {source.describe(work.name)}: the sum of the Gram matrices is singular: "
            f"{error}; set ridge above 0 (such as 1e-6), off_diagonal below 1, or collect from "
            "more examples"
        ) from None

    def solve(part: tuple[int, int]) -> None:
        a, b = part
        target[:, a:b] = system.solve([model[:, a:b] for model in across])

    for _ in pool.map(solve, slices(outputs, SOLVED_AT_ONCE)):
        pass
    flat = result.view(-1)
    for start, out in sink.pieces(work.name):
        piece = as_tensor(out)
        piece.copy_(flat[start : start + piece.numel()])
    context.progress.advance(source.nbytes(work.name))


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(math.isfinite(value) for value in _range(tensor))


def _range(tensor: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest element; NaN if one is."""
    least, most = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
    return float(least), float(most)


def _gram(flat: Flat, inputs: int, label: str, work: Work) -> torch.Tensor:
    """Return a Gram matrix [in, in]; raise RequestError unless it is finite and symmetric, with a
    diagonal that is not negative."""
    matrix = as_tensor(flat).reshape(inputs, inputs)
    where = f"{label}: the Gram matrix of {work.name!r}"
    diagonal = matrix.diagonal()
    largest = float(diagonal.abs().max()) if inputs else 0.0
    for start in range(0, inputs, 1024):
        block = matrix[start : start + 1024]
        if not bool(block.isfinite().all()):
            raise RequestError(f"{where} holds NaN or infinity")
        apart = float((block - matrix[:, start : start + 1024].T.contiguous()).abs().max())
        if apart > _ASYMMETRY * largest:
            raise RequestError(
                f"{where} is not symmetric: elements differ by up to {apart:g} from their mirror "
                f"images (the largest of the diagonal is {largest:g})"
            )
    if inputs and float(diagonal.min()) < 0:
        raise RequestError(f"{where} has a negative diagonal element: {float(diagonal.min()):g}")
    return matrix
