"""Sources and sinks over tensors in memory: what `pymerge.merge` runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from pymerge.engine.work import TensorStatistics
from pymerge.ops.array import Flat

__all__ = ["MemorySink", "MemorySource"]


class MemorySource:
    """Inputs that are dictionaries of tensors with equal keys."""

    def __init__(
        self,
        labels: Sequence[str],
        base: Mapping[str, torch.Tensor] | None,
        models: Sequence[Mapping[str, torch.Tensor]],
        shown: Mapping[str, str],
        statistics: Callable[[str], TensorStatistics] | None = None,
    ) -> None:
        """
        Args:
            statistics: gives what was collected of a tensor, for methods that need it.
        """
        self.labels = labels
        self._statistics = statistics
        self._base = base
        self._models = models
        self._shown = shown

    def describe(self, name: str) -> str:
        return self._shown[name]

    def nbytes(self, name: str) -> int:
        base, models = self.load(name)
        return sum(model.nbytes for model in models) + (0 if base is None else base.nbytes)

    def load(self, name: str) -> tuple[Flat | None, list[Flat]]:
        base = None if self._base is None else _flat(self._base[name])
        return base, [_flat(model[name]) for model in self._models]

    def statistics(self, name: str) -> TensorStatistics:
        assert self._statistics is not None
        return self._statistics(name)

    def announce(self, names: Sequence[str]) -> None:
        pass

    def can_hold(self, nbytes: int) -> bool:
        return True

    def release(self, name: str) -> None:
        pass


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1)


class MemorySink:
    """Results as new tensors, by name, in `tensors`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def pieces(self, name: str) -> Iterable[tuple[int, Flat]]:
        tensor = self.tensors[name]
        if tensor.numel() > 0:
            yield 0, tensor.view(-1)

    def restart(self) -> None:
        pass
