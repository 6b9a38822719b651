"""The inputs on which kernels are timed, and the reference's results for them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
from benchmarks.measure import WrongResult
from pymerge.ops.constants import HOT_CHUNK
from tests.case import Case, Inputs
from tests.case_sums import CHUNK
from tests.packing import CHUNK as PACKED_CHUNK
from tests.packing import part_of

__all__ = [
    "MODELS",
    "SAMPLE",
    "STRETCH",
    "STRETCHES",
    "Expected",
    "arguments_of",
    "check",
    "check_floor",
    "expect",
    "make_arrays",
]

MODELS = 4
STRETCHES, STRETCH = 64, 4096
# Elements that the reference processes at once: whole chunks, of 1000 and of 65536 elements, which
# the magnitude kernels count separately.
_TILE = math.lcm(CHUNK, HOT_CHUNK)
SAMPLE = 1 << 20  # elements generated at once, and those from which thresholds are taken


def make_arrays(elements: int, seed: int = 0) -> Inputs:
    """Return a bf16 base (deviation 0.02) and four models (deltas of deviation 0.001)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.empty(elements, dtype=torch.bfloat16)
    models = [torch.empty_like(base) for _ in range(MODELS)]
    for start in range(0, elements, SAMPLE):
        stop = min(start + SAMPLE, elements)
        base[start:stop] = torch.randn(stop - start, generator=generator) * 0.02
        origin = base[start:stop].float()
        for model in models:
            model[start:stop] = origin + torch.randn(stop - start, generator=generator) * 1e-3
    return base, models


def arguments_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Return the case's arguments over the whole arrays, with thresholds from their first part."""
    base, models = inputs
    if case.op.startswith("packed"):  # nothing in them comes from a sample
        return case.arguments(base, models)
    arguments = case.arguments(base[:SAMPLE], [model[:SAMPLE] for model in models])
    whole: dict[str, Any] = {"base": base, "model": models[0]}
    # Some cases need one model, and dot products one more for the gradient.
    whole["models"] = (models * 2)[: len(arguments.get("models", ()))]
    if arguments.get("base", base) is None:
        whole["base"] = None
    repeats = max(1, base.numel() // SAMPLE)
    if arguments.get("ranks") is not None:  # [models, elements]
        whole["ranks"] = arguments["ranks"].repeat(1, repeats)
    if isinstance(arguments.get("weights"), torch.Tensor):  # [models, rows]
        whole["weights"] = arguments["weights"].repeat(1, repeats)
    if "divergences" in arguments:  # [rows]
        whole["divergences"] = arguments["divergences"].repeat(repeats)
    return {name: whole.get(name, value) for name, value in arguments.items()}


def _part(arguments: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    part = dict(arguments)
    for name in ("base", "model", "gradient"):
        if part.get(name) is not None:
            part[name] = part[name][start:stop]
    if "masks" in part:
        part |= part_of(part, start, stop)
    if "start" in part:  # the hash of a random mask depends on the index
        part["start"] += start
    if "models" in part:
        part["models"] = [model[start:stop] for model in part["models"]]
    if part.get("ranks") is not None:
        part["ranks"] = part["ranks"][:, start:stop]
    if isinstance(part.get("weights"), torch.Tensor):
        columns = part["columns"]
        part["weights"] = part["weights"][:, start // columns : stop // columns]
    if "divergences" in part:
        columns = part["columns"]
        part["divergences"] = part["divergences"][start // columns : stop // columns]
    return part


@dataclass
class Expected:
    """The reference's results: the output in stretches (start, values), and counters."""

    stretches: list[tuple[int, torch.Tensor]]
    counters: dict[str, torch.Tensor]


def expect(case: Case, inputs: Inputs, arguments: dict[str, Any], seed: int = 0) -> Expected:
    """Run the reference: on random stretches, and on everything for counters of everything."""
    base, models = inputs
    numel = base.numel()

    def reference(start: int, stop: int) -> dict[str, torch.Tensor]:
        part = base[start:stop], [model[start:stop] for model in models]
        outputs = case.outputs(*part, base.dtype)
        op = getattr(torch.ops.pymerge, case.op)
        op(**outputs, **_part(arguments, start, stop), backend="reference")
        return outputs

    expected = Expected([], {})
    if case.streams_out:
        # Whole rows, or whole chunks.
        unit = arguments.get("columns", PACKED_CHUNK if "masks" in arguments else 1)
        stretch = max(unit, STRETCH // unit * unit)
        places = range(0, max(0, numel - stretch) + 1, unit)
        drawn = random.Random(seed).sample(places, min(STRETCHES - 2, len(places)))
        for start in sorted({0, places[-1], *drawn}):
            stop = min(start + stretch, numel)
            expected.stretches.append((start, reference(start, stop)["out"]))
    if "masks" in arguments and case.streams_out:
        return expected
    if case.streams_out and not arguments.get("want_signs"):
        expected.counters["stats"] = torch.zeros(3, dtype=torch.int64)
        return expected
    tiles = [reference(start, min(start + _TILE, numel)) for start in range(0, numel, _TILE)]
    for name in tiles[0].keys() - {"out"}:
        values = [tile[name] for tile in tiles]
        per_chunk = name in ("hot_chunks", "partials", "sums", "table", "scores", "ranks")
        chunk_counts = case.op == "magnitude_equal_counts_"
        per_chunk = per_chunk or (name == "counts" and chunk_counts)
        if per_chunk:
            expected.counters[name] = torch.cat(values, dim=-1)
        else:
            expected.counters[name] = torch.stack(values).sum(dim=0)
    return expected


def check(name: str, expected: Expected, outputs: dict[str, torch.Tensor], numel: int) -> None:
    """Raise WrongResult unless a kernel wrote what the reference writes, bit for bit."""
    for start, values in expected.stretches:
        found = outputs["out"][start : start + values.numel()]
        if not torch.equal(found, values):
            index = int((found != values).nonzero()[0])
            raise WrongResult(
                f"{name}: at {start + index} the kernel wrote {found[index]}, the reference "
                f"{values[index]}"
            )
    for key, values in expected.counters.items():
        found = outputs[key]
        if found.dim() == 3:  # [slots, models, bins]
            found, values = found.sum(dim=0), values.sum(dim=0)
        if key in ("scores", "ranks"):  # rows have room for a multiple of 64
            found, values = found[:, :numel], values[:, :numel]
        kind = torch.float64 if values.is_floating_point() else torch.int64
        if not torch.equal(found.to(kind), values.to(kind)):
            raise WrongResult(f"{name}: {key} differs from the reference's")


def check_floor(out: torch.Tensor, read: Sequence[torch.Tensor]) -> None:
    """Raise WrongResult unless the streaming loop combined the bits of all inputs, so that it
    cannot leave out any of them."""
    for start in range(0, out.numel(), max(1, out.numel() // STRETCHES)):
        bits = torch.zeros_like(out[start : start + STRETCH].view(torch.int16))
        for tensor in read:
            bits |= tensor[start : start + STRETCH].view(torch.int16)
        if not torch.equal(out[start : start + STRETCH].view(torch.int16), bits):
            raise WrongResult(f"streaming loop: wrong bits from {start} on")
