"""The weights that adapters produce, without torch: base + scale * (b a), and base * l.

The products that make up an element are added in the order of the rank, in float32 (float64 if the
base is), and the result is rounded once. The bits therefore do not depend on threads, instruction
sets or tiles.
"""

from __future__ import annotations

import numpy as np

from pymerge.ops.array import Array, widen
from pymerge.ops.native.host import HostCall, reason

__all__ = ["low_rank", "rescale", "store"]

_AT_ONCE = 1 << 20  # elements per block of rows when numpy computes


def low_rank(
    out: Array,
    base: Array | None,
    b: np.ndarray,
    a: np.ndarray,
    scale: float,
    *,
    reference: bool = False,
) -> None:
    """Write base + scale * (b a) to `out`; without a base, scale * (b a).

    Args:
        out: [rows * columns], F32, F16, BF16 or F64.
        base: the same number of elements; may be `None`.
        b: [rows, rank], contiguous float32.
        a: [rank, columns], contiguous float32.
        scale: factor of the product, rounded to float32.
        reference: compute with numpy, which is the definition, even if there are kernels.
    """
    rows, columns = b.shape[0], a.shape[1]
    numel = rows * columns
    if out.numel() != numel or (base is not None and base.numel() != numel):
        raise ValueError(f"low_rank: expected {numel} elements, got {out.numel()}")
    doubles = out.code == "F64" or (base is not None and base.code == "F64")
    if reference or doubles or reason() is not None:
        _by_numpy(out, base, b, a, scale, np.float64 if doubles else np.float32)
        return
    call = HostCall(out)
    call.native.low_rank(
        call.operand(out),
        call.operand(base),
        b.ctypes.data,
        a.ctypes.data,
        float(np.float32(scale)),
        rows,
        columns,
        b.shape[1],
    )


def _by_numpy(
    out: Array, base: Array | None, b: np.ndarray, a: np.ndarray, scale: float, kind: type
) -> None:
    rows, columns = b.shape[0], a.shape[1]
    step = max(1, _AT_ONCE // max(columns, 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        total = np.zeros((last - first, columns), kind)
        with np.errstate(over="ignore", invalid="ignore"):
            for j in range(b.shape[1]):
                total += b[first:last, j, None].astype(kind) * a[j].astype(kind)
            total *= kind(np.float32(scale))
            part = slice(first * columns, last * columns)
            if base is not None:
                total = widen(base[part], kind is np.float64).reshape(total.shape) + total
        store(out[part], total.reshape(-1))


def rescale(out: Array, base: Array, factors: np.ndarray, columns: int) -> None:
    """Write base * factors to `out`, in float32 (float64 if the base is), rounded once.

    Args:
        out, base: [rows * columns].
        factors: float32, [rows, 1] or [1, columns]; [1, 1] for neither.
        columns: number of columns of a matrix; 1 for a vector.
    """
    wide = "F64" in (out.code, base.code)
    rows = base.numel() // max(columns, 1)
    step = max(1, _AT_ONCE // max(columns, 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = slice(first * columns, last * columns)
        own = factors[first:last] if factors.shape[0] > 1 else factors
        values = widen(base[part], wide).reshape(last - first, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            store(out[part], (values * own).reshape(-1))


def store(out: Array, values: np.ndarray) -> None:
    """Round float32 or float64 values to the dtype of `out`, to nearest, ties to even."""
    if out.code == "F64":
        out.numpy()[:] = values
        return
    with np.errstate(over="ignore", invalid="ignore"):
        # Doubles are converted to 16 bits by way of float32, as in torch.
        single = np.ascontiguousarray(values, dtype=np.float32)
        if out.code != "BF16":
            out.numpy()[:] = single
            return
        bits = single.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        out.numpy()[:] = np.where(np.isnan(single), 0x7FC0, rounded)
