"""A row of the case table, and the inputs that rows are run on."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Inputs = tuple[torch.Tensor, list[torch.Tensor]]  # base, models

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
    "f64": (torch.float64, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """One op in one mode.

    arguments: builds the op's positional arguments after its outputs, from (base, models).
    outputs: builds the tensors that the op writes to, from (base, models, dtype of the result).
    compare: which outputs must be equal, after summing over slots where there are slots.
    oracle: computes `out` by other means than the reference, from base and [models, numel] in
        float64 and arrays of numpy.
    """

    name: str
    op: str
    arguments: Callable[[torch.Tensor, list[torch.Tensor]], dict[str, Any]]
    outputs: Callable[[torch.Tensor, list[torch.Tensor], torch.dtype], dict[str, torch.Tensor]]
    streams_out: bool = True  # writes a tensor as long as the inputs (for the bytes of a benchmark)
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    slow: bool = False  # tests take fewer sizes: the reference takes long, or others are like it

    def run(
        self,
        inputs: Inputs,
        dtype: torch.dtype,
        backend: str,
        wide: bool = False,
        place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> dict[str, torch.Tensor]:
        """Run the case and return its outputs. place: moves a tensor to where the backend works."""
        base, models = inputs
        outputs = {k: place(tensor) for k, tensor in self.outputs(base, models, dtype).items()}
        arguments = {k: _placed(v, place) for k, v in self.arguments(base, models).items()}
        self.call(outputs, arguments, backend, wide)
        return {name: tensor.cpu() for name, tensor in seen(outputs, base.numel()).items()}

    def call(
        self, outputs: dict[str, Any], arguments: dict[str, Any], backend: str, wide: bool = False
    ) -> None:
        """Call the op on the results of `outputs` and `arguments`, on any device."""
        in_float32 = self.op.startswith("pcb") or "pcb" in str(arguments.get("kind"))
        how = {} if self.op.startswith("pcb") else {"wide": wide and not in_float32}
        getattr(torch.ops.pymerge, self.op)(**outputs, **arguments, **how, backend=backend)


def seen(outputs: dict[str, torch.Tensor], numel: int) -> dict[str, torch.Tensor]:
    """Return the parts of outputs that must be the same everywhere."""
    found = dict(outputs)
    for name in ("scores", "ranks"):  # the padding of rows is unspecified
        if name in found:
            found[name] = found[name][:, :numel]
    if "counts" in found and found["counts"].dim() == 3:
        found["counts"] = found["counts"].sum(dim=0)
    return found


def _placed(argument: Any, place: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(argument, torch.Tensor):
        return place(argument)
    if isinstance(argument, list) and argument and isinstance(argument[0], torch.Tensor):
        return [place(tensor) for tensor in argument]
    return argument


def make_inputs(
    numel: int, count: int, dtypes: Sequence[torch.dtype], seed: str = "", misaligned: bool = False
) -> Inputs:
    """Return a base and models whose deltas have many equal magnitudes, zeros, subnormals and both
    signs."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{numel} {count} {seed}".encode()))

    def stored(values: torch.Tensor, k: int) -> torch.Tensor:
        tensor = values.to(dtypes[k % len(dtypes)])
        if not misaligned:
            return tensor
        # One element past an aligned address, in memory of its own.
        padded = torch.empty(numel + 1, dtype=tensor.dtype)
        padded[1:] = tensor
        return padded[1:]

    base = torch.randn(numel, generator=generator) * 0.02
    base[::7] = 0.0
    base[3::11] = -0.0
    base[5::13] = 1e-40  # subnormal
    models = []
    for _ in range(count):
        delta = torch.randn(numel, generator=generator) * 1e-2
        coarse = torch.rand(numel, generator=generator) < 0.5
        delta = torch.where(coarse, (delta * 128).round() / 128, delta)
        delta = torch.where(torch.rand(numel, generator=generator) < 0.1, torch.zeros(()), delta)
        models.append(base + delta)
    for k in range(1, count, 2):  # cancelling votes
        cancel = torch.rand(numel, generator=generator) < 0.2
        models[k] = torch.where(cancel, 2 * base - models[k - 1], models[k])
    return stored(base, 0), [stored(model, k + 1) for k, model in enumerate(models)]


def weights_of(count: int) -> list[float]:
    return [1.0, 0.75, -0.4, 0.3, 1.1][:count] + [0.1 * (k + 1) for k in range(5, count)]


def thresholds(base: torch.Tensor, models: Sequence[torch.Tensor], share: float = 0.8) -> list[int]:
    """Return keys such that about `share` of each task vector is below its key."""
    wide = torch.float64 in [base.dtype, *(model.dtype for model in models)]
    dtype, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    keys = []
    for model in models:
        magnitude = (model.to(dtype) - base.to(dtype)).abs()
        rank = max(1, int(share * magnitude.numel()))
        keys.append(int(magnitude.kthvalue(rank).values.view(bits)) if magnitude.numel() else 0)
    return keys


def padded(numel: int) -> int:
    return -(-numel // 64) * 64


def columns_of(numel: int) -> int:
    """Return the length of a row: one that divides the number of elements."""
    lengths = (4096, 341, 17, 11, 7, 3)
    return next((c for c in lengths if numel % c == 0), max(numel, 1))
