"""Runners: objects that choose a backend for each op of a merge and record the choice.

The engine calls ops through `pymerge.ops.call.call` and passes a `Runner`, or the name of a
backend. `pymerge.merging.gpu.stage.Stage` is a runner that moves calls on host memory to a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pymerge.ops.array import Array
from pymerge.ops.backends import BACKENDS, choose, takes_fewer_models
from pymerge.ops.call import Counters, call

__all__ = ["Runner", "fetched", "slots", "zeros"]


class Runner:
    """Runs ops on the device where their tensors already are.

    Attributes:
        backend: a name of `BACKENDS`, or "auto": for each op the fastest backend that can run it.
        device: the device of the tensors, as torch writes it: "cpu", "cuda:0".
        ran: the backend that ran each op so far.
        on_host: whether counters are numpy arrays, which are up to date after every call.
        gathering: whether a phase is gathering calls, so that nothing has been counted yet.
    """

    def __init__(self, backend: str | None = None, device: str = "cpu") -> None:
        self.backend = backend or "auto"
        self.device = device
        self.ran: dict[str, str] = {}
        self.on_host = device.partition(":")[0] == "cpu"
        self.gathering = False
        self._chosen: dict[str, str] = {}
        self._refused: dict[str, list[str]] = {}

    def backend_for(self, op: str) -> str:
        """Return the name of the backend that is to run an op."""
        if op not in self._chosen:
            refused = self._refused.get(op, ())
            self._chosen[op] = choose(op, self.backend, self.device, refused)
        return self._chosen[op]

    def call(self, op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Run an op of `pymerge.ops.specs`."""
        self.ran[op] = self.backend_for(op)
        if not self.on_host:  # samples are in host memory
            arguments = [self._here(argument) for argument in arguments]
        try:
            call(op, *arguments, backend=self.ran[op], **keywords)
        except ValueError as error:
            self._take_another(op, error)
            self.call(op, arguments, keywords)

    def _take_another(self, op: str, error: ValueError) -> None:
        """Choose another backend for an op that the present one refused before doing any work;
        raise the error if there is none."""
        refused, name = self._refused.setdefault(op, []), self._chosen.pop(op)
        if self.backend != "auto" or name in refused or not takes_fewer_models(error):
            raise error
        refused.append(name)

    def _here(self, argument: Any) -> Any:
        if isinstance(argument, Array):
            return argument.tensor().to(self.device)
        if isinstance(argument, (list, tuple)):
            return [self._here(one) for one in argument]
        return argument

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Counters:
        """Return counters that ops can add to without synchronization; see `fetched`."""
        if self.on_host:
            return np.zeros(shape, dtype)
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def slots(self) -> int:
        """Return the number of counter slots that `magnitude_histogram_` can use at once."""
        return int(BACKENDS[self.backend_for("magnitude_histogram_")].slots())

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Gather calls that do not depend on each other, if this saves launches."""
        if self.backend_for("weighted_sum_") != "cuda":
            yield
            return
        import torch

        with BACKENDS["cuda"].phase(torch.device(self.device)):
            self.gathering = True
            try:
                yield
            finally:
                self.gathering = False


def zeros(backend: str | Runner, shape: tuple[int, ...], dtype: str) -> Counters:
    """Return counters set to zero, in the memory where that backend counts fastest."""
    return np.zeros(shape, dtype) if isinstance(backend, str) else backend.zeros(shape, dtype)


def slots(backend: str | Runner) -> int:
    """Return the number of counter slots that `magnitude_histogram_` can use at once."""
    return (Runner(backend) if isinstance(backend, str) else backend).slots()


def fetched(counters: Counters) -> np.ndarray:
    """Return the counts as numpy; wait for and copy counters of a device."""
    if isinstance(counters, np.ndarray):
        return counters
    return np.array(counters.cpu().numpy())
