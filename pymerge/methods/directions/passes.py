"""Methods that are weighted sums with weights from norms and angles: SLERP and its kin.

All vectors that these methods compute are weighted sums of the inputs, so their norms and angles
follow from the inputs' Gram matrix: one pass for that matrix, and one for the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.sums import gram_matrix, row_sums, square
from pymerge.engine.work import Sink, Source, Work, row_length
from pymerge.errors import RequestError
from pymerge.ops.array import Flat
from pymerge.ops.call import call

__all__ = ["run", "whole_rows"]

_PARALLEL = 0.9995  # |cos| from which slerp is linear


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Merge tensor by tensor."""
    merge_each(works, source, sink, context, _merge)


def _merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Compute the coefficients of a tensor, and add up."""
    base, models = source.load(work.name)
    method = context.method.name
    inputs: list[Flat] = list(models)
    origin = base
    if method == "slerp":
        assert base is not None
        inputs, origin = [base, *models], None
    rows = not work.parameters.get("flatten", True) or work.parameters.get("filter_wise")
    if rows and len(work.shape) > 1 and work.numel > 0:
        _run_rows(work, origin, inputs, source, sink, context)
        return
    if method == "passthrough":
        scale, coefficients = 1.0, [float(work.parameters["scale"][0])]
    elif method == "model_stock":
        gram = _gram(work, base, inputs, context)
        # If an input is not finite there is no angle: use the plain average.
        finite = bool(np.isfinite(gram).all())
        scale = stock_ratio(gram, work.parameters["angle"]) if finite else 1.0
        coefficients = [1.0 / len(inputs)] * len(inputs)
    else:
        gram = _gram(work, origin, inputs, context)
        # NaN in an input is an error that the weighted sum reports; here it must not cause any.
        scale, coefficients = 1.0, [1.0] * len(inputs)
        if np.isfinite(gram).all():
            coefficients = _coefficients(method, gram, work)
    _weighted_sum(work, origin, inputs, coefficients, scale, source, sink, context)


def _gram(work: Work, origin: Flat | None, inputs: Sequence[Flat], context: Context) -> np.ndarray:
    return context.remembered(
        ("gram", work.name, work.wide),
        lambda: gram_matrix(origin, inputs, wide=work.wide, backend=context.backend),
    )


def _coefficients(method: str, gram: np.ndarray, work: Work) -> list[float]:
    parameters = work.parameters
    if method == "slerp":
        return slerp_weights(gram, parameters["t"], norm_floor=1e-8)
    if method == "nuslerp":
        return nuslerp_weights(gram, parameters["weight"])
    if method == "karcher":
        return karcher_weights(gram, parameters["max_iter"], parameters["tol"])
    try:
        return multislerp_weights(
            gram, parameters["weight"], parameters["normalize_weights"], parameters["epsilon"]
        )
    except ValueError as error:
        raise RequestError(f"multislerp: tensor {work.name!r}: {error}") from None


def _run_rows(
    work: Work,
    origin: Flat | None,
    inputs: Sequence[Flat],
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    """Do the same with separate coefficients for each row, a vector of the last dimension."""
    columns, how = row_length(work), {"wide": work.wide, "backend": context.backend}
    count = len(inputs)
    grams = square(row_sums("gram", origin, inputs, columns, **how), count)
    coefficients = np.full((count, work.numel // columns), 1.0)
    for row in range(coefficients.shape[1]):
        gram = grams[:, :, row]
        finite = bool(np.isfinite(gram).all())
        if context.method.name == "model_stock":
            ratio = stock_ratio(gram, work.parameters["angle"]) if finite else 1.0
            coefficients[:, row] = ratio / count
        elif finite:
            coefficients[:, row] = _coefficients(context.method.name, gram, work)
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        for begin, end, length in whole_rows(start, stop, columns):
            own = coefficients[:, begin // columns : -(-end // columns)]
            call(
                "row_weighted_sum_",
                out[begin - start : end - start],
                context.stats,
                None if origin is None else origin[begin:end],
                [flat[begin:end] for flat in inputs],
                np.ascontiguousarray(own),
                length,
                **how,
            )
        context.check(0, source, work.name, start, stop)
        read = [*inputs, *([] if origin is None else [origin])]
        context.progress.advance(sum(flat[start:stop].nbytes for flat in read))


def whole_rows(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Divide a stretch into a part of a row, whole rows, and a part of a row: (begin, end, row
    length)."""
    first, last = -(-start // columns) * columns, stop // columns * columns
    if first > last:  # inside one row
        yield start, stop, stop - start
        return
    if start < first:
        yield start, first, first - start
    if first < last:
        yield first, last, columns
    if last < stop:
        yield last, stop, stop - last


def _norms(gram: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.diagonal(gram), 0.0))


