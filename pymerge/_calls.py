"""What each op does: finds the backend and calls it. `pymerge._ops` makes torch ops of these.

The engine calls them directly where it can (`call`): that needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymerge.array import Array, Flat
from pymerge.backends import resolve

Counters = Any  # arrays of numpy, or tensors


def call(name: str, *arguments: Any, backend: str, **keywords: Any) -> None:
    """Call an op on arrays or tensors, with counters of numpy.

    Arrays go straight to the CPU's kernels; everything else goes through torch.

    Args:
        name: an op of `pymerge._ops`, e.g. "ties_".
        arguments: its positional arguments; counters may be arrays of numpy.
        backend: a name of `BACKENDS`, not "auto".
        keywords: its keyword arguments.
    """
    if backend == "cpu" and any(isinstance(argument, Array) for argument in arguments):
        globals()[name](*arguments, backend=backend, **keywords)
        return
    import torch

    from pymerge import _ops as _ops  # declares torch.ops.pymerge

    converted = [_for_torch(argument) for argument in arguments]
    getattr(torch.ops.pymerge, name)(*converted, backend=backend, **keywords)


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
