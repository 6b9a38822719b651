"""Applies any merge method to the deltas of adapters, one matrix at a time.

To the engine, the base is zero and a model is the delta of an adapter. So whole-model thresholds,
elections and masks are those of the methods themselves. A delta is computed when it is loaded and
freed after its use; each merged matrix is truncated to a low rank at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pymerge.adapters.arithmetic import union
from pymerge.adapters.decompose import LowRank
from pymerge.checkpoint.peft.adapter import Adapter, Module
from pymerge.engine.context import Context
from pymerge.engine.execute import execute
from pymerge.engine.work import Progress, TensorStatistics, Work, no_progress
from pymerge.memory import most_bins
from pymerge.methods import MethodSpec
from pymerge.ops.array import Array, Flat, as_tensor

__all__ = ["DeltaSource", "merge_deltas"]

Finish = Callable[[Module, torch.Tensor], LowRank]


class DeltaSource:
    """The deltas of adapters as models, and zeros as their base; missing modules are zeros."""

    def __init__(self, adapters: Sequence[Adapter], modules: Mapping[str, Module], based: bool):
        """
        Args:
            modules: by the name of the tensor.
            based: whether the method has a base.
        """
        self.labels = [*(["zero"] if based else []), *(adapter.label for adapter in adapters)]
        self._adapters = adapters
        self._modules = modules
        self._based = based
        self._zeros = np.zeros(max(_numel(m) for m in modules.values()), np.float32)
        self._made: tuple[str, list[Flat]] | None = None

    def describe(self, name: str) -> str:
        return f"the delta of tensor {name!r}"

    def nbytes(self, name: str) -> int:
        return 4 * _numel(self._modules[name]) * len(self.labels)

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        module = self._modules[name]
        base = Array.of(self._zeros, "F32")[: _numel(module)] if self._based else None
        if self._made is None or self._made[0] != name:
            self._made = None
            self._made = (name, [self._flat(adapter, name) for adapter in self._adapters])
        return base, list(self._made[1])

    def _flat(self, adapter: Adapter, name: str) -> Flat:
        delta = self.delta(adapter, name)
        if delta is None:
            return Array.of(self._zeros, "F32")[: _numel(self._modules[name])]
        return Array.of(delta.reshape(-1), "F32")

    def delta(self, adapter: Adapter, name: str) -> np.ndarray | None:
        """Return the delta of a tensor, or None if the adapter does not change it."""
        module = self._modules[name]
        return adapter.delta(module.name) if module.name in adapter.modules else None

    def statistics(self, name: str) -> TensorStatistics:
        raise NotImplementedError  # methods that need them are refused

    def announce(self, names: Sequence[str]) -> None:
        pass

    def can_hold(self, nbytes: int) -> bool:
        return True

    def release(self, name: str) -> None:
        if self._made is not None and self._made[0] == name:
            self._made = None


class _Factors:
    """A sink that truncates each matrix to a low rank when it is complete."""

    def __init__(self, modules: Mapping[str, Module], finish: Finish) -> None:
        self.found: dict[str, LowRank] = {}
        self._modules = modules
        self._finish = finish

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        module = self._modules[name]
        values = np.empty(_numel(module), np.float32)
        yield 0, Array.of(values, "F32")
        matrix = as_tensor(Array.of(values, "F32")).view(module.matrix)
        self.found[module.name] = self._finish(module, matrix.T if module.transposed else matrix)

    def restart(self) -> None:
        self.found.clear()


def merge_deltas(
    spec: MethodSpec,
    adapters: Sequence[Adapter],
    resolve: Callable[[str], Mapping[str, Any]],
    finish: Finish,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, LowRank]:
    """Merge the deltas of adapters with a method and return the factors of each module.

    Args:
        spec: a method without statistics or files.
        resolve: returns the parameters of a tensor, given its name.
        finish: truncates a merged delta, [out, in], to a low rank.
        seed: of random masks, if the parameters have none.
    """
    modules = {module.weight: module for module in union(adapters, "merge_adapters").values()}
    works = [
        Work(name, _numel(module), False, False, resolve(name), module.matrix)
        for name, module in sorted(modules.items())
    ]
    source = DeltaSource(adapters, modules, spec.with_base(True))
    sink = _Factors(modules, finish)
    context = Context(
        bins=most_bins(len(adapters)),
        nan=works[0].parameters.get("nan", "error"),
        seed=seed,
        progress=progress,
    )
    execute(spec, works, source, sink, context)
    return sink.found


def _numel(module: Module) -> int:
    rows, columns = module.matrix
    return rows * columns
