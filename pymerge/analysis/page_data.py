"""The numbers behind the report's plots: plain lists, rounded, of bounded size.

Matrices are embedded as their upper triangles, for the whole model, layers and module types; single
tensors have only rows of a table. The files beside the report have everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pymerge.analysis.records import Analysis, Group, Matrix

__all__ = ["PAIR_NUMBERS", "mean_of", "off_diagonal", "page_data", "percent", "plain"]

# Numbers in all heat maps together, about 7 bytes each, and in all histograms: 24 layers and 10
# types of 8 models take about 11,000 of them.
PAIR_NUMBERS = 250_000
_HISTOGRAM_NUMBERS = 250_000
_SINGULAR_NUMBERS = 100_000
# With fewer numbers there is no pattern.
_FEWEST_PAIRS = 6
_MOST_LAYERS = 200


def plain(value: float | None) -> float | None:
    """Return a number with four significant digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def percent(value: float | None) -> float | None:
    """Return a share in per cent."""
    return None if value is None else 100.0 * value


def off_diagonal(matrix: Matrix) -> list[float | None]:
    """Return the upper triangle, row by row: the pairs (0, 1), (0, 2), ..., (1, 2), ..."""
    return [row[j] for i, row in enumerate(matrix) for j in range(i + 1, len(row))]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the defined values; None if there are none."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(found) / len(found) if found else None


def page_data(analysis: Analysis) -> dict[str, Any]:
    """Return what the page's script draws, and notes on what was left out because of its size."""
    notes: list[str] = []
    pairs = _pairs(analysis, notes)
    return {
        "models": list(analysis.labels),
        "densities": [plain(density) for density in analysis.densities],
        "pairs": pairs,
        "layers": [group.name for group in analysis.layers],
        "ofModels": _models_by_layer(analysis),
        "ofPairs": _pairs_by_layer(analysis),
        "grid": _grid(analysis),
        "alike": _alike(analysis, notes),
        "histograms": _histograms(analysis, notes),
        "trim": {
            "kept": _columns([trimmed.kept for trimmed in analysis.whole.trimmed]),
            "norm": _columns([trimmed.kept_norm for trimmed in analysis.whole.trimmed]),
        },
        "spectra": _spectra(analysis, notes),
        "notes": notes,
    }


