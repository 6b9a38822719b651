"""Opens the checkpoints of a merge and checks that they are compatible, headers only."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pymerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from pymerge.config import ModelEntry
from pymerge.dtypes import COPIED, FLOATS
from pymerge.errors import RequestError, listed, nearest

__all__ = [
    "Inputs",
    "check_exists",
    "folded_bytes",
    "header",
    "open_inputs",
    "open_model",
]

_SHOWN = 20
_VOCABULARY = re.compile(r"embed|lm_head|wte\b|shared\.weight|output\.weight|vocab")


@dataclass
class Inputs:
    """The open checkpoints; the output has the tensors of `reference`."""

    base: Checkpoint | None = None
    models: list[Checkpoint] = field(default_factory=list)
    reference: Checkpoint | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Checkpoint]:
        return [*([] if self.base is None else [self.base]), *self.models]

    def close(self) -> None:
        for checkpoint in self.all:
            checkpoint.close()


def header(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """Return the header of a tensor, or of the tensor to which it is tied."""
    info = checkpoint.tensors.get(name)
    return checkpoint.tensors[checkpoint.tied[name]] if info is None else info


def open_inputs(
    models: Sequence[ModelEntry],
    base: ModelEntry | None = None,
    *,
    like: ModelEntry | None = None,
    where: str = "",
) -> Inputs:
    """Open every checkpoint and compare it with the reference, collecting problems.

    Args:
        models, base: those to open; the reference is the base.
        like: without a base: the reference is the model with this path, else the first; it must
            exist, but is not opened.
        where: the file that names them, for hints if a path is wrong.
    """
    inputs = Inputs()
    missing = 0
    try:
        if base is not None:
            inputs.base = _open(base, inputs, where)
        for entry in models:
            model = _open(entry, inputs, where)
            if model is None:
                missing += 1
            else:
                inputs.models.append(model)
    except BaseException:
        inputs.close()
        raise
    if like is not None:
        check_exists(like.path, like.where, inputs.problems, where)

    if base is not None:
        inputs.reference = inputs.base
    elif missing == 0:
        inputs.reference = _reference(models, inputs.models, like)
    for checkpoint in inputs.all:
        inputs.warnings += [f"{checkpoint.label}: {text}" for text in checkpoint.warnings]
        if inputs.reference is not None and checkpoint is not inputs.reference:
            _compare(inputs.reference, checkpoint, inputs)
    if inputs.reference is not None:
        if not inputs.reference.tensors:
            inputs.problems.append(f"{inputs.reference.label}: holds no tensors")
        for checkpoint in inputs.all:
            _check_dtypes(inputs.reference, checkpoint, inputs.problems)
    return inputs


def folded_bytes(inputs: Inputs) -> int:
    """Return the memory for weights into which adapters are folded.

    This counts one tensor at a time, of all models together; while the next one is computed, the
    last one may still be in memory.
    """
    sizes: dict[str, int] = {}
    for checkpoint in inputs.all:
        for name in getattr(checkpoint, "folded", ()):
            sizes[name] = sizes.get(name, 0) + header(checkpoint, name).nbytes
    return 2 * max(sizes.values(), default=0)


def _reference(
    entries: Sequence[ModelEntry], models: list[Checkpoint], like: ModelEntry | None
) -> Checkpoint:
    """Return the model that provides the config files if it is also merged, else the first one."""
    real = None if like is None else os.path.realpath(like.path)
    for entry, model in zip(entries, models, strict=True):
        if entry.adapter is None and os.path.realpath(entry.path) == real:
            return model
    return models[0]


def _open(entry: ModelEntry, inputs: Inputs, where: str) -> Checkpoint | None:
    """Open a model, with its adapter folded in if it has one."""
    paths = [path for path in (entry.path, entry.adapter) if path is not None]
    there = [check_exists(path, entry.where, inputs.problems, where) for path in paths]
    if not all(there):
        return None
    label = f"{entry.name} ({entry.shown})"
    try:
        return open_model(entry.path, entry.adapter, label)
    except RequestError as error:
        inputs.problems += error.problems
    except OSError as error:
        inputs.problems.append(f"{label}: cannot read: {error.strerror or error}")
    return None


def open_model(path: str, adapter: str | None, label: str) -> Checkpoint:
    """Open a checkpoint, with an adapter folded in if one is given; headers only.

    Raises:
        CheckpointError: listing their problems.
    """
    checkpoint = open_checkpoint(path, label)
    return checkpoint if adapter is None else _adapted(checkpoint, adapter, label)


def _adapted(base: Checkpoint, path: str, label: str) -> Checkpoint:
    from pymerge.checkpoint.peft.adapted import AdaptedCheckpoint
    from pymerge.checkpoint.peft.files import load

    try:
        adapter = load(path, label)
    except BaseException:
        base.close()
        raise
    try:
        return AdaptedCheckpoint(base, adapter, label)
    except BaseException:
        base.close()
        adapter.close()
        raise


def check_exists(path: str, where: str, problems: list[str], named_in: str) -> bool:
    """Return whether a path exists; if not, add a problem that suggests where to look.

    Args:
        where: the beginning of the problem's text.
        named_in: the file that names the path.
    """
    if os.path.exists(path):
        return True
    problem = f"{where}: no such file or directory: {path}"
    if not os.path.isabs(path):
        problem += f" (relative to the current directory, {os.getcwd()})"
        beside = Path(named_in).parent / path
        if beside.exists():
            problem += f"; it exists beside the config file: give {beside.resolve()}"
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            problem += "; models of the Hugging Face hub have to be downloaded first"
    problems.append(problem)
    return False


def _compare(reference: Checkpoint, model: Checkpoint, inputs: Inputs) -> None:
    """Report missing and extra tensors, and those of another shape or kind of dtype."""
    like = _short(reference)
    missing = [
        name for name in reference.tensors if name not in model.tensors and name not in model.tied
    ]
    if missing:
        extra = [name for name in model.tensors if name not in reference.tensors]
        hint = nearest(missing[0], extra) if len(missing) == 1 else ""
        inputs.problems.append(
            f"{model.label}: lacks {_tensors(missing)} of {like}: {listed(missing)}{hint}"
        )
    _check_extra(reference, model, inputs)
    _check_shapes(reference, model, inputs.problems)


def _check_extra(reference: Checkpoint, model: Checkpoint, inputs: Inputs) -> None:
    extra: list[str] = []
    for name, info in model.tensors.items():
        if name in reference.tensors:
            continue
        if name not in reference.tied:
            extra.append(name)
            continue
        target = header(reference, name)
        if info.shape == target.shape:
            inputs.warnings.append(
                f"{model.label}: '{name}' is left out, because it is tied to '{target.name}' in "
                f"{_short(reference)} and so in the output"
            )
        else:
            inputs.problems.append(_shape_problem(model, info, target.shape, reference))
    if extra:
        inputs.problems.append(
            f"{model.label}: has {_tensors(extra)} that {_short(reference)} lacks: {listed(extra)}"
        )


def _check_shapes(reference: Checkpoint, model: Checkpoint, problems: list[str]) -> None:
    found: list[str] = []
    for name, expected in reference.tensors.items():
        if name not in model.tensors and name not in model.tied:
            continue
        info = header(model, name)
        if info.shape != expected.shape:
            found.append(_shape_problem(model, info, expected.shape, reference, name))
        if info.dtype != expected.dtype and not (info.dtype in FLOATS and expected.dtype in FLOATS):
            known = (*FLOATS, *COPIED)
            if info.dtype in known and expected.dtype in known:
                found.append(
                    f"{model.label}: '{name}' has dtype {info.dtype}, expected {expected.dtype} "
                    f"like {_short(reference)}"
                )
    problems += found[:_SHOWN]
    if len(found) > _SHOWN:
        problems.append(
            f"{model.label}: {len(found) - _SHOWN} more tensors differ in shape or dtype from "
            f"{_short(reference)}"
        )


def _shape_problem(
    model: Checkpoint,
    info: TensorInfo,
    expected: tuple[int, ...],
    reference: Checkpoint,
    name: str | None = None,
) -> str:
    name = name or info.name
    hint = ""
    if (
        len(info.shape) == len(expected) > 0
        and info.shape[1:] == expected[1:]
        and _VOCABULARY.search(name)
    ):
        hint = " (another vocabulary; aligning vocabularies and tokenizers is not supported yet)"
    return (
        f"{model.label}: '{name}' has shape {info.shape}, expected {expected} like "
        f"{_short(reference)}{hint}"
    )


def _check_dtypes(reference: Checkpoint, checkpoint: Checkpoint, problems: list[str]) -> None:
    """Refuse dtypes without exact arithmetic here: float8, complex and the like."""
    refused: dict[str, list[str]] = {}
    for name in reference.tensors:
        if name in checkpoint.tensors or name in checkpoint.tied:
            dtype = header(checkpoint, name).dtype
            if dtype not in FLOATS and dtype not in COPIED:
                refused.setdefault(dtype, []).append(name)
    for dtype, names in refused.items():
        problems.append(
            f"{checkpoint.label}: {_tensors(names)} of dtype {dtype}, which cannot be merged "
            f"(expected {', '.join(FLOATS)}, integers or BOOL): {listed(names)}"
        )


def _short(checkpoint: Checkpoint) -> str:
    return checkpoint.label.split(" (", 1)[0]


def _tensors(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
