"""The records of a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pymerge.checkpoint import Checkpoint
from pymerge.config import MergeConfig, TensorParameters
from pymerge.memory import MemoryPlan
from pymerge.output import Layout
from pymerge.plan.statistics import StatisticsInputs

__all__ = ["MergePlan", "PlannedTensor"]


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor.

    `dtype` is the output's. `compute` is the arithmetic, "F32" or "F64"; None means that the tensor
    is copied (integers and booleans, which must be equal in all models). `parameters` are resolved
    for this tensor. `passes` is how often its inputs are normally read, `most_passes` how often in
    the worst case.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    compute: Literal["F32", "F64"] | None
    parameters: TensorParameters
    passes: int = 1
    most_passes: int = 1

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass
class MergePlan:
    """Everything that is decided before a tensor is read. It keeps the checkpoints open: close it.

    `base` is None for methods without one. `tensors` are in the order of the output files.
    `passes` and `bytes_to_read` are what the steps of the method's record normally take,
    `most_passes` and `most_bytes_to_read` what they take in the worst case: samples that mislead,
    signs that were guessed wrong. Steps on one tensor follow each other while it is in the page
    cache; `passes_text` describes which go over the whole model.
    `side_files` is the source of the config and tokenizer files. `device_memory` is None if it is
    half of the GPU's free memory.
    """

    config: MergeConfig
    base: Checkpoint | None
    models: list[Checkpoint]
    side_files: Path
    tensors: dict[str, PlannedTensor]
    layout: Layout
    passes: int
    most_passes: int
    passes_text: str
    bytes_to_read: int
    most_bytes_to_read: int
    bytes_to_write: int
    memory: MemoryPlan
    threads: int
    seed: int
    device: str = "cpu"
    device_memory: int | None = None
    warnings: list[str] = field(default_factory=list)
    statistics: StatisticsInputs = field(default_factory=StatisticsInputs)

    @property
    def inputs(self) -> list[Checkpoint]:
        """Return the base, if there is one, the models, and all files of statistics."""
        models = [*([] if self.base is None else [self.base]), *self.models]
        return [*models, *(file.checkpoint for file in self.statistics.all)]

    @property
    def parameters_count(self) -> int:
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def memory_bytes(self) -> int:
        return self.memory.total

    @property
    def slots(self) -> int:
        return self.memory.slots

    @property
    def slot_bytes(self) -> int:
        return self.memory.slot_bytes

    def close(self) -> None:
        """Close the checkpoints."""
        for checkpoint in self.inputs:
            checkpoint.close()

    def __enter__(self) -> MergePlan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for `pymerge plan --json`."""
        return {
            "method": self.config.method.name,
            "config": self.config.raw,
            "inputs": [
                {
                    "label": checkpoint.label,
                    "path": str(checkpoint.path),
                    "files": {str(path): size for path, size in checkpoint.files},
                    "tensors": len(checkpoint.tensors),
                    "dtypes": dtype_counts(info.dtype for info in checkpoint.tensors.values()),
                }
                for checkpoint in self.inputs
            ],
            "side_files": str(self.side_files),
            "output": {
                "tensors": len(self.tensors),
                "parameters": self.parameters_count,
                "dtypes": dtype_counts(tensor.dtype for tensor in self.tensors.values()),
                "shards": {shard.filename: shard.nbytes for shard in self.layout.shards},
                "bytes": self.bytes_to_write,
            },
            "passes": self.passes,
            "most_passes": self.most_passes,
            "passes_text": self.passes_text,
            "bytes_to_read": self.bytes_to_read,
            "most_bytes_to_read": self.most_bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory": {
                "total": self.memory.total,
                "slots": self.memory.slots,
                "slot_bytes": self.memory.slot_bytes,
                "histogram_bins": self.memory.histogram_bins,
                "sample_elements": self.memory.sample_elements,
                "buffer_bytes": self.memory.buffer_bytes,
                "matrix_bytes": self.memory.matrix_bytes,
                "solvers": self.memory.solvers,
                "folded_bytes": self.memory.folded_bytes,
            },
            "device": self.device,
            "device_memory": self.device_memory,
            "threads": self.threads,
            "seed": self.seed,
            "warnings": self.warnings,
        }


def dtype_counts(dtypes: Any) -> dict[str, int]:
    """Return how many tensors have which dtype, the most frequent first."""
    return dict(Counter(dtypes).most_common())