def _columns(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Return [models][rows] in per cent."""
    return [[plain(percent(x)) for x in column] for column in zip(*rows, strict=True)]


def _places(analysis: Analysis) -> list[tuple[str, Group]]:
    found = [("whole model", analysis.whole)]
    found += [(f"layer {group.name}", group) for group in analysis.layers]
    return found + [(f"type {group.name}", group) for group in analysis.module_types]


def _kept_places(
    analysis: Analysis, numbers: int, limit: int, what: str, notes: list[str]
) -> list[tuple[str, Group]]:
    """Return the places whose numbers, `numbers` for each, fit: all, or only the first."""
    places = _places(analysis)
    if numbers * len(places) <= limit:
        return places
    notes.append(
        f"{what} of {len(places) - 1} layers and types would be {numbers * len(places):,} numbers; "
        "this page has those of the whole model, analysis.json has all."
    )
    return places[:1]


def _pairs(analysis: Analysis, notes: list[str]) -> dict[str, Any]:
    statistics: list[tuple[str, str, bool, bool, Callable[[Group], Matrix]]] = [
        ("cosine", "cosine", True, False, lambda g: g.cosine),
        ("conflict", "sign conflict, %", False, True, lambda g: g.sign_conflict),
        ("equal", "equal weights, %", False, True, lambda g: g.equal),
        ("distance", "L2 distance", False, False, lambda g: g.l2_distance),
    ]
    for n, density in enumerate(analysis.densities):
        top = f"top {100 * density:g} %"
        statistics += [
            (f"overlap{n}", f"overlap of the {top}, %", False, True, _trimmed(n, "overlap")),
            (f"conflict{n}", f"sign conflict, {top}, %", False, True, _trimmed(n, "sign_conflict")),
        ]
    count = len(analysis.models)
    numbers = count * (count - 1) // 2 * len(statistics)
    places = _kept_places(analysis, numbers, PAIR_NUMBERS, "Heat maps", notes)
    values = []
    for _, group in places:
        rows = []
        for _, _, _, share, get in statistics:
            found = off_diagonal(get(group))
            rows.append([plain(percent(x) if share else x) for x in found])
        values.append(rows)
    return {
        "statistics": [
            {"key": key, "label": label, "signed": signed}
            for key, label, signed, _, _ in statistics
        ],
        "places": [name for name, _ in places],
        "values": values,
    }


def _trimmed(number: int, name: str) -> Callable[[Group], Matrix]:
    return lambda group: getattr(group.trimmed[number], name)


def _relative(group: Group) -> list[float | None]:
    """Return the task vectors' lengths in per cent of the base's."""
    return [
        percent(x / group.base_l2) if x is not None and group.base_l2 else None for x in group.l2
    ]


Values = Callable[[Group], Sequence[float | None]]


def _shares(get: Callable[[Group], Sequence[float | None]]) -> Values:
    return lambda group: [percent(x) for x in get(group)]


def _model_statistics(densities: Sequence[float]) -> list[tuple[str, Values]]:
    """Return labels, and functions that return the values of each model of a group."""
    found: list[tuple[str, Values]] = [
        ("share of the squared norm, %", _shares(lambda g: g.norm_share)),
        ("length, % of the base's", _relative),
        ("unchanged weights, %", _shares(lambda g: g.unchanged)),
    ]
    for n, density in enumerate(densities):
        top = f"top {100 * density:g} %"
        found += [
            (f"kept in the {top}, %", _shares(lambda g, n=n: g.trimmed[n].kept)),
            (f"squared norm in the {top}, %", _shares(lambda g, n=n: g.trimmed[n].kept_norm)),
        ]
    return found


def _pair_statistics(densities: Sequence[float]) -> list[tuple[str, Values]]:
    """Return labels, and functions of values whose mean, lowest and highest are drawn."""
    found: list[tuple[str, Values]] = [
        ("cosine", lambda g: off_diagonal(g.cosine)),
        ("sign conflict, %", _shares(lambda g: off_diagonal(g.sign_conflict))),
        ("equal weights, %", _shares(lambda g: off_diagonal(g.equal))),
        ("sign agreement, %", _shares(lambda g: [g.sign_agreement])),
    ]
    for n, density in enumerate(densities):
        top = f"top {100 * density:g} %"
        found += [
            (
                f"overlap of the {top}, %",
                _shares(lambda g, n=n: off_diagonal(g.trimmed[n].overlap)),
            ),
            (
                f"sign conflict, {top}, %",
                _shares(lambda g, n=n: off_diagonal(g.trimmed[n].sign_conflict)),
            ),
        ]
    return found


def _models_by_layer(analysis: Analysis) -> list[dict[str, Any]]:
    """Return, for each statistic, a series over layers for each model."""
    found = []
    for label, get in _model_statistics(analysis.densities):
        rows = [get(group) for group in analysis.layers]
        series = [[plain(x) for x in column] for column in zip(*rows, strict=True)]
        found.append({"label": label, "series": series})
    return found


def _pairs_by_layer(analysis: Analysis) -> list[dict[str, Any]]:
    """Return, for each statistic, mean, lowest and highest of the pairs over layers."""
    found = []
    for label, get in _pair_statistics(analysis.densities):
        rows = [[x for x in get(group) if x is not None] for group in analysis.layers]
        series = [
            [plain(mean_of(row)) for row in rows],
            [plain(min(row, default=None)) for row in rows],
            [plain(max(row, default=None)) for row in rows],
        ]
        found.append({"label": label, "series": series})
    return found


def _grid(analysis: Analysis) -> dict[str, Any] | None:
    """Return layers by module types: the statistics that can be added up exactly from tensors."""
    layers = [group.name for group in analysis.layers]
    types = [group.name for group in analysis.module_types]
    if len(layers) < 2 or len(types) < 2:
        return None
    cells: dict[tuple[str, str], list[Group]] = {}
    for tensor, group in zip(analysis.inventory, analysis.tensors, strict=True):
        place = (tensor.layer if tensor.layer is not None else "other", tensor.module_type)
        cells.setdefault(place, []).append(group)
    shares, lengths, cosines = [], [], []
    for layer in layers:
        row = [cells.get((layer, kind), []) for kind in types]
        shares.append([plain(_share(groups)) for groups in row])
        lengths.append([plain(_length(groups)) for groups in row])
        cosines.append([plain(_cosine(groups)) for groups in row])
    return {
        "types": types,
        "statistics": [
            {"label": "share of the squared norm, %", "signed": False, "values": shares},
            {"label": "length, % of the base's", "signed": False, "values": lengths},
            {"label": "cosine", "signed": True, "values": cosines},
        ],
    }


def _share(groups: Sequence[Group]) -> float | None:
    """Return the mean over models of the groups' share of the squared norm, in per cent."""
    if not groups:
        return None
    rows = zip(*(group.norm_share for group in groups), strict=True)
    known = [[x for x in row if x is not None] for row in rows]
    return percent(mean_of(math.fsum(row) for row in known if row))


def _length(groups: Sequence[Group]) -> float | None:
    """Return the mean over models of the groups' length in per cent of the base's."""
    base = math.sqrt(math.fsum(group.base_l2**2 for group in groups))
    if not base:
        return None
    rows = zip(*(group.l2 for group in groups), strict=True)
    return percent(
        mean_of(math.sqrt(math.fsum((x or 0.0) ** 2 for x in row)) / base for row in rows)
    )


def _cosine(groups: Sequence[Group]) -> float | None:
    """Return the mean cosine over the pairs of models, of groups together."""
    if not groups:
        return None
    count = len(groups[0].l2)
    dot = [
        [math.fsum(group.dot[i][j] or 0.0 for group in groups) for j in range(count)]
        for i in range(count)
    ]
    found: list[float | None] = []
    for i in range(count):
        for j in range(i + 1, count):
            scale = math.sqrt(dot[i][i]) * math.sqrt(dot[j][j])
            found.append(dot[i][j] / scale if scale else None)
    return mean_of(found)


def _alike(analysis: Analysis, notes: list[str]) -> dict[str, Any] | None:
    """Return how similar the patterns of cosines of two layers are: their correlation over pairs.

    None with fewer than four models: a correlation of three numbers means nothing.
    """
    layers = [group.name for group in analysis.layers]
    pairs = len(analysis.models) * (len(analysis.models) - 1) // 2
    if len(layers) < 2 or pairs < _FEWEST_PAIRS:
        return None
    if len(layers) > _MOST_LAYERS:
        notes.append(f"Layers by layers: {len(layers)} layers are too many for this page.")
        return None
    rows = [off_diagonal(group.cosine) for group in analysis.layers]
    found = _correlations(np.array(rows, dtype=float))  # None becomes NaN
    return {"values": [[plain(x) for x in row] for row in found.tolist()], "pairs": pairs}


def _correlations(rows: np.ndarray) -> np.ndarray:
    """Return the correlation of any two rows over the columns that both have; else NaN."""
    both = np.isfinite(rows)
    count = both.sum(axis=1, keepdims=True)
    values = np.where(both, rows, 0.0)
    # near zero, so that the differences below lose nothing
    values = np.where(both, values - values.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    shared = both.astype(float) @ both.T
    sums = values @ both.T  # [i, j]: of row i, where row j is defined
    squares = values**2 @ both.T - sums**2 / np.maximum(shared, 1)
    products = values @ values.T - sums * sums.T / np.maximum(shared, 1)
    scale = np.sqrt(np.clip(squares, 0.0, None) * np.clip(squares.T, 0.0, None))
    known = (shared >= _FEWEST_PAIRS) & (scale > 0)
    return np.where(known, products / np.where(known, scale, 1.0), np.nan)


def _histograms(analysis: Analysis, notes: list[str]) -> list[dict[str, Any]]:
    """Return, for each place, the centres of the bins and each model's entries per octave."""
    bins = len(analysis.whole.histogram.log2_edges) + 1
    numbers = bins * (len(analysis.models) + 1)
    found = []
    places = _kept_places(analysis, numbers, _HISTOGRAM_NUMBERS, "Histograms", notes)
    for name, group in places:
        histogram = group.histogram
        edges = histogram.log2_edges
        widths = [b - a for a, b in itertools.pairwise(edges)]
        total = max(1, group.parameters)
        found.append(
            {
                "place": name,
                "middles": [plain((a + b) / 2) for a, b in itertools.pairwise(edges)],
                "shares": [
                    [plain(100 * n / total / w) for n, w in zip(counts, widths, strict=True)]
                    for counts in histogram.counts
                ],
                "zeros": [plain(100 * zeros / total) for zeros in histogram.zeros],
            }
        )
    return found


def _spectra(analysis: Analysis, notes: list[str]) -> dict[str, Any] | None:
    spectra = analysis.spectra
    if not spectra:
        return None
    statistics: list[tuple[str, list[list[float | None]]]] = [
        ("effective rank", [list(s.effective_rank) for s in spectra]),
        ("stable rank", [list(s.stable_rank) for s in spectra]),
        ("energy of the top singular values, %", [[percent(x) for x in s.energy] for s in spectra]),
    ]
    between: list[tuple[str, list[float | None]]] = [
        ("overlap of left subspaces, %", [_mean_pair(s.left_overlap) for s in spectra]),
        ("overlap of right subspaces, %", [_mean_pair(s.right_overlap) for s in spectra]),
        ("singular task interference", [s.interference for s in spectra]),
    ]
    kept, used = [], 0
    for spectrum in spectra:
        used += sum(len(values) for values in spectrum.top_singular_values)
        if used > _SINGULAR_NUMBERS:
            notes.append(
                f"Singular values of {len(kept)} of {len(spectra)} matrices are on this page; "
                "analysis.json has all."
            )
            break
        kept.append([[plain(x) for x in values] for values in spectrum.top_singular_values])
    return {
        "tensors": [spectrum.tensor for spectrum in spectra],
        "ofModels": [
            {"label": label, "series": [[plain(x) for x in c] for c in zip(*rows, strict=True)]}
            for label, rows in statistics
        ],
        "between": [
            {"label": label, "series": [[plain(x) for x in values]]} for label, values in between
        ],
        "singular": kept,
    }


def _mean_pair(matrix: Matrix) -> float | None:
    return percent(mean_of(off_diagonal(matrix)))