def slerp_weights(gram: np.ndarray, t: float, *, norm_floor: float) -> list[float]:
    """Return the weights of two vectors; linear if they are nearly parallel.

    Vectors with norms up to `norm_floor` are taken as they are, not as directions.
    """
    lengths = [norm if norm > norm_floor else 1.0 for norm in _norms(gram)]
    cosine = float(gram[0, 1] / (lengths[0] * lengths[1]))
    if abs(cosine) > _PARALLEL:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def nuslerp_weights(gram: np.ndarray, weights: Sequence[float]) -> list[float]:
    """Return the weights of two vectors, at t = w_2 / (w_1 + w_2)."""
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    lengths = np.maximum(_norms(gram), 1e-7)
    cosine = min(1.0, max(-1.0, float(gram[0, 1] / (lengths[0] * lengths[1]))))
    # If nearly opposite, the weights are about 1 / sine: beyond 1e7, in float32, they are rounding.
    if 1.0 - cosine * cosine <= (1e-16 if cosine > 0 else 1e-14):
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp_weights(
    gram: np.ndarray, weights: Sequence[float], normalize: bool, epsilon: float
) -> list[float]:
    """Return the weights of K vectors.

    Raises ValueError if the mean direction of three or more vanishes.
    """
    count = len(weights)
    if count == 1:
        return [1.0]
    w = np.asarray(weights, dtype=np.float64)
    if normalize:
        total = w.sum()
        if abs(total) < 1e-8:
            raise ValueError(f"the weights {list(weights)} sum to 0")
        w = w / total
    norms = _norms(gram)
    if not norms.any():
        return [0.0] * count
    units = np.diag(1.0 / (norms + epsilon))  # [k, coefficients]: direction k
    mean = w @ units
    length = math.sqrt(max(0.0, float(mean @ gram @ mean)))
    if length < epsilon:
        if count == 2:
            return [float(value) for value in w]
        raise ValueError("the weighted mean of the directions is 0")
    mean = mean / length
    along = units @ gram @ mean  # <u_k, m>
    tangent = w @ (units - np.outer(along, mean))
    size = math.sqrt(max(0.0, float(tangent @ gram @ tangent)))
    result = math.cos(size) * mean + math.sin(size) * tangent / (size + epsilon)
    return [float(value) for value in result * float(w @ norms)]


def karcher_weights(gram: np.ndarray, max_iter: int, tol: float) -> list[float]:
    """Return the weights of the Karcher mean of K directions, times the mean norm."""
    count = len(gram)
    norms = _norms(gram)
    valid = norms > 0
    if count == 1:
        return [1.0]
    if not valid.any():
        return [0.0] * count
    units = np.diag(np.where(valid, 1.0 / np.where(valid, norms, 1.0), 0.0))[valid]
    share = 1.0 / len(units)
    mean = units.sum(axis=0) * share
    length = math.sqrt(max(0.0, float(mean @ gram @ mean)))
    mean = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = np.zeros(count)
        for unit in units:
            cosine = min(1.0, max(-1.0, float(mean @ gram @ unit)))
            angle = math.acos(cosine)
            if angle < tol:
                continue
            sine = math.sin(angle)
            if sine < tol:  # opposite: every direction is equally good
                continue
            tangent += share * (angle / sine) * (unit - cosine * mean)
        size = math.sqrt(max(0.0, float(tangent @ gram @ tangent)))
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        length = math.sqrt(max(0.0, float(mean @ gram @ mean)))
        if length > tol:
            mean = mean / length
    return [float(value) for value in mean * float(norms.sum()) / count]


def stock_ratio(gram: np.ndarray, angle: str) -> float:
    """Return t of Model Stock: K cos / (1 + (K - 1) cos)."""
    count = len(gram)
    norms = _norms(gram)
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            cosine = gram[i, j] / max(norms[i] * norms[j], 1e-6 if angle == "cosine" else 1e-8)
            cosines.append(min(1.0, max(-1.0, float(cosine))))
    if angle == "cosine":
        cosine = math.fsum(cosines) / len(cosines)
        denominator = 1.0 + (count - 1) * cosine
        return 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
    cosine = math.cos(math.fsum(math.acos(value) for value in cosines) / len(cosines))
    return count * cosine / (1.0 + (count - 1) * cosine + 1e-8)


def _weighted_sum(
    work: Work,
    base: Flat | None,
    inputs: Sequence[Flat],
    coefficients: Sequence[float],
    scale: float,
    source: Source,
    sink: Sink,
    context: Context,
) -> None:
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        parts = [flat[start:stop] for flat in inputs]
        if base is None:
            arguments = (out, context.stats, parts, coefficients, 1.0)
            call("weighted_sum_", *arguments, wide=work.wide, backend=context.backend)
        else:
            arguments = (out, context.stats, base[start:stop], parts, coefficients, scale, 1.0)
            call("task_arithmetic_", *arguments, wide=work.wide, backend=context.backend)
        context.check(0, source, work.name, start, stop)
        read = [*parts, *([] if base is None else [base[start:stop]])]
        context.progress.advance(sum(flat.nbytes for flat in read))
