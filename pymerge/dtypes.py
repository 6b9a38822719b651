"""The element types of safetensors files, and their counterparts in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymerge.errors import RequestError, nearest

if TYPE_CHECKING:
    import torch

__all__ = [
    "COPIED",
    "DTYPES",
    "FLOATS",
    "SUB_BYTE_DTYPES",
    "dtype_code",
    "is_float",
    "torch_dtype",
    "torch_name",
]

# code -> (bytes per element, name in torch)
_KNOWN: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "C64": (8, "complex64"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}

DTYPES: dict[str, int] = {code: size for code, (size, _) in _KNOWN.items()}
"""Bytes per element of each safetensors dtype code."""

FLOATS: tuple[str, ...] = ("F16", "BF16", "F32", "F64")
"""Codes of the dtypes that are merged, from narrow to wide: a merge of two is at least as wide as
both. `is_float` asks the same of torch's."""

_FLOAT_NAMES = frozenset(f"torch.{_KNOWN[code][1]}" for code in FLOATS)

COPIED: tuple[str, ...] = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
"""Codes of the dtypes that are copied, and must be equal in all models."""

SUB_BYTE_DTYPES: tuple[str, ...] = ("F4", "F6_E2M3", "F6_E3M2")
"""Codes that safetensors knows but whose elements are no whole bytes; they are refused by name."""


def torch_name(code: str) -> str:
    """Return the name that torch gives to a safetensors code, e.g. "bfloat16" for "BF16"."""
    if code not in _KNOWN:
        raise RequestError(f"dtype: unknown code {code!r}{nearest(code, _KNOWN)}")
    return _KNOWN[code][1]


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code.

    Args:
        code: a key of `DTYPES`.

    Raises:
        RequestError: the code is unknown, or this version of torch has no such dtype.
    """
    import torch

    name = torch_name(code)
    found = getattr(torch, name, None)
    if found is None:
        raise RequestError(f"dtype {code}: torch {torch.__version__} has no torch.{name}")
    return found


def is_float(dtype: torch.dtype) -> bool:
    """Return whether tensors of a torch dtype are merged: whether it is one of `FLOATS`."""
    return not isinstance(dtype, str) and str(dtype) in _FLOAT_NAMES


def dtype_code(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype.

    Args:
        dtype: a torch dtype with whole-byte elements.

    Raises:
        RequestError: safetensors has no code for it.
    """
    name = str(dtype).removeprefix("torch.")
    for code, (_, torch_name) in _KNOWN.items():
        if torch_name == name:
            return code
    raise RequestError(f"dtype: safetensors has no code for torch.{name}")
