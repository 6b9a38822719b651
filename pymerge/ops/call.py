"""What each op does: finds the backend and calls it. `contract` makes torch ops of these.

The engine calls them directly where it can (`call`): that needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pymerge.ops.arguments import Kept, SparseMerge
from pymerge.ops.array import Array, Flat
from pymerge.ops.backends import resolve
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.masks import words_at

Counters = Any  # arrays of numpy, or tensors


class Runs(Protocol):
    """Something that runs ops; see `pymerge.ops.runner`."""

    def call(self, op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None: ...


def call(name: str, *arguments: Any, backend: str | Runs, **keywords: Any) -> None:
    """Call an op on arrays or tensors, with counters of numpy or tensors.

    Arrays go straight to the CPU's kernels; everything else goes through torch. Counters of numpy
    are right when this returns, wherever the op runs; those that are tensors of a device are added
    to when the device comes to it.

    Args:
        name: an op of `pymerge.ops.contract`, e.g. "ties_".
        arguments: its positional arguments; counters may be arrays of numpy.
        backend: a name of `BACKENDS`, not "auto", or what runs the op somewhere.
        keywords: its keyword arguments.
    """
    if not isinstance(backend, str):
        backend.call(name, arguments, keywords)
        return
    given = [*arguments, *keywords.values()]
    if backend == "cpu" and any(_has_array(argument) for argument in given):
        globals()[name](*arguments, backend=backend, **keywords)
        return
    import torch

    from pymerge.ops import contract as contract  # declares torch.ops.pymerge

    converted = [_for_torch(argument) for argument in arguments]
    device = _device_of(converted)
    counters: list[tuple[np.ndarray, Any]] = []
    if device is not None and backend != "reference":
        # These backends count on the device; what they counted is fetched.
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                converted[i] = converted[i].to(device)
                counters.append((argument, converted[i]))
    named = {key: _for_torch(value) for key, value in keywords.items()}
    getattr(torch.ops.pymerge, name)(*converted, backend=backend, **named)
    for host, counted in counters:
        host[...] = counted.cpu().numpy()


def _has_array(argument: Any) -> bool:
    if isinstance(argument, list):
        return bool(argument) and isinstance(argument[0], Array)
    return isinstance(argument, Array)


def _device_of(arguments: list[Any]) -> Any:
    """Return the device of the first tensor that is not on the processor, or None."""
    for argument in arguments:
        for one in argument if isinstance(argument, list) else [argument]:
            device = getattr(one, "device", None)
            if device is not None and device.type != "cpu":
                return device
    return None


def _for_torch(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        import torch

        return torch.from_numpy(argument)  # the same memory
    if isinstance(argument, Array):
        return argument.tensor()
    if isinstance(argument, (list, tuple)):
        return [_for_torch(one) for one in argument]
    return argument


def _backend(name: str, flat: Flat) -> Any:
    return resolve(name, "cpu" if isinstance(flat, Array) else flat.device)


def weighted_sum_(
    out: Flat,
    stats: Counters,
    models: Sequence[Flat],
    weights: Sequence[float],
    divisor: float,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, out)
    chosen.weighted_sum(out, stats, None, models, weights, 1.0, divisor, wide)


def task_arithmetic_(
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    weights: Sequence[float],
    scale: float,
    divisor: float,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, out)
    chosen.weighted_sum(out, stats, base, models, weights, scale, divisor, wide)


def ties_(
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    weights: Sequence[float],
    weighting: str,
    merge: str,
    elect: str,
    zero_sign: int,
    scale: float,
    want_signs: bool,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, out).ties(
        out,
        stats,
        base,
        models,
        thresholds,
        weights,
        weighting,
        merge,
        elect,
        zero_sign,
        scale,
        want_signs,
        wide,
    )


def ties_signs_(
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    weights: Sequence[float],
    weighting: str,
    elect: str,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, base).ties(
        None, stats, base, models, thresholds, weights, weighting, "sum", elect, 1, 1.0, True, wide
    )


def magnitude_histogram_(
    counts: Counters,
    hot_chunks: Counters,
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    shift: Sequence[int],
    hot: Sequence[int],
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, base).magnitude_histogram(
        counts, hot_chunks, base, models, lo, shift, hot, wide
    )


def magnitude_equal_counts_(
    counts: Counters,
    base: Flat,
    model: Flat,
    key: int,
    chunk: int,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, base)
    chosen.magnitude_equal_counts(counts, base, model, key, chunk, wide)


def sparse_merge_(
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    lo: Sequence[int],
    last: Sequence[int],
    seeds: Sequence[int],
    limits: Sequence[int],
    factors: Sequence[float],
    weights: Sequence[float],
    elect: bool,
    divide: bool,
    divisor: float,
    scale: float,
    start: int,
    ranks: Any = None,
    chances: Sequence[float] = (),
    per_element: bool = False,
    *,
    bare: bool = False,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, out)
    how = SparseMerge(factors, weights, elect, divide, divisor, scale, bare)
    # A hash sees the low half of an index: no call of a kernel crosses a multiple of 2^32.
    for begin, end in _halves(start, out.numel(), bool(seeds)):
        here = start + begin
        own = ranks if ranks is None or begin == 0 else ranks[:, begin:]
        words = words_at(seeds, here)
        chosen.sparse_merge(
            out[begin:end],
            stats,
            base[begin:end],
            [model[begin:end] for model in models],
            Kept(lo, last, words, limits, here, own, chances, per_element),
            how,
            wide,
        )


def _halves(start: int, numel: int, matters: bool) -> list[tuple[int, int]]:
    border = ((start >> 32) + 1 << 32) - start
    if not matters or border >= numel:
        return [(0, numel)]
    return [
        (0, border),
        *((b + border, e + border) for b, e in _halves(start + border, numel - border, True)),
    ]


def chunk_sums_(
    partials: Counters,
    base: Flat | None,
    models: Sequence[Flat],
    kind: str,
    reals: Sequence[float] = (),
    lo: Sequence[int] = (),
    last: Sequence[int] = (),
    seeds: Sequence[int] = (),
    limits: Sequence[int] = (),
    start: int = 0,
    ranks: Any = None,
    chances: Sequence[float] = (),
    columns: int = 0,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, models[0])
    length = columns or SUM_CHUNK
    for begin, end in _halves(start, models[0].numel(), bool(seeds)):
        here = start + begin
        own = ranks if ranks is None or begin == 0 else ranks[:, begin:]
        part = partials
        if (begin, end) != (0, models[0].numel()):
            part = partials[:, begin // length : -(-end // length)] * 0.0
        chosen.chunk_sums(
            kind,
            part,
            None if base is None else base[begin:end],
            [model[begin:end] for model in models],
            reals,
            Kept(lo, last, words_at(seeds, here), limits, here, own, chances),
            columns,
            wide,
        )
        if part is not partials:
            partials[:, begin // length : -(-end // length)] = part


def pointwise_(
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    method: str,
    reals: Sequence[float],
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, out).pointwise(method, out, stats, base, models, reals, wide)


def pcb_scores_(
    scores: Counters,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
    *,
    backend: str = "auto",
) -> None:
    _backend(backend, base).pcb_scores(scores, stats, base, models, variant, reals)


def pcb_merge_(
    out: Flat,
    stats: Counters,
    base: Flat,
    models: Sequence[Flat],
    variant: int,
    reals: Sequence[float],
    *,
    backend: str = "auto",
) -> None:
    _backend(backend, out).pcb_merge(out, stats, base, models, variant, reals)


def row_ranks_(
    ranks: Counters,
    base: Flat,
    models: Sequence[Flat],
    columns: int,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, base).row_ranks(ranks, base, models, columns, wide)


def row_weighted_sum_(
    out: Flat,
    stats: Counters,
    base: Flat | None,
    models: Sequence[Flat],
    weights: Counters,
    columns: int,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, out).row_weighted_sum(out, stats, base, models, weights, columns, wide)


def compare_(
    sums: Counters,
    counts: Counters,
    base: Flat,
    models: Sequence[Flat],
    thresholds: Sequence[int],
    start: int = 0,
    every: int = 1,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, base)
    chosen.compare(sums, counts, base, models, thresholds, start, every, wide)


def divergence_sums_(
    table: Counters,
    base: Flat,
    model: Flat,
    kind: str,
    columns: int = 0,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, base).divergence_sums(table, base, model, kind, columns, wide)


def packed_sum_(
    out: Flat,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    weights: Sequence[float],
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    _backend(backend, out).packed_sum(out, base, masks, values, offsets, weights, wide)


def packed_dots_(
    partials: Counters,
    gradient: Flat,
    base: Flat,
    masks: Sequence[Any],
    values: Sequence[Flat],
    offsets: Sequence[Any],
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, base)
    chosen.packed_dots(partials, gradient, base, masks, values, offsets, wide)


def row_importance_(
    out: Flat,
    stats: Counters,
    base: Flat,
    model: Flat,
    divergences: Counters,
    columns: int,
    threshold: float | None = None,
    *,
    wide: bool = False,
    backend: str = "auto",
) -> None:
    chosen = _backend(backend, out)
    chosen.row_importance(out, stats, base, model, divergences, columns, threshold, wide)
