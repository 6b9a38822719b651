"""Calls the entry point of `pymerge ada` and checks what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pymerge.adamerging.config import AdaConfig
from pymerge.adamerging.correlations import batch_labels
from pymerge.adamerging.fit import batch_inputs
from pymerge.adamerging.join import Join
from pymerge.entry import as_setup, call_function

__all__ = ["AdaSetup", "call_entry"]


@dataclass
class AdaSetup:
    """The return value of a config's entry point, which may also be a dictionary with these keys.

    Attributes:
        model: the architecture.
        loaders: for each task, an iterable of batches. Labels in them are not used.
        heads: for each task, a function or module that computes logits; or None.
        inputs: returns the inputs of the model for a batch; see
            `pymerge.adamerging.fit.batch_inputs`.
        labelled: for each task, batches with labels, for the correlation of entropy and loss; or
            None.
        labels: returns the labels of a batch; see `pymerge.adamerging.correlations`.
        join: overrides the config's; see `pymerge.adamerging.fit.fit`.
    """

    model: nn.Module
    loaders: Sequence[Iterable[Any]]
    heads: Sequence[Callable[..., Any]] | None = None
    inputs: Callable[[Any], Any] = batch_inputs
    labelled: Sequence[Iterable[Any]] | None = None
    labels: Callable[[Any], torch.Tensor] = batch_labels
    join: str | Join | None = None


def call_entry(config: AdaConfig) -> AdaSetup:
    """Call the entry point and check what it returns.

    Raises:
        RequestError: there is no such function, it does not accept the arguments, it raised, or it
            returned something else.
    """
    values, where = config.values, config.where("entry")
    found = call_function(values.entry, values.arguments, where, config.where("arguments"))
    return as_setup(found, AdaSetup, f"{where}: {values.entry}")
