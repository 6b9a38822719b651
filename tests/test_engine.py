"""Merges of checkpoints end to end: what is computed, and that how does not show."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from tests import models, oracles
from tests.conftest import NATIVE
from tests.models import State

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")

COUNT = 3
WEIGHTS = [0.5, -1.0, 2.0]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weights": WEIGHTS},
    "task_arithmetic": {"method": "task_arithmetic", "weights": WEIGHTS, "scale": 0.7},
    "ties_mergekit": {"method": "ties", "weights": WEIGHTS, "density": 0.3},
    "ties_official": {"method": "ties", "semantics": "official", "density": 0.2},
    "ties_max": {"method": "ties", "semantics": "official", "density": 0.2, "merge": "max"},
    "ties_exact": {"method": "ties", "semantics": "official", "density": 0.2, "exact_k": True},
    "ties_majority": {"method": "ties", "semantics": "official", "density": 0.4, "scope": "tensor"},
    "ties_mergelm": {"method": "ties", "semantics": "mergelm", "density": 0.3},
}
SMALLEST = "270MiB"


def merge(root: Path, out: str, name: str, family: str = "one", **options: Any) -> Path:
    arguments = dict(METHODS[name])
    config = models.config(root / family, arguments.pop("method"), COUNT, **arguments)
    pymerge.merge_checkpoints(config, root / out, **options)
    return root / out


def in_memory(name: str, base: State, tuned: list[State], **options: Any) -> State:
    arguments = dict(METHODS[name])
    method = arguments.pop("method")
    if method == "ties":
        arguments.setdefault("semantics", "mergekit")
    return pymerge.merge(
        method, None if method == "linear" else base, tuned, **arguments, **options
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families of equal tensors: of one file each, and of many, each sharded in its own way."""
    path = tmp_path_factory.mktemp("models")
    base, tuned = models.llama(COUNT, coarse=True)
    models.save_family(path / "one", base, tuned)
    models.save_family(path / "many", base, tuned, files=[3, 1, 7, 2])
    return path


