"""Memory: how much a merge will take (one model for plan and engine), and how much it took."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pymerge.byte_sizes import format_size
from pymerge.errors import RequestError

__all__ = [
    "CHUNKS",
    "PIECES",
    "TILES",
    "DeviceSizes",
    "MemoryPlan",
    "PeakMemory",
    "available_memory",
    "default_threads",
    "device_sizes",
    "plan_memory",
]

MIB = 1 << 20

# Python, torch (which only some backends import) and the libraries they load, measured after
# import, with room for a page of headers per tensor. It does not depend on the models.
FIXED_BYTES = 256 * MIB

MAX_SLOTS, MIN_SLOTS = 4, 2
MAX_SLOT_BYTES, MIN_SLOT_BYTES = 16 * MIB, 1 * MIB
MAX_BINS, MIN_BINS = 1 << 18, 1 << 12
MAX_BINS_OF_ALL = 1 << 20  # for all models together: more models do not take more memory
MAX_SAMPLES, MIN_SAMPLES = 1 << 17, 1 << 14

# Computing on a GPU: page-locked chunks for inputs on their way to it, tiles of inputs on it, and
# pieces of output, each of which has a buffer on both sides.
CHUNKS, TILES, PIECES = 3, 2, 3
MAX_BUFFER_BYTES, MIN_BUFFER_BYTES = 16 * MIB, 1 * MIB
TILE_BUFFERS = 8  # a tile holds as much input as this many buffers
# Roughly what torch and the driver allocate on the host for a CUDA device.
CUDA_FIXED_BYTES = 768 * MIB

# For a sampled element while one model's bracket is sought: base, model and delta in float64, its
# key, and the keys of all tensors concatenated and partitioned. The sample itself comes on top.
SAMPLE_BYTES = 48


@dataclass(frozen=True)
class MemoryPlan:
    """How much anonymous memory a merge takes, and for what.

    slots x slot_bytes: output waiting to be written.
    histogram_bins: bins of each histogram of |delta|: 4-byte counts per thread and model, and two
        rows of 8-byte sums per model. 0 if nothing is selected.
    sample_elements: most elements sampled to guess where a threshold lies, one model at a time.
    buffer_bytes: size of each of CHUNKS + PIECES page-locked buffers; 0 if the CPU computes.
    matrix_bytes: for the largest linear system (RegMean); 0 if none is solved.
    solvers: threads that solve one, each with its own right-hand sides in matrix_bytes.
    folded_bytes: for weights into which an adapter is folded, one tensor at a time.
    total: everything, with the interpreter and torch. Inputs are memory-mapped and belong to the
        page cache: the kernel reclaims that when it needs it.
    """

    slots: int
    slot_bytes: int
    histogram_bins: int
    sample_elements: int
    total: int
    buffer_bytes: int = 0
    matrix_bytes: int = 0
    solvers: int = 0
    folded_bytes: int = 0


@dataclass(frozen=True)
class DeviceSizes:
    """How much of a GPU's memory a merge takes, and for what.

    buffer_bytes: size of each of PIECES pieces of output, and of a page-locked buffer on the host.
    tile_bytes: size of each of TILES tiles of inputs.
    resident_bytes: for tensors that stay on the GPU between the passes over them.
    """

    buffer_bytes: int
    tile_bytes: int
    resident_bytes: int

    @property
    def total(self) -> int:
        return _rings(self.buffer_bytes) + self.resident_bytes

    def halved(self) -> DeviceSizes | None:
        """Return the sizes to try if these were too much; None if they are the smallest."""
        if self.buffer_bytes <= MIN_BUFFER_BYTES:
            return None
        return device_sizes(self.total // 2, self.buffer_bytes // 2)


def _rings(buffer_bytes: int) -> int:
    return (PIECES + TILES * TILE_BUFFERS) * buffer_bytes


def device_sizes(budget: int, buffer_bytes: int = MAX_BUFFER_BYTES) -> DeviceSizes:
    """Return sizes that fit a merge into a GPU's memory. Results do not depend on them.

    Args:
        budget: bytes to stay within, if that is possible at all.
        buffer_bytes: the largest buffer to use.
    """
    while _rings(buffer_bytes) > budget and buffer_bytes > MIN_BUFFER_BYTES:
        buffer_bytes //= 2
    rest = max(0, budget - _rings(buffer_bytes))
    return DeviceSizes(buffer_bytes, TILE_BUFFERS * buffer_bytes, rest)


def plan_memory(
    limit: int,
    *,
    models: int,
    threads: int,
    selects: bool,
    staged: bool = False,
    matrices: int = 0,
    solvers: int = 0,
    folded: int = 0,
) -> MemoryPlan:
    """Return a plan that fits a merge into a limit.

    Everything starts at the fastest size; the largest part is halved until the sum fits. Results
    do not depend on the plan.

    Args:
        limit: bytes; `--memory`.
        models: number of fine-tuned models, K.
        threads: number of compute threads.
        selects: whether order statistics of |delta| are needed (a trim).
        staged: whether a GPU computes.
        matrices: bytes of matrices that must be held as a whole; they cannot be made smaller.
        solvers: number of threads that these bytes allow for; only passed on.
        folded: bytes of weights that adapters are folded into; they cannot be made smaller.

    Raises:
        RequestError: not even the smallest sizes fit; names the smallest sufficient limit.
    """
    bins = most_bins(models) if selects else 0
    samples = MAX_SAMPLES if selects else 0
    slots, slot_bytes = MAX_SLOTS, MAX_SLOT_BYTES
    buffer_bytes = MAX_BUFFER_BYTES if staged else 0
    fixed = FIXED_BYTES + (CUDA_FIXED_BYTES if staged else 0) + matrices + folded
    while True:
        parts = {
            "histogram": models * bins * (4 * threads + 16),
            "samples": samples * (SAMPLE_BYTES + 8 * (models + 1)),
            "slots": slots * slot_bytes,
            "buffers": (CHUNKS + PIECES) * buffer_bytes,
        }
        total = fixed + sum(parts.values())
        if total <= limit:
            return MemoryPlan(
                slots, slot_bytes, bins, samples, total, buffer_bytes, matrices, solvers, folded
            )
        smaller = {
            "histogram": bins > MIN_BINS,
            "samples": samples > MIN_SAMPLES,
            "slots": slot_bytes > MIN_SLOT_BYTES or slots > MIN_SLOTS,
            "buffers": buffer_bytes > MIN_BUFFER_BYTES,
        }
        shrinkable = [part for part in parts if smaller[part]]
        if not shrinkable:
            least = -(-total // MIB)
            raise RequestError(
                f"memory: {format_size(limit)} is too little for {models} models and {threads} "
                f"threads; the smallest that works is {least}MiB"
            )
        largest = max(shrinkable, key=lambda part: parts[part])
        if largest == "histogram":
            bins //= 2
        elif largest == "samples":
            samples //= 2
        elif largest == "buffers":
            buffer_bytes //= 2
        elif slot_bytes > MIN_SLOT_BYTES:
            slot_bytes //= 2
        else:
            slots //= 2


def most_bins(models: int) -> int:
    """Return how many bins the histogram of one model gets if memory is not short."""
    bins = MAX_BINS
    while bins * models > MAX_BINS_OF_ALL and bins > MIN_BINS:
        bins //= 2
    return bins


def default_threads() -> int:
    """Return the number of processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes available without swapping, including the page cache; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Watches this process while a `with` block runs.

    `anonymous` is the peak of RssAnon, sampled every 20 ms (memory that the process allocated,
    without mapped files); `resident` is the process's highest resident size so far. Both are in
    bytes; if the system has no /proc, `anonymous` is the resident size too.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.anonymous = 0
        self.resident = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="pymerge-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        anonymous, resident = _memory_now()
        self.anonymous = max(self.anonymous, anonymous)
        self.resident = max(self.resident, resident)


def _memory_now() -> tuple[int, int]:
    """Return the current anonymous memory and the resident peak, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _resource_usage()
    fields: dict[str, int] = {}
    for line in status.splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "VmHWM"):
            fields[name] = int(rest.split()[0]) * 1024
    if "RssAnon" not in fields or "VmHWM" not in fields:
        return _resource_usage()
    return fields["RssAnon"], fields["VmHWM"]


def _resource_usage() -> tuple[int, int]:
    try:
        import resource
    except ImportError:
        return 0, 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, except on macOS
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, peak
