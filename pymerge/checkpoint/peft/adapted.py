"""A checkpoint with an adapter folded in: its tensors are computed when they are requested.

To the plan and the engine it is a checkpoint like any other: names, shapes and dtypes of the base,
and the tensors that merge_and_unload of PEFT would produce. A tensor is computed from the mapped
files into its own memory, in the dtype of the base, and freed when the engine releases it.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from pymerge.checkpoint import Checkpoint, TensorInfo
from pymerge.checkpoint.peft.adapter import Adapter, Module, Saved
from pymerge.dtypes import DTYPES, FLOATS
from pymerge.errors import CheckpointError, nearest
from pymerge.ops.array import Array, widen
from pymerge.ops.native.low_rank import low_rank, rescale, store

__all__ = ["AdaptedCheckpoint", "bound"]

_SHOWN = 20


class AdaptedCheckpoint(Checkpoint):
    """A base checkpoint and an adapter, combined into one model.

    Attributes:
        base, adapter: its parts; `close` closes both.
        folded: the tensors that are computed, including those that the adapter stores whole.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, label: str) -> None:
        """Match the modules with the base's tensors; nothing is read.

        Raises:
            CheckpointError: the adapter does not belong to this base; lists every reason.
        """
        modules, names = bound(adapter, base, label)
        self.base = base
        self.adapter = adapter
        self.path = base.path
        self.label = label
        self.files = [*base.files, *adapter.files]
        self.metadata = base.metadata
        self.config = base.config
        self.warnings = [*base.warnings, *adapter.warnings, *_renamed(adapter, names)]
        self.tied = base.tied
        self._modules = modules
        self._saved = {names[name]: saved for name, saved in adapter.saved.items()}
        tensors = dict(base.tensors)
        for name, saved in self._saved.items():
            if name not in tensors:
                size = prod(saved.shape) * DTYPES[saved.dtype]
                tensors[name] = TensorInfo(name, saved.dtype, saved.shape, base.path, 0, size)
        self.tensors = dict(sorted(tensors.items()))
        self.folded = sorted({*self._modules, *self._saved})
        self._lock = threading.Lock()
        self._made: tuple[str, Array] | None = None
        self._closed = False

    def array(self, name: str) -> Array:
        """Return a tensor as a 1-D array in the base's dtype; see `Checkpoint.array`."""
        info = self._info(name)
        if info.name not in self._modules and info.name not in self._saved:
            return self.base.array(info.name)
        with self._lock:
            made = self._made
        if made is not None and made[0] == info.name:
            return made[1]
        self._made = made = None  # only one is kept: its memory may be large
        array = self._fold(info)
        with self._lock:
            self._made = (info.name, array)
        return array

    def will_need(self, name: str, start: int = 0, stop: int | None = None) -> None:
        info = self._info(name)
        if info.name not in self._saved:
            self.base.will_need(info.name, start, stop)
        module = self._modules.get(info.name)
        for key in () if module is None else module.keys:
            self.adapter.will_need(key)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        info = self._info(name)
        with self._lock:
            if self._made is not None and self._made[0] == info.name:
                self._made = None
        if info.name in self.base.tensors:
            self.base.release(info.name, start, stop)

    def close(self) -> None:
        self._closed = True
        self._made = None
        self.base.close()
        self.adapter.close()

    def _fold(self, info: TensorInfo) -> Array:
        saved = self._saved.get(info.name)
        base = self.base.array(info.name) if saved is None else self.adapter.array(saved.key)
        module = self._modules.get(info.name)
        if module is None and base.code == info.dtype:
            return base
        out = Array.of(np.empty(info.nbytes, np.uint8), info.dtype)
        if module is None:
            store(out, widen(base, "F64" in (base.code, info.dtype)))
        elif module.kind == "ia3":
            self._rescale(out, base, info, module)
        else:
            b, a = self.adapter.oriented(module.name, module.transposed)
            low_rank(out, base, b, a, module.scaling)
        return out

    def _rescale(self, out: Array, base: Array, info: TensorInfo, module: Module) -> None:
        vector = self.adapter.vector(module.name)
        if len(info.shape) == 1:  # a bias belongs to the output
            rescale(out, base, vector.reshape(-1, 1), 1)
        else:
            rescale(out, base, vector.T if module.transposed else vector, info.shape[1])


def _renamed(adapter: Adapter, names: dict[str, str]) -> list[str]:
    """Return a note if the names of the base's tensors differ from the adapter's."""
    other = next(((own, name) for own, name in sorted(names.items()) if own != name), None)
    return [] if other is None else [f"{adapter.label}: '{other[0]}' is '{other[1]}' of the base"]


