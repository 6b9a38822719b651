"""One-dimensional arrays over mapped files and output slots, without torch.

Importing torch takes longer than merging a small model, and the CPU kernels need only addresses.
The engine therefore passes them an `Array`; `tensor()` makes a torch tensor over the same memory
where another backend computes. The functions here accept either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from pymerge.dtypes import DTYPES, dtype_code, torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["Array", "Flat", "as_array", "as_flat", "as_tensor", "widen"]

# The numpy dtype of the elements. Numpy lacks bfloat16, which is viewed as bits.
_NUMPY = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": np.uint16,
}


class Array:
    """A run of elements in memory that `owner` keeps alive.

    Attributes:
        code: the dtype's safetensors code, e.g. "BF16".
    """

    __slots__ = ("_address", "_numel", "_owner", "code")

    def __init__(self, owner: Any, address: int, code: str, numel: int) -> None:
        self._owner = owner
        self._address = address
        self._numel = numel
        self.code = code

    @classmethod
    def of(cls, values: np.ndarray, code: str) -> Array:
        """Return an array over the memory of a contiguous numpy array."""
        return cls(values, values.ctypes.data, code, values.nbytes // DTYPES[code])

    def numel(self) -> int:
        return self._numel

    @property
    def nbytes(self) -> int:
        return self._numel * DTYPES[self.code]

    def data_ptr(self) -> int:
        return self._address if self._numel else 0

    def __getitem__(self, part: slice) -> Array:
        """Return elements [start, stop), clipped to the array."""
        start, stop, _ = part.indices(self._numel)
        offset = start * DTYPES[self.code]
        return Array(self._owner, self._address + offset, self.code, max(0, stop - start))

    def numpy(self) -> np.ndarray:
        """Return a numpy view: floats as such, bfloat16 as bits, other dtypes as bytes."""
        kind = _NUMPY.get(self.code, np.uint8)
        return np.frombuffer(memoryview(self._buffer()), dtype=kind)

    def bytes(self) -> Array:
        """Return the same memory as bytes."""
        return Array(self._owner, self._address, "U8", self.nbytes)

    def tensor(self) -> torch.Tensor:
        """Return a torch tensor over the memory."""
        import torch

        if self._numel == 0:
            return torch.empty(0, dtype=torch_dtype(self.code))
        return torch.frombuffer(self._buffer(), dtype=torch_dtype(self.code), count=self._numel)

    def _buffer(self) -> ctypes.Array[ctypes.c_char]:
        buffer = (ctypes.c_char * self.nbytes).from_address(self._address)
        buffer.owner = self._owner  # type: ignore[attr-defined]  # kept alive as long as a view
        return buffer


Flat: TypeAlias = Union[Array, "torch.Tensor"]
"""A 1-D run of elements: an `Array`, or a contiguous torch tensor."""


def as_array(flat: Flat) -> Array:
    """Return an array over the same memory; a tensor on another device is copied to the host."""
    if isinstance(flat, Array):
        return flat
    if flat.device.type != "cpu":
        flat = flat.cpu()
    return Array(flat, flat.data_ptr(), dtype_code(flat.dtype), flat.numel())


def as_flat(values: np.ndarray | torch.Tensor) -> Flat:
    """Return an array over the memory of numpy floats; return a tensor unchanged."""
    if not isinstance(values, np.ndarray):
        return values
    return Array.of(values, "F64" if values.dtype == np.float64 else "F32")


def as_tensor(flat: Flat) -> torch.Tensor:
    """Return a tensor over the same memory."""
    return flat.tensor() if isinstance(flat, Array) else flat


def widen(flat: Array, wide: bool) -> np.ndarray:
    """Return the values as float32, or as float64 if `wide`."""
    values = flat.numpy()
    if flat.code == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64 if wide else np.float32, copy=False)


def sample_lines(flat: Flat, stride: int, lines: int, line: int) -> Array:
    """Return a copy of `lines` stretches of `line` elements, `stride` elements apart."""
    if not isinstance(flat, Array) and flat.device.type != "cpu":
        # Only the sample leaves the device.
        return as_array(flat.as_strided((lines, line), (stride, 1)).contiguous().view(-1))
    array = as_array(flat)
    values = array.numpy()
    steps = (stride * values.itemsize, values.itemsize)
    view = np.lib.stride_tricks.as_strided(values, (lines, line), steps, writeable=False)
    return Array.of(np.ascontiguousarray(view).reshape(-1), array.code)


def concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the arrays; a single array is returned without a copy."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
