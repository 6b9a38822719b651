"""Tensors of mixed dtypes and sizes, for the tests of the output."""

from __future__ import annotations

from pymerge.output import OutputTensor


def tensors_of(sizes: dict[str, tuple[str, tuple[int, ...]]]) -> list[OutputTensor]:
    return [OutputTensor(name, dtype, shape) for name, (dtype, shape) in sizes.items()]


MIXED = tensors_of(
    {
        "model.embed": ("BF16", (1000, 37)),
        "model.0.w": ("F32", (33, 65)),
        "model.0.mask": ("BOOL", (777,)),
        "model.0.empty": ("F32", (0, 8)),
        "model.0.scalar": ("F64", ()),
        "model.1.w": ("F16", (4097,)),
        "model.1.ids": ("I64", (513,)),
        "zz.empty": ("BF16", (0,)),
    }
)