def bound(
    adapter: Adapter, base: Checkpoint, label: str
) -> tuple[dict[str, Module], dict[str, str]]:
    """Return ({tensor of the base: the module that changes it}, {the adapter's name: the base's}).

    Modules are oriented like the base's weights. Biases that IA3 rescales have an entry, too.

    Raises:
        CheckpointError: listing every module that does not fit the base.
    """
    problems: list[str] = []
    wanted = [module.weight for module in adapter.modules.values()]
    names = _names(wanted, base) | _names_of_saved(adapter, base, wanted)
    modules: dict[str, Module] = {}
    for module in adapter.modules.values():
        name = names[module.weight]
        info = base.tensors.get(name)
        if info is None:
            problems.append(_missing(module, name, base, label))
            continue
        if name in base.tied.values():
            head = next(alias for alias, target in base.tied.items() if target == name)
            problems.append(
                f"{label}: module '{module.name}' changes '{name}', to which '{head}' is tied, so "
                "that folding would change both; untie the base first (tie_word_embeddings: false)"
            )
            continue
        oriented = _oriented(module, info, adapter.saved.get(module.weight))
        if isinstance(oriented, str):
            problems.append(f"{label}: module '{module.name}' {oriented}")
            continue
        modules[name] = oriented
        bias = f"{name.removesuffix('weight')}bias"
        if module.kind == "ia3" and not module.feedforward and bias in base.tensors:
            modules[bias] = oriented
    for own, saved in adapter.saved.items():
        problems += _saved_problems(own, saved, names[own], base, label)
    if problems:
        more = len(problems) - _SHOWN
        raise CheckpointError(
            problems[:_SHOWN] + ([f"{label}: and {more} more modules"] if more > 0 else [])
        )
    return modules, names


def _names(wanted: list[str], base: Checkpoint) -> dict[str, str]:
    """Return the base's name of each tensor.

    Classes of transformers with a head store the model under a name, which checkpoints of the bare
    model do not have: one leading part is removed or added if all names fit then.
    """
    if all(name in base.tensors for name in wanted):
        return {name: name for name in wanted}
    without = {name: name.partition(".")[2] for name in wanted}
    if all(name in base.tensors for name in without.values()):
        return without
    for first in sorted({name.partition(".")[0] for name in base.tensors}):
        longer = {name: f"{first}.{name}" for name in wanted}
        if all(name in base.tensors for name in longer.values()):
            return longer
    return {name: name for name in wanted}


def _names_of_saved(adapter: Adapter, base: Checkpoint, wanted: list[str]) -> dict[str, str]:
    """Return the base's names of whole tensors; a head that the base lacks keeps its name."""
    found: dict[str, str] = {}
    changed = _names(wanted, base)
    shorter = any(changed[name] == name.partition(".")[2] for name in wanted)
    for name in adapter.saved:
        short = name.partition(".")[2]
        if name in changed:
            found[name] = changed[name]
        else:
            found[name] = short if shorter and short in base.tensors else name
    return found


def _missing(module: Module, name: str, base: Checkpoint, label: str) -> str:
    if name in base.tied:
        return (
            f"{label}: module '{module.name}' changes '{name}', which is tied to "
            f"'{base.tied[name]}' in the base, so that folding would change both; untie the base "
            "first (tie_word_embeddings: false)"
        )
    hint = nearest(name, base.tensors)
    return f"{label}: module '{module.name}': the base has no tensor '{name}'{hint}"


def _oriented(module: Module, info: TensorInfo, saved: Saved | None) -> Module | str:
    """Return a module in the orientation of the base's weight, or a description of the problem."""
    shape = info.shape if saved is None else saved.shape
    if info.dtype not in FLOATS:
        return f"changes '{info.name}' of dtype {info.dtype}, expected one of {', '.join(FLOATS)}"
    if module.kind == "ia3":
        side = 1 if module.feedforward != module.transposed else 0
        size = module.shape[1] if module.feedforward else module.shape[0]
        if len(shape) == 2 and shape[side] == size:
            return module
        if len(shape) == 2 and shape[1 - side] == size:
            return replace(module, transposed=not module.transposed)
        return f"has a vector of {size}, which does not fit '{info.name}' of shape {shape}"
    if shape == module.shape:
        return module
    if module.kind == "linear" and shape == module.shape[::-1]:
        # PEFT decides by the class of the layer and not by the config's fan_in_fan_out.
        return replace(module, shape=shape, transposed=not module.transposed)
    return (
        f"is for a weight of shape {module.shape} (rank {module.rank}), but '{info.name}' has "
        f"shape {shape}: the adapter belongs to another base"
    )


def _saved_problems(own: str, saved: Saved, name: str, base: Checkpoint, label: str) -> list[str]:
    info: Any = base.tensors.get(name)
    if name in base.tied or name in base.tied.values():
        return [
            f"{label}: has '{own}' in whole, which is tied to another tensor in the base; untie "
            "the base first (tie_word_embeddings: false)"
        ]
    if info is None:
        return []
    if info.shape != saved.shape:
        return [
            f"{label}: has '{own}' in whole with shape {saved.shape}, expected {info.shape} like "
            "the base"
        ]
    if (info.dtype in FLOATS) != (saved.dtype in FLOATS):
        return [
            f"{label}: has '{own}' in whole with dtype {saved.dtype}, expected {info.dtype} like "
            "the base"
        ]
    return []
