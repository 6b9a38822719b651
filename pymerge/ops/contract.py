"""Declares the ops of `specs` to torch as `torch.ops.pymerge.*`, with fake implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pymerge.ops.call import compute
from pymerge.ops.spec import OpSpec
from pymerge.ops.specs import OPS

__all__ = ["NAMES"]

NAMES = tuple(OPS)

_LIBRARY = torch.library.Library("pymerge", "DEF")


def _implementation(spec: OpSpec) -> Callable[..., None]:
    def implementation(*arguments: Any, **keywords: Any) -> None:
        compute(spec, spec.bind(arguments, keywords))

    return implementation


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing: ops write into their arguments and return nothing, so every fake is empty."""


for _spec in OPS.values():
    _LIBRARY.define(f"{_spec.name}({_spec.schema}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_spec.name, _implementation(_spec), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pymerge::{_spec.name}", _nothing, lib=_LIBRARY)
