"""Arguments and outputs of the case table's rows whose ops write sums, counts or ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pymerge.ops.arguments import DIVERGENCE, DIVERGENCE_ROWS, sums_shape
from pymerge.ops.comparison import Comparison
from pymerge.ops.constants import SUM_CHUNK
from tests.case import Case, columns_of, padded, thresholds
from tests.case_merges import bands, packed, ranked


def stats_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"stats": torch.zeros(3, dtype=torch.int64)}


def signs(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {
        "base": base,
        "models": models,
        "thresholds": thresholds(base, models),
        "weights": [],
        "weighting": "none",
        "elect": "mass",
    }


def histogram(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
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


def histogram_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    chunks = -(-base.numel() // 65536)
    return {
        "counts": torch.zeros(2, len(models), 259, dtype=torch.int32),
        "hot_chunks": torch.zeros(len(models), chunks, dtype=torch.int32),
    }


CHUNK = 1000


def equal_counts(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "model": models[0], "key": thresholds(base, models)[0], "chunk": CHUNK}


def equal_counts_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"counts": torch.zeros(-(-base.numel() // CHUNK), dtype=torch.int64)}


def row_ranks(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": base, "models": models, "columns": columns_of(base.numel())}


def ranks_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {"ranks": torch.full((len(models), padded(base.numel())), 7, dtype=torch.int32)}


def sums_of(kind: str, **more: Any) -> Callable[..., dict[str, Any]]:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        return {"base": base, "models": models, "kind": kind, **more}

    return arguments


def sparse_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {**sums_of("sparse", start=3 << 10)(base, models), **bands(base, models, True, True)}


def ranked_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    kept = ranked("chance", False)(base, models)
    names = ("lo", "last", "seeds", "limits", "ranks", "chances", "start")
    return {**sums_of("sparse")(base, models), **{name: kept[name] for name in names}}


def sce_sums(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    wide = torch.float64 in [base.dtype, *(model.dtype for model in models)]
    dtype, bits = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    key = int(torch.tensor(2e-5, dtype=dtype).view(bits))
    return {**sums_of("sce")(base, models), "lo": [key]}


def dots(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {**sums_of("dots")(base, models), "models": [*models, models[0]]}


def row_sums_of(kind: str) -> Callable[..., dict[str, Any]]:
    return lambda base, models: sums_of(kind, columns=columns_of(base.numel()))(base, models)


def gram(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
    return {"base": None, "models": models, "kind": "gram"}


def _partials(kind: str, rows: bool = False) -> Callable[..., dict[str, torch.Tensor]]:
    def outputs(
        base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        count = len(models) + (1 if kind == "dots" else 0)
        shape = sums_shape(kind, count, base.numel(), columns_of(base.numel()) if rows else 0)
        return {"partials": torch.full(shape, 7.0, dtype=torch.float64)}

    return outputs


def sums_case(name: str, arguments: Callable[..., dict[str, Any]], rows: bool = False) -> Case:
    kind = name.partition(".")[0]
    outputs = _partials(kind, rows)
    return Case(f"sums_{name}", "chunk_sums_", arguments, outputs, streams_out=False, slow=True)


def _table(kind: str, rows: bool) -> Callable[..., dict[str, torch.Tensor]]:
    """Return a table of divergences that the preceding kinds have filled."""

    def outputs(
        base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        columns = columns_of(base.numel()) if rows else 0
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


def divergence_case(kind: str, rows: bool = False) -> Case:
    def arguments(base: torch.Tensor, models: list[torch.Tensor]) -> dict[str, Any]:
        columns = columns_of(base.numel()) if rows else 0
        return {"base": base, "model": models[0], "kind": kind, "columns": columns}

    name = f"divergence_{kind}{'.rows' if rows else ''}"
    outputs = _table(kind, rows)
    return Case(name, "divergence_sums_", arguments, outputs, streams_out=False, slow=True)


def comparison(levels: int, **more: Any) -> Case:
    """Return a case that compares task vectors at `levels` levels of a trim."""

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


def packed_dots(shares: Sequence[float]) -> Callable[..., dict[str, Any]]:
    return lambda base, models: {"gradient": models[0], **packed(shares, base, models)}


def packed_dots_out(
    base: torch.Tensor, models: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    shape = sums_shape("dots", len(models) + 1, base.numel(), 0)
    return {"partials": torch.full(shape, 7.0, dtype=torch.float64)}
