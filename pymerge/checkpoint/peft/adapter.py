"""An adapter: the modules it changes, and how. Tensors are read when they are requested."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pymerge.errors import NonFiniteError, RequestError, nearest
from pymerge.ops.array import Array, widen
from pymerge.ops.native.low_rank import low_rank

if TYPE_CHECKING:
    import torch

    from pymerge.checkpoint import Checkpoint

__all__ = ["Adapter", "Module", "Saved"]

Kind = Literal["linear", "embedding", "conv", "ia3"]


@dataclass(frozen=True)
class Module:
    """A module that an adapter changes.

    Attributes:
        name: of the module in the base model, e.g. "model.layers.0.self_attn.q_proj".
        kind: "linear" (also transformers' Conv1D), "embedding", "conv" (any dimension), or "ia3".
        shape: of its weight, as the adapter has it; for an IA3 module that of its vector: (out, 1),
            or (1, in) if `feedforward`.
        rank: r; 0 for an IA3 module.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA).
        transposed: the weight is [in, out], so that B A is transposed (Conv1D, embeddings).
        feedforward: IA3 rescales the module's input, and not its output.
        keys: names of its stored tensors: of A and B, or of the vector.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    rank: int = 0
    scaling: float = 1.0
    transposed: bool = False
    feedforward: bool = False
    keys: tuple[str, ...] = ()

    @property
    def weight(self) -> str:
        """Return the name of the weight in a checkpoint."""
        return f"{self.name}.weight"

    @property
    def matrix(self) -> tuple[int, int]:
        """Return the weight's shape as a matrix: rows, columns."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def features(self) -> tuple[int, int]:
        """Return (rows of B, columns of A)."""
        rows, columns = self.matrix
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class Saved:
    """A tensor that an adapter stores whole: one of `modules_to_save`, or a trained bias."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Adapter:
    """A LoRA or IA3 adapter; from `pymerge.adapters.load`, or a result of a computation.

    Attributes:
        peft_type: "LORA" or "IA3".
        config: the content of adapter_config.json.
        modules: those it changes, by the module's name, sorted.
        saved: tensors that replace the base's, by their name in the base.
        label: its name in messages.
        path: the directory it was read from, or None.
        files: its weight files and their sizes; empty in memory.
        warnings: notes for the user.
        captured: for a result that was truncated to a rank: the share of the squared norm of each
            module's delta that the factors retain.
    """

    def __init__(
        self,
        peft_type: Literal["LORA", "IA3"],
        config: Mapping[str, Any],
        modules: Mapping[str, Module],
        read: Callable[[str], Array],
        *,
        saved: Mapping[str, Saved] | None = None,
        label: str = "adapter",
        path: Path | None = None,
        checkpoint: Checkpoint | None = None,
        warnings: list[str] | None = None,
    ) -> None:
        self.peft_type = peft_type
        self.config = dict(config)
        self.modules = dict(sorted(modules.items()))
        self.saved = dict(sorted((saved or {}).items()))
        self.label = label
        self.path = path
        self.warnings = warnings or []
        self.captured: dict[str, float] = {}
        self._read = read
        self._checkpoint = checkpoint

    @property
    def files(self) -> list[tuple[Path, int]]:
        if self._checkpoint is None or self.path is None:
            return []
        config = self.path / "adapter_config.json"
        return [(config, config.stat().st_size), *self._checkpoint.files]

    @property
    def base(self) -> str | None:
        """Return the name or path of the base model that the config names."""
        return self.config.get("base_model_name_or_path")

    @property
    def rank(self) -> int:
        """Return the largest rank of a module."""
        return max((module.rank for module in self.modules.values()), default=0)

    def module(self, name: str) -> Module:
        """Return a module by its name, or raise RequestError."""
        found = self.modules.get(name)
        if found is None:
            hint = nearest(name, self.modules)
            raise RequestError(f"{self.label}: has no module '{name}'{hint}")
        return found

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (B, A) of a LoRA module, float32 [out, r] and [r, in], without the scaling.

        For a convolution, A is flattened to [r, in * kernel].

        Raises:
            NonFiniteError: a factor contains NaN or infinity.
        """
        module = self.module(name)
        if module.kind == "ia3":
            raise RequestError(f"{self.label}: '{name}' is an IA3 module, which has no factors")
        a = self._values(module.keys[0], name, "A").reshape(module.rank, -1)
        b = self._values(module.keys[1], name, "B").reshape(-1, module.rank)
        return b, a

    def vector(self, name: str) -> np.ndarray:
        """Return the vector of an IA3 module: float32, (out, 1) or (1, in)."""
        module = self.module(name)
        if module.kind != "ia3":
            raise RequestError(f"{self.label}: '{name}' is a LoRA module, which has no vector")
        return self._values(module.keys[0], name, "vector").reshape(module.shape)

    def delta(self, name: str, transposed: bool | None = None) -> np.ndarray:
        """Return the change that a LoRA module adds to its weight: float32, in the weight's shape.

        scaling * (B A), transposed if the weight is [in, out]; the products of an element are added
        up in the order of the rank. `transposed` overrides the module's.
        """
        module = self.module(name)
        if transposed is not None and transposed != module.transposed:
            module = replace(module, shape=module.shape[::-1], transposed=transposed)
        out = np.empty(module.matrix, np.float32)
        b, a = self.oriented(name, module.transposed)
        low_rank(Array.of(out, "F32"), None, b, a, module.scaling)
        return out.reshape(module.shape)

    def delta_weight(self, name: str) -> torch.Tensor:
        """Return `delta` as a torch tensor."""
        import torch

        return torch.from_numpy(self.delta(name))

    def oriented(self, name: str, transposed: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the two factors whose product has the weight's orientation."""
        b, a = self.factors(name)
        if self.modules[name].transposed if transposed is None else transposed:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        return b, a

    def array(self, key: str) -> Array:
        """Return a tensor as it is stored; `key` is one of `Module.keys` or `Saved.key`."""
        return self._read(key)

    def will_need(self, key: str) -> None:
        """Start reading a tensor into the page cache."""
        if self._checkpoint is not None:
            self._checkpoint.will_need(key)

    def close(self) -> None:
        """Release the files."""
        if self._checkpoint is not None:
            self._checkpoint.close()

    def save(
        self, out: str | os.PathLike[str], *, dtype: str | None = None, force: bool = False
    ) -> None:
        """Write the adapter as PEFT does: adapter_config.json, adapter_model.safetensors.

        The directory appears either complete or not at all.

        Args:
            out: the directory; must not exist unless `force`.
            dtype: "float32", "bfloat16" or "float16" for the factors; default unchanged.
            force: replace an existing `out`.

        Raises:
            RequestError: `out` exists, or cannot be written.
            MergeError: writing failed.

        >>> import tempfile
        >>> from pymerge.adapters import load
        >>> from pymerge.checkpoint.peft.build import lora
        >>> one = lora({"fc": (np.ones((3, 2)), np.ones((2, 4)))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     one.save(f"{folder}/out")
        ...     load(f"{folder}/out").rank
        2
        """
        from pymerge.checkpoint.peft.files import save

        save(self, out, dtype=dtype, force=force)

    def __repr__(self) -> str:
        what = f"rank {self.rank}" if self.peft_type == "LORA" else "IA3"
        return f"<Adapter {self.label}: {what}, {len(self.modules)} modules>"

    def _values(self, key: str, name: str, what: str) -> np.ndarray:
        values = np.ascontiguousarray(widen(self._read(key), False))
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NonFiniteError(
                f"{self.label}: {what} of '{name}' holds {values.reshape(-1)[at]} at flat index "
                f"{at}"
            )
        return values
