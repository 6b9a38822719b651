"""The case table: one row per op and mode. A row gives the correctness test on every backend,
opcheck, and the benchmark (`python -m benchmarks.run`)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Inputs = tuple[torch.Tensor, list[torch.Tensor]]  # base, models


@dataclass(frozen=True)
class Case:
    """One op in one mode.

    arguments: builds the op's positional arguments after its outputs, from (base, models).
    outputs: builds the tensors that the op writes to, from (base, models, dtype of the result).
    compare: which outputs must be equal, after summing over slots where there are slots.
    """

    name: str
    op: str
    arguments: Callable[[torch.Tensor, list[torch.Tensor]], dict[str, Any]]
    outputs: Callable[[torch.Tensor, list[torch.Tensor], torch.dtype], dict[str, torch.Tensor]]
    streams_out: bool = True  # writes a tensor as long as the inputs (for the bytes of a benchmark)
    slow: bool = False  # tests take fewer sizes: the reference takes long, or others are like it

    def run(
        self,
        inputs: Inputs,
        dtype: torch.dtype,
        backend: str,
        wide: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run the case and return what it wrote."""
        base, models = inputs
        outputs = self.outputs(base, models, dtype)
        arguments = self.arguments(base, models)
        how = {} if self.op.startswith("pcb") else {"wide": wide}  # PCB is in float32 always
        getattr(torch.ops.pymerge, self.op)(**outputs, **arguments, **how, backend=backend)
        if "scores" in outputs:
            outputs["scores"] = outputs["scores"][:, : base.numel()]
        if "counts" in outputs and outputs["counts"].dim() == 3:
            outputs["counts"] = outputs["counts"].sum(dim=0)
        return outputs


def _out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    out = torch.full(base.shape, float("nan"), dtype=dtype)
    return {"out": out, "stats": torch.zeros(3, dtype=torch.int64)}


def _stats(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"stats": torch.zeros(3, dtype=torch.int64)}


def _weights(count: int) -> list[float]:
    return [1.0, 0.75, -0.4, 0.3, 1.1][:count] + [0.1 * (k + 1) for k in range(5, count)]


def thresholds(base: torch.Tensor, models: Sequence[torch.Tensor], share: float = 0.8) -> list[int]:
    """Return the keys below which about `share` of each task vector lies."""
    wide = torch.float64 in [base.dtype, *(model.dtype for model in models)]
    dtype, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    keys = []
    for model in models:
        magnitude = (model.to(dtype) - base.to(dtype)).abs()
        rank = max(1, int(share * magnitude.numel()))
        keys.append(int(magnitude.kthvalue(rank).values.view(bits)) if magnitude.numel() else 0)
    return keys


def _linear(divisor: str) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        weights = _weights(len(models))
        return {
            "models": models,
            "weights": weights,
            "divisor": sum(weights) if divisor == "sum" else 1.0,
        }

    return arguments


