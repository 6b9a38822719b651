"""The case table: one row per op and mode. A row gives the correctness test on every backend,
opcheck, and the benchmark (`python -m benchmarks.run`)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pymerge.backends import has_kernel
from pymerge.backends.arguments import DIVERGENCE, DIVERGENCE_ROWS, sums_shape
from pymerge.backends.comparison import EVERY, Comparison
from pymerge.backends.sizes import SUM_CHUNK
from tests.packing import pack

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
        place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> dict[str, torch.Tensor]:
        """Run the case and return what it wrote. place: puts a tensor where the backend works."""
        base, models = inputs
        outputs = {k: place(tensor) for k, tensor in self.outputs(base, models, dtype).items()}
        arguments = {k: _placed(v, place) for k, v in self.arguments(base, models).items()}
        self.call(outputs, arguments, backend, wide)
        return {name: tensor.cpu() for name, tensor in seen(outputs, base.numel()).items()}

    def call(
        self, outputs: dict[str, Any], arguments: dict[str, Any], backend: str, wide: bool = False
    ) -> None:
        """Call the op on what `outputs` and `arguments` gave, on any device."""
        in_float32 = self.op.startswith("pcb") or "pcb" in str(arguments.get("kind"))
        how = {} if self.op.startswith("pcb") else {"wide": wide and not in_float32}
        getattr(torch.ops.pymerge, self.op)(**outputs, **arguments, **how, backend=backend)


def seen(outputs: dict[str, torch.Tensor], numel: int) -> dict[str, torch.Tensor]:
    """Return what of outputs must be the same everywhere."""
    found = dict(outputs)
    for name in ("scores", "ranks"):  # what is beyond a row's end is nobody's
        if name in found:
            found[name] = found[name][:, :numel]
    if "counts" in found and found["counts"].dim() == 3:
        found["counts"] = found["counts"].sum(dim=0)
    return found


def _placed(argument: Any, place: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(argument, torch.Tensor):
        return place(argument)
    if isinstance(argument, list) and argument and isinstance(argument[0], torch.Tensor):
        return [place(tensor) for tensor in argument]
    return argument


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


def _padded(numel: int) -> int:
    return -(-numel // 64) * 64


def _columns(numel: int) -> int:
    """Return the length of a row: one that divides the number of elements."""
    lengths = (4096, 341, 17, 11, 7, 3)
    return next((c for c in lengths if numel % c == 0), max(numel, 1))


def _ranks(base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    """Return ranks within rows, as `row_ranks_` gives them."""
    ranks = torch.zeros(len(models), _padded(base.numel()), dtype=torch.int32)
    columns = _columns(base.numel())
    for k, model in enumerate(models):
        size = (model.double() - base.double()).abs().view(-1, columns)
        order = size.argsort(dim=1, stable=True)
        places = torch.arange(columns).expand_as(order)
        found = torch.empty_like(order).scatter_(1, order, places)
        ranks[k, : base.numel()] = found.reshape(-1)
    return ranks


def _ranked(mode: str, elect: bool, factors: bool = True) -> Callable[..., dict[str, Any]]:
    """DELLA ("chance", "per_element"), or Breadcrumbs by rows ("band")."""

    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        count, columns = len(models), _columns(base.numel())
        ranked = _sparse(mode != "band", False, elect, divide=elect)(base, models)
        ranked["ranks"] = _ranks(base, models)
        if not factors:  # as DELLA has it where it divides by probabilities
            ranked["factors"] = [1.0] * count
        if mode == "band":
            ranked["lo"], ranked["last"] = [columns // 3] * count, [columns - 2] * count
        else:
            ranked["limits"] = []
            ranked["chances"] = [x for k in range(count) for x in (0.2 + 0.01 * k, 0.6 / columns)]
            ranked["per_element"] = mode == "per_element"
            ranked["limits"] = [0] * count
        return ranked

    return arguments


def _bare(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {**_sparse(True, True, False)(base, models), "bare": True}


def _sums(kind: str, **more: Any) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        return {"base": base, "models": models, "kind": kind, **more}

    return arguments


def _sparse_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {**_sums("sparse", start=3 << 10)(base, models), **_bands(base, models, True, True)}


def _ranked_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    kept = _ranked("chance", False)(base, models)
    names = ("lo", "last", "seeds", "limits", "ranks", "chances", "start")
    return {**_sums("sparse")(base, models), **{name: kept[name] for name in names}}


def _sce_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    wide = torch.float64 in [base.dtype, *(model.dtype for model in models)]
    dtype, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    key = int(torch.tensor(2e-5, dtype=dtype).view(bits))
    return {**_sums("sce")(base, models), "lo": [key]}


def _dots(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {**_sums("dots")(base, models), "models": [*models, models[0]]}


def _rows(kind: str) -> Callable[..., dict[str, Any]]:
    return lambda base, models: _sums(kind, columns=_columns(base.numel()))(base, models)


def _partials(kind: str, rows: bool = False) -> Callable[..., dict[str, torch.Tensor]]:
    def outputs(
        base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        count = len(models) + (1 if kind == "dots" else 0)
        shape = sums_shape(kind, count, base.numel(), _columns(base.numel()) if rows else 0)
        return {"partials": torch.full(shape, 7.0, dtype=torch.float64)}

    return outputs


def _sums_case(name: str, arguments: Callable[..., dict[str, Any]], rows: bool = False) -> Case:
    kind = name.partition(".")[0]
    outputs = _partials(kind, rows)
    return Case(f"sums_{name}", "chunk_sums_", arguments, outputs, streams_out=False, slow=True)


def _gram(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": None, "models": models, "kind": "gram"}


def _pointwise(method: str, *reals: float, models: int = 17) -> Case:
    """Reals of "shares" stand for one number for each model."""

    def arguments(base: torch.Tensor, tensors: list[torch.Tensor]) -> dict[str, Any]:
        numbers = list(reals)
        if method in ("ram", "consensus", "sce"):
            numbers += [0.2 + 0.1 * (k % 5) for k in range(len(tensors))]
        if method == "tall" or (method == "emr" and reals[0] > 0):
            last = 2 if method == "tall" else 0
            numbers[last] = min(numbers[last], len(tensors) - 1)
        own = tensors[:models]
        return {"base": base, "models": own, "method": method, "reals": numbers}

    name = method if method != "emr" or reals[0] < 0 else "emr_task"
    if method == "sce" and reals[0]:
        name = "sce_everywhere"
    return Case(name, "pointwise_", arguments, _out, slow=True)


def _row_ranks(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "models": models, "columns": _columns(base.numel())}


def _rank_room(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"ranks": torch.full((len(models), _padded(base.numel())), 7, dtype=torch.int32)}


def _row_sum(with_base: bool) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        columns = _columns(base.numel())
        rows = torch.arange(base.numel() // columns, dtype=torch.float64)
        weights = torch.stack([0.3 * w + 0.01 * (rows % 7) for w in _weights(len(models))])
        return {
            "base": base if with_base else None,
            "models": models,
            "weights": weights,
            "columns": columns,
        }

    return arguments


def _table(kind: str, rows: bool) -> Callable[..., dict[str, torch.Tensor]]:
    """A table of divergences, in which the kinds before this one have been."""

    def outputs(
        base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        columns = _columns(base.numel()) if rows else 0
        count = -(-base.numel() // (columns or SUM_CHUNK))
        table = torch.full((DIVERGENCE_ROWS, count), 7.0, dtype=torch.float64)
        wide = torch.float64 in [base.dtype, *(model.dtype for model in models)]
        for before in DIVERGENCE:
            if kind in (before, "all"):
                break
            op = torch.ops.pymerge.divergence_sums_
            op(table, base, models[0], before, columns, wide=wide, backend="reference")
        return {"table": table}

    return outputs


def _divergence_case(kind: str, rows: bool = False) -> Case:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        columns = _columns(base.numel()) if rows else 0
        return {"base": base, "model": models[0], "kind": kind, "columns": columns}

    name = f"divergence_{kind}{'.rows' if rows else ''}"
    outputs = _table(kind, rows)
    return Case(name, "divergence_sums_", arguments, outputs, streams_out=False, slow=True)


def _importance(threshold: float | None) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        columns = _columns(base.numel())
        rows = torch.arange(base.numel() // columns, dtype=torch.float64)
        divergences = 1e-3 + 1e-4 * (rows % 5)
        return {
            "base": base,
            "model": models[0],
            "divergences": divergences,
            "columns": columns,
            "threshold": threshold,
        }

    return arguments


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


def pcb_statistics(
    variant: int, base: torch.Tensor, models: Sequence[torch.Tensor], ratio: float
) -> list[float]:
    """Return the statistics of these elements, as a merge finds them; NaN and infinity are 0."""
    base = base.float().nan_to_num(0.0, 0.0, 0.0)
    tuned = [model.float().nan_to_num(0.0, 0.0, 0.0) for model in models]
    taus = [model - base for model in tuned]
    count, numel = len(models), base.numel()
    if variant == 0:
        pairs = [taus[i] * taus[j] for i in range(count) for j in range(i, count)]
        least = [float(product.min()) for product in pairs]
        inverse = [
            _inverse(float(product.max()) - low) for product, low in zip(pairs, least, strict=True)
        ]
        scaled = [(pair - low) * inv for pair, low, inv in zip(pairs, least, inverse, strict=True)]
        own = [scaled[i * count - i * (i - 1) // 2] * count for i in range(count)]
        norms = [numel / float(x.double().exp().sum()) for x in (*scaled, *own)]
        numbers = [*least, *inverse, *norms]
    else:
        ordered = [tau.abs().sort().values for tau in taus]
        lo = [float(size[int(numel * 0.01)]) for size in ordered]
        hi = [float(size[max(0, int(numel * 0.99 - 1))]) for size in ordered]
        numbers = [*lo, *hi, *(_inverse(b - a) for a, b in zip(lo, hi, strict=True))]
    thresholds = [0.0] * count * (1 if variant == 0 else 3)
    scores = torch.empty(count, _padded(numel))
    torch.ops.pymerge.pcb_scores_(
        scores,
        torch.zeros(3, dtype=torch.int64),
        base,
        tuned,
        variant,
        [*numbers, *thresholds, *_weights(count), 1.0],
        backend="reference",
    )
    ordered = [row[:numel].sort().values for row in scores]
    q = [float(row[min(int(numel * (1 - ratio)), numel - 1)]) for row in ordered]
    numbers += q
    if variant != 0:
        top = [float(row[-1]) for row in ordered]
        numbers += [*top, *(_inverse(high - low) for high, low in zip(top, q, strict=True))]
    return [*numbers, *_weights(count), 0.8]


def _inverse(spread: float) -> float:
    return min(1 / spread, 3e38) if spread > 0 else 0.0


_last: list[Any] = []  # of what statistics were computed last, and these


def _known_statistics(variant: int, base: torch.Tensor, models: list[torch.Tensor]) -> list[float]:
    """Return the statistics of elements that come again and again, to every backend in turn."""
    key = [variant, base, *models]
    if not _last or len(_last[0]) != len(key) or any(map(_differ, _last[0], key)):
        ratio = 0.05 if variant > 1 else 0.1
        _last[:] = [key, pcb_statistics(variant, base, models, ratio)]
    return _last[1]


def _differ(a: Any, b: Any) -> bool:
    return a is not b if isinstance(a, torch.Tensor) else a != b


def _pcb(variant: int) -> Callable[..., dict[str, Any]]:
    """Arguments with the statistics and thresholds of the elements; of few, with made-up ones."""

    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        if base.numel() < 1000:
            reals = _pcb_reals(variant, len(models))
        else:
            reals = _known_statistics(variant, base, models)
        return {"base": base, "models": models, "variant": variant, "reals": reals}

    return arguments


def _pcb_scores(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {
        "scores": torch.full((len(models), _padded(base.numel())), 7.0),
        "stats": torch.zeros(3, dtype=torch.int64),
    }


def _pcb_exp_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    pairs = len(models) * (len(models) + 1) // 2
    return _sums("pcb_exp", reals=_pcb_reals(0, len(models))[: 2 * pairs])(base, models)


def _comparison(levels: int, **more: Any) -> Case:
    """Task vectors compared at so many levels of a trim."""

    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        shares = (0.9, 0.5, 0.2, 0.0, 0.7)[:levels]
        keys = [max(key, 1) for share in shares for key in thresholds(base, models, share)]
        return {"base": base, "models": models, "thresholds": keys, **more}

    def outputs(
        base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        shape = Comparison(len(models), levels)
        segments = shape.segments(base.numel())
        sums = torch.full((shape.rows, segments), float("nan"), dtype=torch.float64)
        return {"sums": sums, "counts": torch.zeros(shape.size, dtype=torch.int64)}

    name = f"compare.{levels}" + (".sampled" if more else "")
    return Case(name, "compare_", arguments, outputs, streams_out=False, slow=True)


# What is kept of each model in turn: a share as trims have it, or also nothing, all and a half.
_TRIMMED, _ANY = (0.2,), (0.2, 0.0, 1.0, 0.5)


def _packed(
    shares: Sequence[float], base: torch.Tensor, models: list[torch.Tensor]
) -> dict[str, Any]:
    kept = pack(models, [shares[k % len(shares)] for k in range(len(models))])
    return {"base": base, **kept}


def _packed_sum(shares: Sequence[float]) -> Callable[..., dict[str, Any]]:
    return lambda base, models: {
        **_packed(shares, base, models),
        "weights": _weights(len(models)),
    }


def _packed_dots(shares: Sequence[float]) -> Callable[..., dict[str, Any]]:
    return lambda base, models: {"gradient": models[0], **_packed(shares, base, models)}


def _only_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"out": torch.full(base.shape, float("nan"), dtype=dtype)}


def _dots_of_all(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    shape = sums_shape("dots", len(models) + 1, base.numel(), 0)
    return {"partials": torch.full(shape, 7.0, dtype=torch.float64)}


CASES = [
    Case("linear", "weighted_sum_", _linear("sum"), _out),
    Case("linear_unnormalized", "weighted_sum_", _linear("one"), _out, slow=True),
    Case("task_arithmetic", "task_arithmetic_", _task_arithmetic, _out),
    Case("ties_mean", "ties_", _ties("none", "mean_of_count", "mass", 1, False), _out),
    Case("ties_mean_signs", "ties_", _ties("none", "mean_of_count", "mass", -1, True), _out),
    Case("ties_sum", "ties_", _ties("none", "sum", "mass", -1, False), _out, slow=True),
    Case("ties_max", "ties_", _ties("none", "max", "mass", 1, True), _out, slow=True),
    Case("ties_drop", "ties_", _ties("none", "mean_of_count", "mass", 0, True), _out, slow=True),
    Case("ties_mergekit", "ties_", _ties("before", "mean_of_weights", "mass", 1, False), _out),
    Case("ties_mergekit_sum", "ties_", _ties("before", "sum", "mass", 1, False), _out, slow=True),
    Case(
        "ties_weighted_count",
        "ties_",
        _ties("before", "mean_of_count", "mass", -1, True),
        _out,
        slow=True,
    ),
    Case("ties_peft", "ties_", _ties("after", "mean_of_count", "mass", 1, False), _out),
    Case(
        "ties_peft_frequency",
        "ties_",
        _ties("after", "mean_of_count", "count", 1, False),
        _out,
        slow=True,
    ),
    Case(
        "ties_sd_mecha", "ties_", _ties("none", "mean_of_count", "count", 0, False), _out, slow=True
    ),
    Case("ties_signs", "ties_signs_", _signs, _stats, streams_out=False),
    Case("magnitude_histogram", "magnitude_histogram_", _histogram, _counts, streams_out=False),
    Case(
        "magnitude_equal_counts",
        "magnitude_equal_counts_",
        _equal,
        _equal_counts,
        streams_out=False,
    ),
    Case("dare_linear", "sparse_merge_", _sparse(True, False, False), _out, slow=True),
    Case("dare_ties", "sparse_merge_", _sparse(True, False, True), _out, slow=True),
    Case("breadcrumbs", "sparse_merge_", _sparse(False, True, False, divisor=2.5), _out, slow=True),
    Case("breadcrumbs_ties", "sparse_merge_", _sparse(False, True, True, divide=True), _out),
    Case("sparse_all", "sparse_merge_", _sparse(True, True, True, True, 1.5), _out, slow=True),
    Case("sparse_both", "sparse_merge_", _sparse(True, True, False), _out, slow=True),
    Case("sparse_bare", "sparse_merge_", _bare, _out, slow=True),
    Case("della", "sparse_merge_", _ranked("per_element", True, factors=False), _out, slow=True),
    Case("della_factors", "sparse_merge_", _ranked("per_element", True), _out, slow=True),
    Case("della_linear", "sparse_merge_", _ranked("chance", False), _out, slow=True),
    Case("breadcrumbs_rows", "sparse_merge_", _ranked("band", True), _out, slow=True),
    _sums_case("sparse", _sparse_sums),
    _sums_case("sparse.ranked", _ranked_sums),
    _sums_case("gram", _gram),
    _sums_case("gram.deltas", _sums("gram")),
    _sums_case("gram.rows", _rows("gram"), rows=True),
    _sums_case("dots", _dots),
    _sums_case("statistics", _sums("statistics")),
    _sums_case("statistics.rows", _rows("statistics"), rows=True),
    _sums_case("ram_counts", _sums("ram_counts", reals=[0.004])),
    _sums_case("emr", _sums("emr", reals=[0.0])),
    _sums_case("sce", _sce_sums),
    _sums_case("pcb_extremes", _sums("pcb_extremes")),
    _sums_case("pcb_exp", _pcb_exp_sums),
    Case("packed_sum", "packed_sum_", _packed_sum(_TRIMMED), _only_out),
    Case("packed_sum.any", "packed_sum_", _packed_sum(_ANY), _only_out, slow=True),
    Case("packed_dots", "packed_dots_", _packed_dots(_TRIMMED), _dots_of_all, False, slow=True),
    Case("packed_dots.any", "packed_dots_", _packed_dots(_ANY), _dots_of_all, False, slow=True),
    _pointwise("nearswap", 0.005, 1e-6, models=1),
    _pointwise("ram", 0.004),
    _pointwise("magmax", 0.7),
    _pointwise("consensus", 0.3, 2.0),
    _pointwise("tall", 0.3, 0.4, 1.0),
    _pointwise("emr", -1.0, 1.0),
    _pointwise("emr", 1.0, 1.7),
    _pointwise("variance"),
    _pointwise("sce", 0.0, 0.0),
    _pointwise("sce", 1.0, 2e-5),
    Case("row_ranks", "row_ranks_", _row_ranks, _rank_room, streams_out=False, slow=True),
    Case("row_weighted_sum", "row_weighted_sum_", _row_sum(False), _out, slow=True),
    Case("row_task_arithmetic", "row_weighted_sum_", _row_sum(True), _out, slow=True),
    _divergence_case("maxima"),
    _divergence_case("maxima", rows=True),
    _divergence_case("exp"),
    _divergence_case("exp", rows=True),
    _divergence_case("divergence"),
    _divergence_case("divergence", rows=True),
    _divergence_case("all"),
    _divergence_case("all", rows=True),
    _comparison(0),
    _comparison(3, start=3 << 16, every=EVERY),
    _comparison(5),
    Case("row_importance", "row_importance_", _importance(None), _out, slow=True),
    Case("arcee_fusion", "row_importance_", _importance(8e-6), _out, slow=True),
    *(
        Case(f"pcb_{name}", "pcb_merge_", _pcb(variant), _out, slow=True)
        for variant, name in enumerate(("paper", "root", "vision", "vision_es"))
    ),
    *(
        Case(f"pcb_{name}_scores", "pcb_scores_", _pcb(k), _pcb_scores, False, slow=True)
        for k, name in enumerate(("paper", "root", "vision", "vision_es"))
    ),
]

# Those of ops that GPUs have kernels for.
GPU_CASES = [case for case in CASES if has_kernel("cuda", case.op)]

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
