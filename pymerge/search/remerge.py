"""Merges the same checkpoints repeatedly, with other coefficients.

Whatever does not change is kept: opened and mapped files, thresholds by density, scores' thresholds
by ratio, Gram matrices, and tensors whose parameters are the same as in the last merge.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pymerge.byte_sizes import format_size, parse_size
from pymerge.config import MergeConfig, load_config
from pymerge.dtypes import torch_dtype
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Work
from pymerge.errors import RequestError
from pymerge.memory import MAX_SAMPLES, most_bins
from pymerge.merging.files import CheckpointSource
from pymerge.merging.gpu.place import choose_place
from pymerge.merging.tensors import MemorySink
from pymerge.methods import MethodSpec
from pymerge.ops.runner import Runner
from pymerge.ops.threads import kernel_threads
from pymerge.plan import MergePlan, make_plan
from pymerge.plan.parameters import resolve_parameters

if TYPE_CHECKING:
    import torch

    from pymerge.ops.array import Flat

__all__ = ["Merged", "Remerger"]

_MOST_KEPT = 1 << 16  # statistics of scopes, keyed by the settings on which they depend


@dataclass
class Merged:
    """The memory of a merged model, and the parameters with which each tensor was merged.

    A worker has one and uses it for every merge. `tensors` are those that the checkpoint would
    have, by name; the receiver must neither write to them nor keep them.
    """

    tensors: dict[str, torch.Tensor]
    parameters: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    def was_written(self) -> str | None:
        """Return a tensor that was changed in place since the merge, or None."""
        for name, version in self.versions.items():
            if self.tensors[name]._version != version:
                return name
        return None

    def forget(self) -> None:
        """Make the next merge compute all tensors anew."""
        self.parameters.clear()


class Remerger:
    """Merges the checkpoints of a configuration with any coefficients, in memory, on the CPU.

    The tensors of a merge are those that `merge_checkpoints` writes for the same configuration, bit
    for bit, whatever was merged before.

    Args:
        config: a merge configuration, as for `merge_checkpoints`.
        memory: limit for the merged models together, and what merging itself needs.
        threads: of the CPU kernels; default one for each core.
        backend: "auto", "cpu" or "reference" (slow).
        seed: for random masks.
        copies: merged models that will be held at the same time.

    Raises:
        RequestError: the configuration is invalid, or the merged models are larger
            than `memory`.

    >>> with Remerger("merge.yml") as remerger:  # doctest: +SKIP
    ...     tensors = remerger.merge().tensors
    """

    def __init__(
        self,
        config: Any,
        *,
        memory: int | str = "8GiB",
        threads: int | None = None,
        backend: str | None = "auto",
        seed: int = 0,
        copies: int = 1,
    ) -> None:
        self.config = config if isinstance(config, MergeConfig) else load_config(config)
        place = choose_place(self.config.dialect, "cpu", backend)
        limit = parse_size(memory, "memory")
        self.plan: MergePlan = make_plan(self.config, memory=limit, threads=threads, seed=seed)
        self.bytes = self.plan.bytes_to_write
        try:
            self._check_memory(limit, copies)
        except BaseException:
            self.plan.close()
            raise
        self.seed = seed
        self.warnings = [*self.plan.warnings, *place.warnings]
        # The first configuration may select nothing while others do.
        self._bins = self.plan.memory.histogram_bins or most_bins(len(self.plan.models) + 1)
        self._sample = self.plan.memory.sample_elements or MAX_SAMPLES
        self._runner_name = place.ops or place.backend
        self._memo: dict[Hashable, Any] = {}
        self._source = _Held(self.plan.base, self.plan.models, self.plan.statistics)
        self._lock = threading.Lock()
        self._closed = False
        self._threads = ExitStack()
        self._threads.enter_context(kernel_threads(self.plan.threads))

    def _check_memory(self, limit: int, copies: int) -> None:
        beside = self.plan.memory.total - self.plan.slots * self.plan.slot_bytes
        need = copies * self.bytes + beside
        if need > limit:
            raise RequestError(
                f"memory: {copies} merged model{'s' if copies > 1 else ''} of "
                f"{format_size(self.bytes)} in memory, and {format_size(beside)} to merge, are "
                f"more than {format_size(limit)}; raise it, take fewer workers, or let the metric "
                "receive a folder"
            )

    def resolve(self, config: MergeConfig) -> list[Work]:
        """Return the tensors to merge, with the parameters that a configuration assigns."""
        same = config.method is self.config.method
        if not same or config.paths != self.config.paths:
            raise RequestError(
                f"{config.where}: method and models must be those of the first configuration"
            )
        problems: list[str] = []
        names = [name for name, tensor in self.plan.tensors.items() if tensor.compute is not None]
        resolved = resolve_parameters(config, names, problems)
        if problems:
            raise RequestError(problems)
        return [
            Work(
                tensor.name,
                tensor.numel,
                tensor.compute == "F64",
                tensor.compute is None,
                resolved.get(tensor.name, {}),
                tensor.shape,
            )
            for tensor in self.plan.tensors.values()
        ]

    def memory_for(self) -> Merged:
        """Return memory for a merged model."""
        import torch

        return Merged(
            {
                tensor.name: torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
                for tensor in self.plan.tensors.values()
            }
        )

    def merge(self, config: Any = None, into: Merged | None = None) -> Merged:
        """Merge with the parameters of a configuration (default: the first one).

        Args:
            config: the configuration, of the same method and models.
            into: from an earlier merge or `memory_for`; default new memory.

        Raises:
            RequestError: a parameter is out of range, or an input contains NaN or infinity.
        """
        if config is None:
            config = self.config
        elif not isinstance(config, MergeConfig):
            config = load_config(config)
        works = self.resolve(config)
        merged = into if into is not None else self.memory_for()
        method = config.method
        total = sum(work.numel for work in works if not work.copied)
        todo = [work for work in works if not _is_there(work, method, total, merged)]
        nan = next((work.parameters["nan"] for work in works if not work.copied), "error")
        with self._lock:  # one merge uses all cores
            if len(self._memo) > _MOST_KEPT:
                self._memo.clear()
            context = Context(
                backend=Runner(self._runner_name),
                bins=self._bins,
                sample=self._sample,
                nan=nan,
                seed=self.seed,
                solvers=self.plan.memory.solvers,
                memo=self._memo,
            )
            merged.forget()
            execute(method, todo, self._source, MemorySink(merged.tensors), context)
        merged.parameters.update({work.name: work.parameters for work in works})
        merged.versions = {name: tensor._version for name, tensor in merged.tensors.items()}
        return merged

    def close(self) -> None:
        """Release the files."""
        if self._closed:
            return
        self._closed = True
        self._source.close()
        self.plan.close()
        self._threads.close()

    def __enter__(self) -> Remerger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _is_there(work: Work, method: MethodSpec, total: int, merged: Merged) -> bool:
    """Return whether the last merge left the tensor that this one would compute."""
    if merged.parameters.get(work.name) != work.parameters:
        return False
    return work.copied or method.alone(work.parameters, work.numel, total)


class _Held(CheckpointSource):
    """Checkpoints that stay mapped between merges: nothing is released."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        self._loaded: dict[str, tuple[Flat | None, list[Flat]]] = {}

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        found = self._loaded.get(name)
        if found is None:
            found = self._loaded[name] = super().load(name)
        return found

    def announce(self, names: Sequence[str]) -> None:
        if any(name not in self._loaded for name in names):
            super().announce(names)

    def can_hold(self, nbytes: int) -> bool:
        return True

    def release(self, name: str) -> None:
        self._ahead = max(0, self._ahead - self.nbytes(name))
