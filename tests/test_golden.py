"""Recorded digests of every method and every choice of it: no version changes a byte unnoticed.

After a change that is meant to change bytes, or a new method or choice, record them anew and look
at the difference:

    python -m tests.test_golden
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

import pymerge
from pymerge.checkpoint.statistics import StatisticsRecord
from pymerge.methods import METHODS, REQUIRED, MethodSpec
from pymerge.statistics.files import ModelStatistics
from tests.conftest import BACKEND_IDS

RECORDED = Path(__file__).with_name("golden.json")

SHAPES = {
    "a.weight": (70, 33),
    "b.weight": (64,),
    "c.weight": (8, 4, 3, 3),
    "d.scalar": (),
    "layers.0.q.weight": (40, 40),
}
MODELS = 3


def drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of a generator whose stream never changes: sums of uniform ones."""
    generator = np.random.RandomState(seed)
    values = generator.random_sample((4, *shape)).sum(axis=0) - 2.0
    return torch.from_numpy(np.asarray(values, np.float32))


def base() -> dict[str, torch.Tensor]:
    tensors = {
        name: (0.02 * drawn(i, shape)).to(torch.bfloat16 if i % 2 else torch.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return {**tensors, "ids": torch.arange(5)}


def tuned(k: int) -> dict[str, torch.Tensor]:
    """A model that changed some of the elements."""
    result = {}
    for i, (name, tensor) in enumerate(base().items()):
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        shape = tuple(tensor.shape)
        delta = 0.01 * drawn(100 * k + i, shape) * (drawn(200 * k + i, shape) > -0.4)
        result[name] = (tensor.float() + delta).to(tensor.dtype)
    return result


def variants(spec: MethodSpec) -> Iterator[dict[str, Any]]:
    """Yield a method's defaults, then each choice and each switch, one at a time."""
    own = {p.name: 0.3 for p in spec.parameters if p.default is REQUIRED and p.kind == "float"}
    yield own
    for p in spec.parameters:
        if p.no_effect or p.only is not None or p.name == "nan":
            continue
        choices = p.choices or ((True, False) if p.kind == "bool" else ())
        yield from ({**own, p.name: choice} for choice in choices)


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def fisher(k: int) -> ModelStatistics:
    tensors = {
        name: drawn(300 * k + i, shape).abs() for i, (name, shape) in enumerate(SHAPES.items())
    }
    record = StatisticsRecord("fisher", model_tensors=tuple(base()))
    return ModelStatistics(tensors, record)


def merged(spec: MethodSpec, parameters: dict[str, Any], backend: str) -> str:
    models = [tuned(k) for k in range(1, 1 + (spec.max_models or MODELS))]
    given: dict[str, Any] = {}
    if spec.statistics == "fisher":
        given["statistics"] = [fisher(k) for k in range(1, 1 + len(models))]
    start = base() if spec.needs_base or spec.takes_base else None
    return digest(pymerge.merge(spec.name, start, models, backend=backend, **given, **parameters))


def learned(folder: Path, trimmed: bool) -> str:
    """Merge files with a table of coefficients."""
    names = list(SHAPES)
    table = drawn(7, (MODELS, len(names))).numpy()
    metadata = {
        "format": "pymerge.adamerging.coefficients/1",
        "models": json.dumps([f"m{k}" for k in range(1, 1 + MODELS)]),
        "layers": json.dumps({name: i for i, name in enumerate(names)}),
        "fixed": json.dumps([]),
        "trimmed": json.dumps(trimmed),
        "density": json.dumps(0.3),
    }
    save_file({"coefficients": table}, str(folder / "c.safetensors"), metadata)
    for name, state in [("base", base()), *((f"m{k}", tuned(k)) for k in range(1, 1 + MODELS))]:
        (folder / name).mkdir()
        save_tensors(state, folder / name / "model.safetensors")
    config = {
        "merge_method": "adamerging",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"m{k}")} for k in range(1, 1 + MODELS)],
        "parameters": {"coefficients": str(folder / "c.safetensors")},
    }
    pymerge.merge_checkpoints(config, folder / "out", threads=1)
    return hashlib.sha256((folder / "out" / "model.safetensors").read_bytes()).hexdigest()[:16]


# What comes out of LAPACK and of torch's exp and log depends on the machine.
IN_MEMORY = [
    spec
    for spec in METHODS.values()
    if "cpu" in spec.backends or spec.statistics == "fisher"
    if spec.for_tensor is None
]


def cases() -> Iterator[tuple[str, MethodSpec, dict[str, Any]]]:
    for spec in IN_MEMORY:
        for parameters in variants(spec):
            dialect = spec.in_dialect(parameters.get("semantics", _semantics(spec)))
            if "cpu" in dialect.backends or spec.statistics == "fisher":
                yield f"{spec.name} {json.dumps(parameters, sort_keys=True)}", spec, parameters


def _semantics(spec: MethodSpec) -> str | None:
    parameter = spec.parameter("semantics")
    return None if parameter is None else parameter.default


CASES = {name: (spec, parameters) for name, spec, parameters in cases()}


@pytest.mark.parametrize("identifier", BACKEND_IDS)
@pytest.mark.parametrize("method", sorted({spec.name for spec, _ in CASES.values()}))
def test_bytes_are_those_that_were_recorded(method: str, identifier: str, use_backend: Any) -> None:
    spec = METHODS[method]
    backend = use_backend(identifier)
    if backend not in spec.backends:
        pytest.skip("runs on torch only")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    found = {
        name: merged(spec, parameters, backend)
        for name, (own, parameters) in CASES.items()
        if own is spec
    }
    assert found == {name: recorded.get(name) for name in found}


@pytest.mark.parametrize("trimmed", [False, True])
def test_learned_coefficients(trimmed: bool, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert learned(tmp_path, trimmed) == recorded[f"adamerging trimmed={trimmed}"]


def test_nothing_is_recorded_that_is_gone() -> None:
    recorded = set(json.loads(RECORDED.read_text(encoding="utf-8")))
    assert recorded == {*CASES, "adamerging trimmed=False", "adamerging trimmed=True"}


def record() -> None:
    import tempfile

    digests = {n: merged(spec, own, "reference") for n, (spec, own) in CASES.items()}
    for trimmed in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            digests[f"adamerging trimmed={trimmed}"] = learned(Path(folder), trimmed)
    RECORDED.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
