"""Arcee Fusion in its exact dialect: divergences of rows, the threshold, the merge.

Everything is computed tile by tile; for a tensor, only one number for each of at most `_KEPT` rows
is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pymerge.engine.context import Context
from pymerge.engine.execute import merge_each
from pymerge.engine.scores import TILE
from pymerge.engine.select import Part, order_statistics
from pymerge.engine.trim import TrimTarget
from pymerge.engine.work import Sink, Source, Work, row_length, slices
from pymerge.methods.directions.passes import whole_rows
from pymerge.methods.matrices.passes import run as run_matrices
from pymerge.ops.arguments import DIVERGENCE, DIVERGENCE_ROWS, DIVERGENCE_STEPS
from pymerge.ops.array import Flat, as_flat
from pymerge.ops.call import Counters, call
from pymerge.ops.constants import SUM_CHUNK
from pymerge.ops.runner import fetched

__all__ = ["run"]

_CACHED = 1 << 18  # elements that stay in the caches of a processor from one op to the next
_KEPT = 1 << 20  # rows whose divergences are stored; if there are more, only those of a tile
_QUANTILES = (0.5, 0.25, 0.75)
_SPREAD = 1.5  # interquartile ranges from the median to the threshold


def run(works: Sequence[Work], source: Source, sink: Sink, context: Context) -> None:
    """Run the exact dialect tile by tile, mergekit's on torch."""
    own = [work.parameters for work in works if not work.copied]
    if any(parameters["semantics"] == "exact" for parameters in own):
        merge_each(works, source, sink, context, _merge)
    else:
        run_matrices(works, source, sink, context)


def _merge(work: Work, source: Source, sink: Sink, context: Context) -> None:
    """Merge a tensor: take the elements whose importance is at least median + 1.5 IQR."""
    base, (model,) = source.load(work.name)
    assert base is not None
    if not work.shape:
        _take_model(work, model, source, sink, context)
        return
    fusion = _Fusion(work, base, model, context)
    threshold = fusion.threshold() if work.numel > 0 else 0.0
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        fusion.importances(start, stop, out, context.stats, threshold)
        context.check(2, source, work.name, start, stop)
        context.progress.advance(base[start:stop].nbytes + model[start:stop].nbytes)


def _take_model(work: Work, model: Flat, source: Source, sink: Sink, context: Context) -> None:
    """Copy the model's tensor, as mergekit does for a single number, which has no row."""
    for start, out in sink.pieces(work.name):
        stop = start + out.numel()
        arguments = (out, context.stats, [model[start:stop]], [1.0], 1.0)
        call("weighted_sum_", *arguments, wide=work.wide, backend=context.backend)
        context.check(0, source, work.name, start, stop)
        context.progress.advance(2 * model[start:stop].nbytes)


class _Fusion:
    """A base and a model, and the importance of each element of the model's task vector."""

    def __init__(self, work: Work, base: Flat, model: Flat, context: Context) -> None:
        self._numel = work.numel
        self._columns = max(row_length(work), 1)
        self._base, self._model = base, model
        self._context = context
        self._how: dict[str, Any] = {"wide": work.wide, "backend": context.backend}
        self._tile = min(_CACHED if context.runner.on_host else TILE, work.numel)
        self._dtype = "float64" if work.wide else "float32"
        rows = work.numel // self._columns
        self._kept = self._divergences(0, rows) if 0 < rows <= _KEPT else None

    def importances(
        self, start: int, stop: int, out: Flat, stats: Counters, threshold: float | None = None
    ) -> None:
        """Compute elements [start, stop): their importance or, with a threshold, the merge."""
        for begin, end, columns in whole_rows(start, stop, self._columns):
            first, last = begin // self._columns, -(-end // self._columns)
            kept = self._kept
            call(
                "row_importance_",
                out[begin - start : end - start],
                stats,
                self._base[begin:end],
                self._model[begin:end],
                self._divergences(first, last) if kept is None else kept[first:last],
                columns,
                threshold,
                **self._how,
            )

    def threshold(self) -> float:
        """Return median + 1.5 (upper - lower quartile) of the importances, in the type in which
        they are computed."""
        last = self._numel - 1
        targets = [TrimTarget("rank", int(share * last) + 1) for share in _QUANTILES]
        # No sample gives a first bracket: its lines would need the whole rows they come from. With
        # all keys in the first bracket, float32 takes two passes, where a sample rarely saves one.
        cuts, _ = order_statistics(
            self._scored,
            targets,
            self._numel,
            bins=max(self._context.bins // 4, 1 << 10),  # there are three histograms
            sample=self._context.sample,
            samples=[],
            **self._how,
        )
        keys = np.array([cut.key for cut in cuts], self._dtype.replace("float", "int"))
        median, low, high = keys.view(self._dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            return float(median + median.dtype.type(_SPREAD) * (high - low))

    def _scored(self) -> Iterator[Part]:
        # A tensor so short that a selection holds all of it is one tile: its memory is reused.
        runner = self._context.runner
        room = runner.zeros((self._tile,), self._dtype)
        zeros = runner.zeros((self._tile,), self._dtype)
        stats = runner.zeros((3,), "int64")
        for number, (start, stop) in enumerate(slices(self._numel, self._tile)):
            own = as_flat(room[: stop - start])
            self.importances(start, stop, own, stats)
            yield number, as_flat(zeros[: stop - start]), [own] * len(_QUANTILES)

    def _divergences(self, first: int, last: int) -> Counters:
        """Return the divergences of rows [first, last)."""
        columns, on_host = self._columns, self._context.runner.on_host
        if columns > (_CACHED if on_host else TILE):
            return np.array([self._of_long_row(row) for row in range(first, last)])
        # A device divides a call into tiles itself.
        step = max(1, _CACHED // columns) if on_host else last - first
        found = []
        for begin in range(first, last, step):
            end = min(begin + step, last)
            table = self._context.runner.zeros((DIVERGENCE_ROWS, end - begin), "float64")
            self._sums(table, begin * columns, end * columns, "all", columns)
            found.append(table[DIVERGENCE_ROWS - 1])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _sums(self, table: Counters, begin: int, end: int, kind: str, columns: int) -> None:
        base, model = self._base[begin:end], self._model[begin:end]
        call("divergence_sums_", table, base, model, kind, columns, **self._how)

    def _of_long_row(self, row: int) -> float:
        """Return the divergence of a row, chunk by chunk: the same bits as for a row at once."""
        given: list[float] = []
        for kind in DIVERGENCE_STEPS:
            first, count = DIVERGENCE[kind]
            totals: list[float] = []
            for start, stop in slices(self._columns, TILE):
                chunks = -(-(stop - start) // SUM_CHUNK)
                table = np.zeros((DIVERGENCE_ROWS, chunks))
                table[: len(given)] = np.array(given).reshape(-1, 1)
                begin = row * self._columns
                self._sums(table, begin + start, begin + stop, kind, 0)
                for i, values in enumerate(fetched(table)[first : first + count].tolist()):
                    if len(totals) <= i:
                        totals.append(values.pop(0))
                    for value in values:  # in order: a sum may depend on the order
                        totals[i] = max(totals[i], value) if kind == "maxima" else totals[i] + value
            given += totals
        return given[-1]
