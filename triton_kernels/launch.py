"""Launches kernels: chooses block sizes and numbers of warps, and searches for better ones.

Kernels here run more than once for a call only while they are tuned, and then on scratch copies of
everything that they add to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .divergence import divergence_sums_kernel, row_importance_kernel
from .magnitude import magnitude_equal_counts_kernel, magnitude_histogram_kernel
from .packed import packed_dots_kernel, packed_sum_kernel
from .pcb import pcb_kernel
from .pointwise import pointwise_kernel
from .sparse import sparse_merge_kernel
from .sums import SUM_CHUNK, chunk_sums_kernel
from .ties import ties_kernel
from .value import CODES, INTERPRETED, ROW
from .weighted_sum import row_weighted_sum_kernel, weighted_sum_kernel

__all__ = ["CODES", "INTERPRETED", "KERNELS", "ROW", "Config", "Launch", "run", "unrolled"]

KERNELS: dict[str, Any] = {
    "weighted_sum": weighted_sum_kernel,
    "ties": ties_kernel,
    "magnitude_histogram": magnitude_histogram_kernel,
    "magnitude_equal_counts": magnitude_equal_counts_kernel,
    "sparse_merge": sparse_merge_kernel,
    "pointwise": pointwise_kernel,
    "pcb": pcb_kernel,
    "chunk_sums": chunk_sums_kernel,
    "row_weighted_sum": row_weighted_sum_kernel,
    "divergence_sums": divergence_sums_kernel,
    "row_importance": row_importance_kernel,
    "packed_sum": packed_sum_kernel,
    "packed_dots": packed_dots_kernel,
}
_BY_CHUNKS = ("chunk_sums", "divergence_sums", "packed_dots")  # a block consists of whole chunks
_KEEPING = ("ties", "sparse_merge", "pointwise")  # they keep loaded values of each model
_PAIRWISE = ("pcb", "chunk_sums")  # their code grows with the square of the number of models
_PACKED = ("packed_sum", "packed_dots")  # their code for each model is long

_CHUNK = int(SUM_CHUNK.value)
# Smaller calls end before a better configuration could pay off.
_WORTH_TUNING = 1 << 20
_REPETITIONS = 5


@dataclass(frozen=True)
class Config:
    """The elements of a program, a power of two that divides a hot chunk, and its number of
    warps."""

    block: int
    warps: int


_CANDIDATES = [
    Config(512, 4),
    Config(1024, 4),
    Config(1024, 8),
    Config(2048, 4),
    Config(2048, 8),
    Config(4096, 8),
    Config(4096, 16),
]


def unrolled(kernel: str) -> int:
    """Return the largest number of models that a kernel is compiled for; beyond it, the kernel
    loops."""
    return 8 if kernel in (*_PAIRWISE, *_PACKED) else 16


@dataclass
class Launch:
    """A call of a kernel.

    arguments: the kernel's arguments by name, except BLOCK.
    numel: number of elements, which with `units` determines the number of programs if `programs`
    does not.
    models: the number of models, whatever number the kernel gets.
    scratch: names of arguments that the kernel adds to; those that are None are ignored.
    units: programs that share a block of elements.
    span: the number of elements that blocks divide, if that is not `numel`.
    """

    kernel: str
    arguments: dict[str, Any]
    numel: int
    models: int
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    programs: int | None = None
    scratch: tuple[str, ...] = ()
    units: int = 1
    span: int | None = None

    def keywords(self, config: Config) -> dict[str, Any]:
        """Return all arguments of the kernel."""
        # No fused operations: the definition rounds twice.
        options = {"num_warps": config.warps, "enable_fp_fusion": False}
        return {**self.arguments, "BLOCK": config.block, **options}

    def start(self, config: Config) -> None:
        """Start the kernel on the device's current stream without waiting."""
        span = self.numel if self.span is None else self.span
        programs = self.programs or -(-span // config.block) * self.units
        KERNELS[self.kernel][(programs,)](**self.keywords(config))


def default_config(launch: Launch) -> Config:
    """Return a fixed configuration: 16 bytes per thread and tensor, where registers allow it."""
    if INTERPRETED.value:  # for the interpreter, a program costs as much as its elements
        return Config(16384 if launch.kernel in _BY_CHUNKS else 2048, 4)
    if launch.kernel in _BY_CHUNKS:
        return Config(4096, 2)  # chunks of 1024, each processed 16 elements at a time
    if launch.kernel == "packed_sum":
        return Config(_CHUNK, 4)
    if launch.kernel.startswith("magnitude"):
        return Config(2048, 8)  # all programs add to the same few counters
    width = max(dtype.itemsize for dtype in launch.dtypes)
    if launch.kernel == "pcb":
        # It is bound by computation more than by memory, and each model takes many registers.
        return Config({1: 512, 2: 512, 3: 256, 4: 256}.get(launch.models, 128), 4)
    # The votes of all models are kept: 8 elements of 16 models are too much for a thread.
    if launch.kernel in _KEEPING and 8 < launch.models <= unrolled(launch.kernel):
        return Config(512 if width < 8 else 256, 4)
    return Config(1024 if width == 2 else 512, 4)


def candidates(launch: Launch) -> list[Config]:
    """Return the configurations that a search tries, the fixed one first."""
    first = default_config(launch)
    if launch.kernel in _BY_CHUNKS:
        return [first, Config(2048, 1), Config(8192, 4), Config(16384, 4)]
    # More elements per thread than these would only spill registers.
    keeps = launch.kernel == "pcb" or (launch.kernel in _KEEPING and launch.models > 4)
    most = 4 if keeps else 16
    least = _CHUNK if launch.kernel == "packed_sum" else 0  # whole chunks
    others = [c for c in _CANDIDATES if c != first and least <= c.block <= most * 32 * c.warps]
    return [first, *others]


_chosen: dict[Hashable, Config] = {}


def run(launch: Launch) -> None:
    """Run a kernel with the best configuration known."""
    if launch.device.type != "cuda":
        launch.start(default_config(launch))
        return
    with torch.cuda.device(launch.device):
        launch.start(_config(launch, _elapsed))


def _config(launch: Launch, elapsed: Callable[[Launch, Config], float]) -> Config:
    if os.environ.get("PYMERGE_TRITON_AUTOTUNE", "0") != "1" or launch.numel < _WORTH_TUNING:
        return default_config(launch)
    modes = tuple(
        (name, value) for name, value in launch.arguments.items() if isinstance(value, (str, bool))
    )
    bucket = (launch.models - 1).bit_length()
    key = (launch.kernel, launch.device.index, bucket, frozenset(launch.dtypes), modes)
    if key not in _chosen:
        _chosen[key] = min(candidates(launch), key=lambda config: elapsed(launch, config))
    return _chosen[key]


def _elapsed(launch: Launch, config: Config) -> float:
    """Return the milliseconds of one run, measured on copies of what the kernel adds to."""
    copies = {
        name: launch.arguments[name].clone()
        for name in launch.scratch
        if launch.arguments[name] is not None
    }
    trial = replace(launch, arguments={**launch.arguments, **copies})
    trial.start(config)  # compiles
    times = []
    for _ in range(_REPETITIONS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        trial.start(config)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]
