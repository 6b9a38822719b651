"""A row of the case table over whole arrays: the timed call, the loop beside it, the checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
from benchmarks.eager import EAGER
from benchmarks.kernel_checks import Expected, arguments_of, check, check_floor, expect
from benchmarks.measure import WrongResult
from pymerge.ops.native import cpu
from tests.case import Case, Inputs

__all__ = ["Kernel", "settings_kept"]


class Kernel:
    """One row of the case table on the CPU.

    elements: of each array.
    nbytes: read and written by one call of the kernel.
    loop_bytes: read and written by the streaming loop over the same arrays.
    """

    def __init__(self, case: Case, inputs: Inputs, slots: int = 2) -> None:
        base, models = inputs
        self.case = case
        self.inputs = inputs
        self.elements = base.numel()
        self.arguments = arguments_of(case, inputs)
        self.outputs = case.outputs(base, models, base.dtype)
        if "counts" in self.outputs and self.outputs["counts"].dim() == 3:
            shape = (max(2, slots), *self.outputs["counts"].shape[1:])
            self.outputs["counts"] = self.outputs["counts"].new_zeros(shape)
        self._out = self.outputs["out"] if case.streams_out else torch.empty_like(base)
        self._op = getattr(torch.ops.pymerge, case.op)
        self._base = self.arguments.get("base")
        # The loop reads whole models where the kernel reads only what they keep.
        self._models = self.arguments.get("models", models)
        if "model" in self.arguments:
            self._models = [self.arguments["model"]]
        read_bytes = sum(tensor.nbytes for tensor in self._read)
        self.loop_bytes = read_bytes + self._out.nbytes
        self.nbytes = _packed_bytes(self.arguments) if "masks" in self.arguments else read_bytes
        self.nbytes += self._out.nbytes if case.streams_out else 0
        # Ranks are additionally read or written.
        ranks = self.arguments.get("ranks"), self.outputs.get("ranks")
        self.nbytes += sum(tensor.nbytes for tensor in ranks if tensor is not None)

    @property
    def _read(self) -> list[torch.Tensor]:
        return [*self._models, *([] if self._base is None else [self._base])]

    @cached_property
    def expected(self) -> Expected:
        """Return the reference's results for the same arguments."""
        return expect(self.case, self.inputs, self.arguments)

    def clear(self) -> None:
        """Set counters and sums to zero; a table is also read, and stays."""
        for name in self.outputs.keys() - {"out", "table"}:
            self.outputs[name].zero_()

    def call(self) -> None:
        """Run the kernel."""
        self._op(**self.outputs, **self.arguments, backend="cpu")

    def stream(self, threads: int) -> None:
        """Run the streaming loop: read the same arrays, write as long an output, compute nothing.

        Its output is the kernel's: a kernel called afterwards must write all of it again.
        """
        cpu.streaming_floor(self._out, self._base, self._models, threads)

    def plain_torch(self) -> torch.Tensor:
        """Compute the same in plain torch."""
        return EAGER[self.case.name](self.arguments)

    def check(self, label: str) -> None:
        """Raise WrongResult unless the last call wrote what the reference writes, bit for bit."""
        check(label, self.expected, self.outputs, self.elements)

    def check_stream(self, threads: int) -> None:
        """Raise WrongResult unless the streaming loop reads all that it claims to read."""
        self.stream(threads)
        check_floor(self._out, self._read)

    def check_plain_torch(self, found: torch.Tensor) -> None:
        """Raise WrongResult unless plain torch is close to the reference."""
        for start, values in self.expected.stretches:
            part = found[start : start + values.numel()]
            close = part.dtype == values.dtype and torch.allclose(
                part, values, rtol=2**-7, atol=1e-6
            )
            if not close:
                raise WrongResult(f"{self.case.name}: plain torch computes something else")


def _packed_bytes(arguments: dict[str, Any]) -> int:
    """Return the bytes that a kernel reads of trimmed task vectors, base and gradient."""
    whole = [arguments[name] for name in ("base", "gradient") if name in arguments]
    parts = [one for name in ("masks", "values", "offsets") for one in arguments[name]]
    return sum(tensor.nbytes for tensor in (*whole, *parts))


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restore the numbers of threads and the instruction set at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cpu.use_isa(os.environ.get("PYMERGE_CPU_ISA") or "auto")
        cpu.set_threads(None)
