"""AdaMerging with coefficients that were learned before: its record, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pymerge.engine.steps import MERGE, Step
from pymerge.errors import RequestError, nearest
from pymerge.methods.parameters import NAN
from pymerge.methods.spec import REQUIRED, MethodSpec, Parameter
from pymerge.methods.ties.record import ties_reads

__all__ = ["FORMAT", "RECORDS", "CoefficientsFile", "read_coefficients"]

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
        raise RequestError(f"{where}: {error}") from None


@lru_cache(maxsize=4)
def _read(path: str, _identity: tuple[int, ...]) -> CoefficientsFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RequestError(
                    f"{path}: expected a file of AdaMerging.save_coefficients, got another one"
                )
            table = file.get_tensor("coefficients").astype(float)
        models, layers = json.loads(metadata["models"]), json.loads(metadata["layers"])
        rows = {name: tuple(table[:, column].tolist()) for name, column in layers.items()}
        return CoefficientsFile(
            tuple(models),
            rows,
            frozenset(json.loads(metadata["fixed"])),
            bool(json.loads(metadata["trimmed"])),
            float(json.loads(metadata["density"])),
        )
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from None


def _for_tensor(parameters: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what the engine needs for one tensor: weights, and how to trim."""
    path = parameters["coefficients"]
    found = read_coefficients(path)
    weights = parameters["weight"]
    if len(weights) != len(found.models):
        raise RequestError(
            f"coefficients: {path} has those of {len(found.models)} models "
            f"({', '.join(found.models)}), but {len(weights)} are given"
        )
    fixed = name in found.fixed
    if not fixed and name not in found.rows:
        raise RequestError(
            f"coefficients: {path} has none for tensor {name!r}{nearest(name, found.rows)}"
        )
    own = (0.0,) * len(weights) if fixed else found.rows[name]
    result = dict(parameters) | {
        "weight": [w * x for w, x in zip(weights, own, strict=True)],
        "scale": 1.0,
        "normalize": False,
        "fixed": fixed,
    }
    if found.trimmed:
        result |= {
            "semantics": "adamerging",
            "weighting": "after",
            "density": [found.density] * len(weights),
            **dict.fromkeys(("scope", "merge", "exact_k", "elect", "normalize")),
        }
    return result


def _reads(parameters: Mapping[str, Any], numel: int, total: int) -> tuple[Step, ...]:
    return ties_reads(parameters, numel, total) if "weighting" in parameters else (MERGE,)


ADAMERGING = MethodSpec(
    name="adamerging",
    function=None,  # a config's method alone; `AdaMerging` learns the coefficients
    run="pymerge.methods.adamerging.passes:run",
    reads=_reads,
    title="AdaMerging (learned coefficients)",
    summary="Adds task vectors with a coefficient for each model and tensor, read from a file.",
    formula=(
        "theta^l = theta_0^l + sum_k w_k lambda_k^l tau_k^l, tau_k = theta_k - theta_0, or what "
        "TIES keeps of it (++)"
    ),
    source="Yang et al., AdaMerging, 2024",
    url="https://arxiv.org/abs/2310.02575",
    needs_base=True,
    passes="1; 2 with trimmed task vectors",
    parameters=(
        Parameter(
            "coefficients",
            "str",
            REQUIRED,
            "File of coefficients, from AdaMerging.save_coefficients or `pymerge ada`.",
            per_tensor=False,
        ),
        Parameter("weight", "float", 1.0, "Multiplies the coefficients of model k.", scope="model"),
        NAN,
    ),
    for_tensor=_for_tensor,
)

RECORDS = (ADAMERGING,)
