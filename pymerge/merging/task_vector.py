"""Task vectors, the changes of fine-tuning: add, negate, scale, apply (Ilharco et al. 2023)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pymerge.errors import RequestError, nearest
from pymerge.merging.structures import Tensors, named_tensors, structured
from pymerge.methods.sums.functions import linear, task_arithmetic

if TYPE_CHECKING:
    from pymerge.merging.report import MergeReport

__all__ = ["TaskVector"]

Model = Tensors | str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class _Side:
    """A model, in memory or on disk; tensors on disk are mapped, and read only when used."""

    given: Any
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    path: Path | None = None

    @classmethod
    def of(cls, model: Any, label: str) -> _Side:
        if isinstance(model, (str, os.PathLike)):
            path = Path(model)
            return cls(model, _Mapped(path, f"{label} ({path})"), path)
        return cls(model, named_tensors(model, label, model))

    @property
    def headers(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors; for those on disk, meta tensors, for which nothing is read."""
        return self.tensors.headers() if isinstance(self.tensors, _Mapped) else self.tensors

    def same_as(self, other: _Side) -> bool:
        if self.path is not None and other.path is not None:
            return self.path.resolve() == other.path.resolve()
        return self.given is other.given


class _Mapped(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, as views of the memory-mapped files."""

    def __init__(self, path: Path, label: str) -> None:
        from pymerge.checkpoint import open_checkpoint

        self._checkpoint = open_checkpoint(path, label)

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._checkpoint.tensors[name]
        return self._checkpoint.flat(name).view(info.shape)

    def headers(self) -> dict[str, torch.Tensor]:
        from pymerge.checkpoint import torch_dtype

        return {
            name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
            for name, info in self._checkpoint.tensors.items()
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


@dataclass(frozen=True, eq=False)
class _Term:
    coefficient: float
    base: _Side
    model: _Side


class TaskVector(Mapping[str, torch.Tensor]):
    """A linear combination of task vectors, sum_i c_i (theta_i - theta_0i), computed when it is
    used.

    Nothing is subtracted or copied beforehand: `tv[name]` computes one tensor, `apply_to` streams.
    Create one with `from_models`; combine with `+`, `-`, unary `-`, `*` and `/` by a number.

    >>> base = {"w": torch.zeros(2)}
    >>> german = TaskVector.from_models(base, {"w": torch.tensor([1.0, 0.0])})
    >>> legal = TaskVector.from_models(base, {"w": torch.tensor([0.0, 2.0])})
    >>> (german + 0.5 * legal)["w"]
    tensor([1., 1.])
    >>> (-german).apply_to(base, scale=0.5)["w"]
    tensor([-0.5000,  0.0000])
    """

    def __init__(self, terms: Sequence[_Term]) -> None:
        self._terms = tuple(terms)

    @classmethod
    def from_models(cls, base: Model, model: Model) -> TaskVector:
        """Return theta - theta_0.

        Args:
            base, model: tensors, lists of tensors or state dicts of equal structure, or paths of
                checkpoints.

        Raises:
            RequestError: names, shapes or kinds of tensors differ (all differences are listed).
        """
        term = _Term(1.0, _Side.of(base, "base"), _Side.of(model, "model"))
        _check(term.base.headers, "base", term.model.headers, "model")
        return cls([term])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one tensor of the combination, in float32 (float64 if an input is)."""
        if name not in self._terms[0].base.tensors:
            hint = nearest(name, self._terms[0].base.tensors)
            raise KeyError(f"task vector has no tensor {name!r}{hint}")
        return self._delta(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms[0].base.tensors)

    def __len__(self) -> int:
        return len(self._terms[0].base.tensors)

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        mine, theirs = self._terms[0].base.headers, other._terms[0].base.headers
        _check(mine, "the left task vector", theirs, "the right task vector")
        return TaskVector([*self._terms, *other._terms])

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self + (-other)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return TaskVector(
            [_Term(term.coefficient * factor, term.base, term.model) for term in self._terms]
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        if isinstance(divisor, bool) or not isinstance(divisor, (int, float)):
            return NotImplemented
        return self * (1.0 / divisor)

    def __repr__(self) -> str:
        terms = " ".join(
            f"{term.coefficient:+g} (model_{i} - base_{i})" for i, term in enumerate(self._terms)
        )
        return f"<TaskVector of {len(self)} tensors: {terms}>"

    def _delta(self, name: str) -> torch.Tensor:
        terms = [(t.coefficient, t.base.tensors[name], t.model.tensors[name]) for t in self._terms]
        wide = any(torch.float64 in (base.dtype, model.dtype) for _, base, model in terms)
        dtype = torch.float64 if wide else torch.float32
        total: torch.Tensor | None = None
        for coefficient, base, model in terms:
            if not base.is_floating_point():
                return torch.zeros(base.shape, dtype=base.dtype)
            delta = coefficient * (model.detach().to(dtype) - base.detach().to(dtype))
            total = delta if total is None else total + delta
        assert total is not None
        return total

    def apply_to(
        self,
        base: Model,
        scale: float = 1.0,
        *,
        out: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> Any:
        """Return base + scale * (this task vector).

        Args:
            base: a tensor, list, state dict, or path of a checkpoint; it need not be the base from
                which the task vector was made.
            scale: the scaling coefficient (lambda).
            out: with a checkpoint as base, the directory to write; then every model must be a
                checkpoint too, the merge is streamed, and `options` go to `merge_checkpoints`.
            dtype: of the result; default that of `base`.
            backend: as in `merge`.

        Returns:
            The structure of `base` (a state dict if `base` is a path); the MergeReport if `out` is
            given. Integer and boolean tensors must be equal in all models, and are copied.

        Raises:
            RequestError: tensors that are not compatible, or `out` for models in memory.
        """
        target = _Side.of(base, "base")
        first = self._terms[0].base.headers
        _check(first, "the task vector", target.headers, "base")
        if out is not None:
            return self._write(target, scale, Path(out), dtype, backend, options)
        if options:
            name = next(iter(options))
            raise RequestError(f"apply_to: {name}: only with out=, the directory to write")
        if all(term.base.same_as(target) for term in self._terms):
            merged = task_arithmetic(
                dict(target.tensors),
                [dict(term.model.tensors) for term in self._terms],
                weights=[term.coefficient for term in self._terms],
                scale=scale,
                dtype=dtype,
                backend=backend,
            )
        else:
            weighted = self._weighted(target, scale)
            merged = linear(
                [dict(side.tensors) for side, _ in weighted],
                weights=[weight for _, weight in weighted],
                normalize=False,
                dtype=dtype,
                backend=backend,
            )
        return merged if target.path is not None else structured(target.given, merged)

    def _weighted(self, target: _Side, scale: float) -> list[tuple[_Side, float]]:
        """Return base + scale * (this) as one weighted sum over all the models involved."""
        sides = [(target, 1.0)]
        for term in self._terms:
            sides.append((term.model, scale * term.coefficient))
            sides.append((term.base, -scale * term.coefficient))
        return sides

    def _write(
        self,
        target: _Side,
        scale: float,
        out: Path,
        dtype: torch.dtype | None,
        backend: str | None,
        options: dict[str, Any],
    ) -> MergeReport:
        from pymerge.merging.files import merge_checkpoints

        sides = [target, *(side for term in self._terms for side in (term.base, term.model))]
        if any(side.path is None for side in sides):
            raise RequestError(
                "apply_to: out: expected checkpoints on disk, got a base or a model in memory; "
                "leave out= away and save the result yourself"
            )
        config: dict[str, Any]
        if all(term.base.same_as(target) for term in self._terms):
            config = {
                "merge_method": "task_arithmetic",
                "base_model": str(target.path),
                "models": [_entry(term.model, term.coefficient) for term in self._terms],
                "parameters": {"scale": float(scale)},
            }
        else:
            entries = [_entry(side, weight) for side, weight in self._weighted(target, scale)]
            # A weighted sum has the widest dtype; the base's is wanted.
            kinds = {t.dtype for t in target.headers.values() if t.is_floating_point()}
            if dtype is None and len(kinds) > 1:
                raise RequestError(
                    f"apply_to: dtype: the base has tensors of {sorted(map(str, kinds))}; name the "
                    "dtype of the result"
                )
            dtype = dtype or next(iter(kinds), None)
            config = {
                "merge_method": "linear",
                "models": entries,
                "parameters": {"normalize": False},
            }
        if dtype is not None:
            config["out_dtype"] = str(dtype).removeprefix("torch.")
        return merge_checkpoints(config, out, backend=backend, **options)


def _entry(side: _Side, weight: float) -> dict[str, Any]:
    return {"model": str(side.path), "parameters": {"weight": float(weight)}}


def _check(
    first: Mapping[str, torch.Tensor],
    first_label: str,
    second: Mapping[str, torch.Tensor],
    second_label: str,
) -> None:
    problems = [
        f"TaskVector: {second_label} lacks tensor {name!r} of {first_label}"
        for name in first
        if name not in second
    ]
    problems += [
        f"TaskVector: tensor {name!r} of {second_label} is not in {first_label}"
        for name in second
        if name not in first
    ]
    for name in first:
        if name in second and first[name].shape != second[name].shape:
            problems.append(
                f"TaskVector: tensor {name!r} of {second_label} has shape "
                f"{tuple(second[name].shape)}, "
                f"expected {tuple(first[name].shape)} like {first_label}"
            )
        elif name in second and first[name].is_floating_point() != second[name].is_floating_point():
            problems.append(
                f"TaskVector: tensor {name!r} of {second_label} has dtype {second[name].dtype}, "
                f"expected {first[name].dtype} like {first_label}"
            )
    if problems:
        raise RequestError(problems)