def _task_arithmetic(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    weights = _weights(len(models))
    return {"base": base, "models": models, "weights": weights, "scale": 0.4, "divisor": 1.0}


def _ties(
    weighting: str, merge: str, elect: str, zero_sign: int, want_signs: bool, scale: float = 0.7
) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        return {
            "base": base,
            "models": models,
            "thresholds": thresholds(base, models),
            "weights": [] if weighting == "none" else _weights(len(models)),
            "weighting": weighting,
            "merge": merge,
            "elect": elect,
            "zero_sign": zero_sign,
            "scale": scale,
            "want_signs": want_signs,
        }

    return arguments


def _signs(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {
        "base": base,
        "models": models,
        "thresholds": thresholds(base, models),
        "weights": [],
        "weighting": "none",
        "elect": "mass",
    }


def _histogram(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    # brackets around the 80th percentile, of different widths
    middle = thresholds(base, models)
    wide = torch.float64 in [base.dtype, *(model.dtype for model in models)]
    top = 40 if wide else 12
    return {
        "base": base,
        "models": models,
        "lo": [max(0, key - (1 << (top + 8))) for key in middle],
        "shift": [top - (k % 3) for k in range(len(models))],
        "hot": [key if k % 2 == 0 else -1 for k, key in enumerate(middle)],
    }


def _counts(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    chunks = -(-base.numel() // 65536)
    return {
        "counts": torch.zeros(2, len(models), 259, dtype=torch.int32),
        "hot_chunks": torch.zeros(len(models), chunks, dtype=torch.int32),
    }


CHUNK = 1000


def _equal(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "model": models[0], "key": thresholds(base, models)[0], "chunk": CHUNK}


def _equal_counts(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"counts": torch.zeros(-(-base.numel() // CHUNK), dtype=torch.int64)}


def _bands(
    base: torch.Tensor, models: list[torch.Tensor], drawn: bool, band: bool
) -> dict[str, list[int]]:
    """Return lo, last, seeds, limits: the middle of the magnitudes, two thirds of it at random."""
    count = len(models)
    none = 2**63 - 1
    seeds = [(12345 + 2654435761 * i) % 2**32 for i in range(2 * count)]
    return {
        "lo": thresholds(base, models, 0.3) if band else [0] * count,
        "last": thresholds(base, models, 0.9) if band else [none] * count,
        "seeds": seeds if drawn else [],
        "limits": [2**32 * 2 // 3 + k for k in range(count)] if drawn else [],
    }


def _sparse(
    drawn: bool, band: bool, elect: bool, divide: bool = False, divisor: float = 1.0
) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        return {
            "base": base,
            "models": models,
            **_bands(base, models, drawn, band),
            "factors": [1.5 + 0.1 * k for k in range(len(models))],
            "weights": _weights(len(models)),
            "elect": elect,
            "divide": divide,
            "divisor": divisor,
            "scale": 0.7,
            "start": 5 << 10,
        }

    return arguments


def _sparse_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "models": models, **_bands(base, models, True, True), "start": 3 << 10}


def _partials(rows: Callable[[int], int]) -> Callable[..., dict[str, torch.Tensor]]:
    def outputs(
        base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        chunks = -(-base.numel() // 1024)
        return {"partials": torch.full((rows(len(models)), chunks), 7.0, dtype=torch.float64)}

    return outputs


def _gram(with_base: bool) -> Callable[..., dict[str, Any]]:
    return lambda base, models: {"base": base if with_base else None, "models": models}


def _nearswap(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "model": models[0], "t": 0.005}


def _ram(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    factors = [1.0 + 0.1 * k for k in range(len(models))]
    return {"base": base, "models": models, "factors": factors, "epsilon": 0.004}


def _magmax(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "models": models, "scale": 0.7}


def _consensus(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    shares = [0.2 + 0.1 * (k % 5) for k in range(len(models))]
    return {"base": base, "models": models, "thresholds": shares, "scale": 0.3, "need": 2}


def _pcb_reals(variant: int, models: int) -> list[float]:
    """Return statistics of about the right size."""
    pairs = models * (models + 1) // 2
    if variant == 0:
        numbers = [-1e-4 - 1e-6 * p for p in range(pairs)] + [4e3 + p for p in range(pairs)]
        numbers += [0.5 + 0.01 * p for p in range(pairs)] + [0.7 + 0.1 * k for k in range(models)]
        numbers += [0.9] * models
    else:
        numbers = [1e-4] * models + [0.02 + 1e-3 * k for k in range(models)]
        numbers += [60.0 - k for k in range(models)] + [1e-6] * models
        numbers += [2e-3] * models + [0.0 if k == 1 else 500.0 for k in range(models)]
    return [*numbers, *_weights(models), 0.8]


def _pcb(variant: int) -> Callable[..., dict[str, Any]]:
    return lambda base, models: {
        "base": base,
        "models": models,
        "variant": variant,
        "reals": _pcb_reals(variant, len(models)),
    }


def _pcb_scores(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    padded = -(-base.numel() // 64) * 64
    return {
        "scores": torch.full((len(models), padded), 7.0),
        "stats": torch.zeros(3, dtype=torch.int64),
    }


def _pcb_extremes(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "models": models}


def _pcb_exp_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    pairs = len(models) * (len(models) + 1) // 2
    return {"base": base, "models": models, "reals": _pcb_reals(0, len(models))[: 2 * pairs]}


CASES = [
    Case("linear", "weighted_sum_", _linear("sum"), _out),
    Case("linear_unnormalized", "weighted_sum_", _linear("one"), _out),
    Case("task_arithmetic", "task_arithmetic_", _task_arithmetic, _out),
    Case("ties_mean", "ties_", _ties("none", "mean_of_count", "mass", 1, False), _out),
    Case("ties_mean_signs", "ties_", _ties("none", "mean_of_count", "mass", -1, True), _out),
    Case("ties_sum", "ties_", _ties("none", "sum", "mass", -1, False), _out),
    Case("ties_max", "ties_", _ties("none", "max", "mass", 1, True), _out),
    Case("ties_drop", "ties_", _ties("none", "mean_of_count", "mass", 0, True), _out),
    Case("ties_mergekit", "ties_", _ties("before", "mean_of_weights", "mass", 1, False), _out),
    Case("ties_mergekit_sum", "ties_", _ties("before", "sum", "mass", 1, False), _out),
    Case("ties_weighted_count", "ties_", _ties("before", "mean_of_count", "mass", -1, True), _out),
    Case("ties_peft", "ties_", _ties("after", "mean_of_count", "mass", 1, False), _out),
    Case("ties_peft_frequency", "ties_", _ties("after", "mean_of_count", "count", 1, False), _out),
    Case("ties_sd_mecha", "ties_", _ties("none", "mean_of_count", "count", 0, False), _out),
    Case("ties_signs", "ties_signs_", _signs, _stats, streams_out=False),
    Case("magnitude_histogram", "magnitude_histogram_", _histogram, _counts, streams_out=False),
    Case(
        "magnitude_equal_counts",
        "magnitude_equal_counts_",
        _equal,
        _equal_counts,
        streams_out=False,
    ),
    Case("dare_linear", "sparse_merge_", _sparse(True, False, False), _out),
    Case("dare_ties", "sparse_merge_", _sparse(True, False, True), _out, slow=True),
    Case("breadcrumbs", "sparse_merge_", _sparse(False, True, False, divisor=2.5), _out, slow=True),
    Case("breadcrumbs_ties", "sparse_merge_", _sparse(False, True, True, divide=True), _out),
    Case("sparse_all", "sparse_merge_", _sparse(True, True, True, True, 1.5), _out, slow=True),
    Case("sparse_both", "sparse_merge_", _sparse(True, True, False), _out, slow=True),
    Case(
        "sparse_sums",
        "sparse_sums_",
        _sparse_sums,
        _partials(lambda count: 2 * count),
        streams_out=False,
        slow=True,
    ),
    Case(
        "gram",
        "gram_",
        _gram(False),
        _partials(lambda count: count * (count + 1) // 2),
        streams_out=False,
        slow=True,
    ),
    Case(
        "gram_deltas",
        "gram_",
        _gram(True),
        _partials(lambda count: count * (count + 1) // 2),
        streams_out=False,
        slow=True,
    ),
    Case("nearswap", "nearswap_", _nearswap, _out, slow=True),
    Case("ram", "ram_", _ram, _out, slow=True),
    Case("magmax", "magmax_", _magmax, _out, slow=True),
    Case("consensus", "consensus_", _consensus, _out, slow=True),
    *(
        Case(f"pcb_{name}", "pcb_merge_", _pcb(variant), _out, slow=True)
        for variant, name in enumerate(("paper", "root", "vision", "vision_es"))
    ),
    *(
        Case(f"pcb_{name}_scores", "pcb_scores_", _pcb(k), _pcb_scores, False, slow=True)
        for k, name in enumerate(("paper", "root", "vision", "vision_es"))
    ),
    Case(
        "pcb_extremes",
        "pcb_extremes_",
        _pcb_extremes,
        _partials(lambda count: count * (count + 1)),
        streams_out=False,
        slow=True,
    ),
    Case(
        "pcb_exp_sums",
        "pcb_exp_sums_",
        _pcb_exp_sums,
        _partials(lambda count: count * (count + 1) // 2 + count),
        streams_out=False,
        slow=True,
    ),
]

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
    "f64": (torch.float64, torch.float32),
}


def make_inputs(
    numel: int, count: int, dtypes: Sequence[torch.dtype], seed: str = "", misaligned: bool = False
) -> Inputs:
    """Return a base and models whose deltas have many equal magnitudes, zeros, subnormals and both
    signs."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{numel} {count} {seed}".encode()))

    def stored(values: torch.Tensor, k: int) -> torch.Tensor:
        tensor = values.to(dtypes[k % len(dtypes)])
        if not misaligned:
            return tensor
        # One element past an aligned address, in memory of its own.
        padded = torch.empty(numel + 1, dtype=tensor.dtype)
        padded[1:] = tensor
        return padded[1:]

    base = torch.randn(numel, generator=generator) * 0.02
    base[::7] = 0.0
    base[3::11] = -0.0
    base[5::13] = 1e-40  # subnormal
    models = []
    for _ in range(count):
        delta = torch.randn(numel, generator=generator) * 1e-2
        coarse = torch.rand(numel, generator=generator) < 0.5
        delta = torch.where(coarse, (delta * 128).round() / 128, delta)
        delta = torch.where(torch.rand(numel, generator=generator) < 0.1, torch.zeros(()), delta)
        models.append(base + delta)
    for k in range(1, count, 2):  # cancelling votes
        cancel = torch.rand(numel, generator=generator) < 0.2
        models[k] = torch.where(cancel, 2 * base - models[k - 1], models[k])
    return stored(base, 0), [stored(model, k + 1) for k, model in enumerate(models)]
