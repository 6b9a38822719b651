"""The file of coefficients that AdaMerging learned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pymerge.dtypes import FLOATS
from pymerge.errors import RequestError
from pymerge.strict_json import decode, load_json

if TYPE_CHECKING:
    from pymerge.checkpoint import Checkpoint

__all__ = ["FORMAT", "CoefficientsFile", "read_coefficients"]

FORMAT = "pymerge.adamerging.coefficients/1"


@dataclass(frozen=True)
class CoefficientsFile:
    """Coefficients of merged tensors, as they are used.

    rows: for each tensor, one number per model. fixed: tensors that are the base's. trimmed,
    density: whether TIES' trim and election come first (AdaMerging++), and the share they keep.
    """

    models: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    fixed: frozenset[str]
    trimmed: bool
    density: float


def read_coefficients(path: str, where: str = "coefficients") -> CoefficientsFile:
    """Read a file that `AdaMerging.save_coefficients` wrote.

    Raises:
        RequestError: it cannot be read, or is not such a file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise RequestError(f"{where}: {path}: cannot be read: {error.strerror}") from None
    try:
        return _read(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except RequestError as error:
        raise RequestError([f"{where}: {problem}" for problem in error.problems]) from None


@dataclass(frozen=True)
class _Metadata:
    """What the metadata of a file says."""

    models: tuple[str, ...]
    layers: dict[str, int]
    fixed: tuple[str, ...]
    trimmed: bool
    density: float
    groups: tuple[str, ...] | None = None  # their names, which nothing here needs


@lru_cache(maxsize=4)
def _read(path: str, _identity: tuple[int, ...]) -> CoefficientsFile:
    from pymerge.checkpoint.open import open_file

    with open_file(path, path) as file:
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            raise RequestError(
                f"{path}: expected a file of AdaMerging.save_coefficients, got another one"
            )
        values = {
            field.name: load_json(metadata[field.name], f"{path}: metadata {field.name!r}")
            for field in fields(_Metadata)
            if field.name in metadata
        }
        read: _Metadata = decode(_Metadata, values, f"{path}: metadata")
        table = _table(file, path, len(read.models), read.groups)
    groups = table.shape[1]
    wrong = [name for name, column in read.layers.items() if not 0 <= column < groups]
    if wrong:
        raise RequestError(
            f"{path}: metadata: layers[{wrong[0]!r}]: expected the number of one of "
            f"{groups} groups, got {read.layers[wrong[0]]}"
        )
    if not 0 <= read.density <= 1:
        raise RequestError(
            f"{path}: metadata: density: expected a number in [0, 1], got {read.density}"
        )
    columns = table.T.tolist()
    rows = {name: tuple(columns[column]) for name, column in read.layers.items()}
    return CoefficientsFile(read.models, rows, frozenset(read.fixed), read.trimmed, read.density)


def _table(file: Checkpoint, path: str, models: int, groups: tuple[str, ...] | None) -> Any:
    """Return the coefficients, [models, groups] in float64."""
    import numpy as np

    from pymerge.ops.array import widen

    info = file.tensors.get("coefficients")
    columns = None if groups is None else len(groups)
    if (
        info is None
        or info.dtype not in FLOATS
        or len(info.shape) != 2
        or info.shape != (models, columns if columns is not None else info.shape[1])
    ):
        shape = (models, "groups" if columns is None else columns)
        got = "nothing" if info is None else f"{info.dtype} of shape {info.shape}"
        raise RequestError(f"{path}: coefficients: expected floats of shape {shape}, got {got}")
    table = widen(file.array("coefficients"), True).reshape(info.shape)
    if not np.isfinite(table).all():
        raise RequestError(f"{path}: coefficients: holds NaN or infinity")
    return table.copy()