@pytest.fixture(scope="module")
def family() -> tuple[State, list[State]]:
    return models.llama(COUNT, coarse=True)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_depend_on_nothing_but_the_request(
    name: str,
    root: Path,
    family: tuple[State, list[State]],
    tmp_path: Path,
    use_backend: Callable[[str], str],
) -> None:
    """Threads, memory, the inputs' shards, the backend and the instruction set: the same bytes."""
    (tmp_path / "one").symlink_to(root / "one")
    (tmp_path / "many").symlink_to(root / "many")
    base, tuned = family
    first = merge(tmp_path, "out", name, memory="2GiB", threads=2)
    expected = models.weight_bytes(first)
    assert list(expected) == ["model.safetensors"]
    models.assert_same(models.load(first), in_memory(name, base, tuned, backend="reference"))

    variants: dict[str, dict[str, Any]] = {
        "threads1": {"threads": 1},
        "threads5": {"threads": 5},
        "memory": {"memory": SMALLEST, "threads": 1},
        "sharded": {"family": "many"},
        "reference": {"backend": "reference", "memory": SMALLEST},
        "auto": {"backend": "auto", "device": "auto"},
    }
    for variant, options in variants.items():
        assert models.weight_bytes(merge(tmp_path, variant, name, **options)) == expected, variant
    for identifier in NATIVE:
        backend = use_backend(identifier)
        out = merge(tmp_path, identifier, name, backend=backend)
        assert models.weight_bytes(out) == expected, identifier
    sharded = merge(tmp_path, "shards", name, shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 4
    models.assert_same(models.load(sharded), models.load(first))


def test_smallest_memory_is_the_smallest(root: Path, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(root / "one")
    with pytest.raises(pymerge.RequestError, match=r"smallest that works is (\d+)MiB") as caught:
        merge(tmp_path, "out", "ties_official", memory="1MiB", threads=1)
    least = str(caught.value).rsplit(" ", 1)[1]
    assert int(least.removesuffix("MiB")) <= int(SMALLEST.removesuffix("MiB"))
    merge(tmp_path, "out", "ties_official", memory=least, threads=1)


def deltas_of(base: State, tuned: list[State]) -> tuple[State, torch.Tensor]:
    floats = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    kept = [{name: model[name] for name in floats} for model in tuned]
    return floats, torch.stack([oracles.flatten(m) - oracles.flatten(floats) for m in kept])


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_whole_model_equals_the_official_algorithm(how: str, coarse: bool, tmp_path: Path) -> None:
    """With zero votes and magnitudes that tie across tensors, and without."""
    base, tuned = models.llama(COUNT, coarse=coarse, seed=4)
    models.save_family(tmp_path, base, tuned, files=2)
    config = models.config(tmp_path, "ties", COUNT, semantics="official", density=0.2, merge=how)
    pymerge.merge_checkpoints(config, tmp_path / "out")
    floats, deltas = deltas_of(base, tuned)
    expected = dict(base)
    for name, delta in oracles.unflatten(oracles.official_delta(deltas, 0.2, how), floats).items():
        expected[name] = (floats[name].float() + delta).to(torch.bfloat16)
    models.assert_same(models.load(tmp_path / "out"), expected)
    vote = deltas.sum(dim=0)
    assert not coarse or bool(((vote == 0) & (deltas != 0).any(dim=0)).any())


def test_an_exact_cut_between_equal_magnitudes_may_fall_into_any_tensor(tmp_path: Path) -> None:
    """All deltas equal: exactly k survive, counted over names in order and not over files."""
    base, _ = models.llama(0)
    base = {name: torch.zeros_like(t) for name, t in base.items() if t.is_floating_point()}
    base["model.norm.weight"] = base["model.norm.weight"].float()  # first in the output's files
    tuned = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    models.save_family(tmp_path, base, [tuned], files=5)
    total = sum(tensor.numel() for tensor in base.values())
    for number, kept in enumerate([0, 1, 20_000, 65_536, 100_001, total - 1, total]):
        config = models.config(
            tmp_path, "ties", 1, semantics="official", density=(kept + 0.5) / total, exact_k=True
        )
        config["parameters"]["density"] = min(1.0, (kept + 0.5) / total)
        pymerge.merge_checkpoints(config, tmp_path / f"out{number}", memory=SMALLEST)
        flat = oracles.flatten(models.load(tmp_path / f"out{number}"))
        assert int(flat.sum()) == kept
        assert torch.equal(flat, (torch.arange(total) < kept).float())


def test_tensors_larger_than_the_memory_are_cut(tmp_path: Path) -> None:
    """At the smallest memory a tensor of 3 MB passes through slots of 1 MiB."""
    base, tuned = models.llama(2, seed=2, vocabulary=24_001, layers=1)
    models.save_family(tmp_path, base, tuned)
    for name, arguments in {
        "linear": {"method": "linear"},
        "tensor": {"method": "ties", "density": 0.1},
        "whole": {"method": "ties", "density": 0.1, "semantics": "official", "exact_k": True},
    }.items():
        method = str(arguments.pop("method"))
        config = models.config(tmp_path, method, 2, **arguments)
        small = pymerge.merge_checkpoints(config, tmp_path / f"{name}-small", memory=SMALLEST)
        pymerge.merge_checkpoints(config, tmp_path / f"{name}-large", shard_size="1MB", threads=1)
        assert small.output.bytes > 6_000_000
        models.assert_same(
            models.load(tmp_path / f"{name}-small"), models.load(tmp_path / f"{name}-large")
        )


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("mix", list(itertools.product(DTYPES, DTYPES[:3])))
def test_dtypes_mix(mix: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    """The output is as wide as the widest input, F16 and BF16 make F32; one rounding at the end."""
    base, (first,) = models.llama(1, seed=3, layers=1, hidden=16, mlp=24)
    base = {name: t.to(mix[0]) if t.is_floating_point() else t for name, t in base.items()}
    first = {name: t.to(mix[1]) if t.is_floating_point() else t for name, t in first.items()}
    models.save_family(tmp_path, base, [first, base])
    config = models.config(tmp_path, "linear", 2, weights=[0.25, 0.5])
    pymerge.merge_checkpoints(config, tmp_path / "out")
    wide = torch.float64 if torch.float64 in mix else torch.float32
    dtype = torch.promote_types(*mix)
    expected = {
        name: ((0.25 * first[name].to(wide) + 0.5 * tensor.to(wide)) / 0.75).to(dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in base.items()
    }
    models.assert_same(models.load(tmp_path / "out"), expected)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties_mergekit", "ties_official"])
@pytest.mark.parametrize("wide", [False, True])
def test_out_dtype_and_mixed_models(name: str, wide: bool, tmp_path: Path) -> None:
    """out_dtype is rounded to once; cpu and reference agree on mixed and on float64 models."""
    base, tuned = models.llama(COUNT, torch.float32, seed=5)
    kinds = [torch.float16, torch.bfloat16, torch.float64 if wide else torch.float32]
    tuned = [
        {key: t.to(kind) if t.is_floating_point() else t for key, t in model.items()}
        for model, kind in zip(tuned, kinds, strict=True)
    ]
    models.save_family(tmp_path, base, tuned)
    arguments = dict(METHODS[name])
    config = models.config(tmp_path, arguments.pop("method"), COUNT, **arguments)
    config["out_dtype"] = "bfloat16"
    for backend in ("reference", "cpu"):
        pymerge.merge_checkpoints(config, tmp_path / backend, backend=backend)
    assert models.weight_bytes(tmp_path / "reference") == models.weight_bytes(tmp_path / "cpu")
    expected = in_memory(name, base, tuned, dtype=torch.bfloat16)
    models.assert_same(models.load(tmp_path / "cpu"), expected)
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "cpu" / "config.json").read_text()
    config |= {"dtype": "float64", "out_dtype": "float64"}
    pymerge.merge_checkpoints(config, tmp_path / "f64")
    models.assert_same(
        models.load(tmp_path / "f64"), in_memory(name, base, tuned, dtype=torch.float64)
    )


@pytest.mark.parametrize("odd", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_data_may_begin_at_any_byte(dtype: torch.dtype, odd: int, tmp_path: Path) -> None:
    base, tuned = models.llama(2, dtype, seed=6)
    models.save_family(tmp_path / "aligned", base, tuned)
    models.save_misaligned(tmp_path / "odd" / "base", base, odd)
    models.save_misaligned(tmp_path / "odd" / "m0", tuned[0], odd + 2)
    models.save_misaligned(tmp_path / "odd" / "m1", tuned[1], 0)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("linear", {}),
        ("ties", {"density": 0.3, "semantics": "official"}),
        ("ties", {"density": 0.3}),
    ]
    for method, parameters in requests:
        outs = []
        for name in ("aligned", "odd"):
            config = models.config(tmp_path / name, method, 2, **parameters)
            outs.append(tmp_path / f"{name}-{method}-{len(parameters)}")
            pymerge.merge_checkpoints(config, outs[-1])
        assert models.weight_bytes(outs[0]) == models.weight_bytes(outs[1])
