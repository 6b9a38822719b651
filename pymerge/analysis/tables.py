"""The report's tables: columns and finished cells, which the page shows unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pymerge.analysis.page_data import mean_of, off_diagonal, percent
from pymerge.analysis.records import Analysis, Group, Matrix

__all__ = ["NOTHING", "Column", "DataTable", "number", "tables"]

NOTHING = "-"  # for a number that is not defined


@dataclass(frozen=True)
class Column:
    """A heading, its meaning (a tooltip), and whether it has text instead of numbers."""

    name: str
    about: str = ""
    text: bool = False


@dataclass(frozen=True)
class DataTable:
    """Rows of finished text."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: float | None, digits: int = 4) -> str:
    """Return a number as text that JavaScript's parseFloat reads; NOTHING for None."""
    if value is None:
        return NOTHING
    if 1000 <= abs(value) < 10**7:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def tables(analysis: Analysis) -> list[DataTable]:
    """Return the tables of an analysis: models, pairs, layers, types, tensors, spectra."""
    found = [_models(analysis)]
    if len(analysis.models) > 1:
        found.append(_pairs(analysis))
    found += [
        _groups(analysis, "layers", "Layers", analysis.layers),
        _groups(analysis, "types", "Module types", analysis.module_types),
        _groups(analysis, "tensors", "Tensors", analysis.tensors),
    ]
    if analysis.spectra:
        found.append(_spectra(analysis))
    return found


def _share(value: float | None) -> str:
    return number(percent(value), 3)


def _models(analysis: Analysis) -> DataTable:
    whole = analysis.whole
    columns = [
        Column("model", text=True),
        Column("length", "L2 norm of the task vector"),
        Column("% of base", "that norm, relative to the norm of the base's weights"),
        Column("mean |τ|", "L1 norm over the number of parameters"),
        Column("unchanged %", "weights that are exactly the base's"),
    ]
    several = len(analysis.models) > 1
    if several:
        columns += [
            Column("cosine", "mean of the cosines with the other models"),
            Column("conflict %", "mean sign conflict with the other models"),
        ]
    levels = whole.quantiles.levels
    columns += [
        Column(f"norm in top {100 * trimmed.density:g} %", "share of the squared norm, per cent")
        for trimmed in whole.trimmed
    ]
    columns += [
        Column(f"|τ| at {100 * level:g} %", "quantile of the magnitudes, from a histogram")
        for level in levels
    ]
    columns.append(Column("path", text=True))
    rows = []
    for k, model in enumerate(analysis.models):
        length, total = whole.l2[k], whole.l1[k]
        cells = [
            model.label,
            number(length),
            _share(length / whole.base_l2 if length is not None and whole.base_l2 else None),
            number(total / whole.parameters if total is not None and whole.parameters else None),
            _share(whole.unchanged[k]),
        ]
        if several:
            cells += [
                number(mean_of(_others(whole.cosine, k)), 3),
                _share(mean_of(_others(whole.sign_conflict, k))),
            ]
        cells += [_share(trimmed.kept_norm[k]) for trimmed in whole.trimmed]
        cells += [number(value, 3) for value in whole.quantiles.values[k]]
        rows.append((*cells, model.path))
    return DataTable("models", "Models", tuple(columns), tuple(rows))


def _others(matrix: Matrix, k: int) -> list[float | None]:
    return [value for j, value in enumerate(matrix[k]) if j != k]


def _pairs(analysis: Analysis) -> DataTable:
    whole = analysis.whole
    columns = [
        Column("model", text=True),
        Column("and", text=True),
        Column("cosine", "of the two task vectors"),
        Column("dot", "product of the two task vectors"),
        Column("L1 distance"),
        Column("L2 distance"),
        Column("equal %", "weights that are equal in both models"),
        Column("conflict %", "opposite signs among the coordinates that both changed"),
    ]
    for trimmed in whole.trimmed:
        top = f"top {100 * trimmed.density:g} %"
        columns += [
            Column(f"overlap, {top}", "share of the kept coordinates that both keep, per cent"),
            Column(f"conflict, {top}", "opposite signs among those that both keep, per cent"),
        ]
    rows = []
    labels = analysis.labels
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            cells = [
                labels[i],
                labels[j],
                number(whole.cosine[i][j]),
                number(whole.dot[i][j]),
                number(whole.l1_distance[i][j]),
                number(whole.l2_distance[i][j]),
                _share(whole.equal[i][j]),
                _share(whole.sign_conflict[i][j]),
            ]
            for trimmed in whole.trimmed:
                cells += [_share(trimmed.overlap[i][j]), _share(trimmed.sign_conflict[i][j])]
            rows.append(tuple(cells))
    return DataTable("pairs", "Pairs of models", tuple(columns), tuple(rows))


def _groups(analysis: Analysis, key: str, title: str, groups: Sequence[Group]) -> DataTable:
    """Return a row for each group: means over models, and over pairs of models."""
    of_tensors = key == "tensors"
    several = len(analysis.models) > 1
    columns: list[tuple[Column, Callable[[Group], str]]] = [
        (Column("parameters"), lambda g: str(g.parameters)),
        (
            Column("norm share %", "of the task vectors' squared norm"),
            _mean(lambda g: g.norm_share),
        ),
        (Column("% of base", "length of the task vectors, relative"), _mean(_relative)),
        (Column("unchanged %"), _mean(lambda g: g.unchanged)),
    ]
    if not of_tensors:
        columns.insert(1, (Column("tensors"), lambda g: str(g.tensors)))
    if several:
        columns += [
            (Column("cosine", "mean of the pairs"), lambda g: number(mean_of(_cosines(g)), 3)),
            (Column("lowest"), lambda g: number(min(_cosines(g), default=None), 3)),
            (Column("highest"), lambda g: number(max(_cosines(g), default=None), 3)),
            (Column("conflict %"), _mean(lambda g: off_diagonal(g.sign_conflict))),
            (Column("agreement %", "of signs: TIES' ratio"), lambda g: _share(g.sign_agreement)),
        ]
    for n, density in enumerate(analysis.densities):
        top = f"top {100 * density:g} %"
        columns.append((Column(f"kept, {top}"), _mean(lambda g, n=n: g.trimmed[n].kept)))
        if several:
            columns += [
                (
                    Column(f"overlap, {top}"),
                    _mean(lambda g, n=n: off_diagonal(g.trimmed[n].overlap)),
                ),
                (
                    Column(f"conflict, {top}"),
                    _mean(lambda g, n=n: off_diagonal(g.trimmed[n].sign_conflict)),
                ),
            ]
    names = [Column("name", text=True)]
    if of_tensors:
        names.append(Column("shape", text=True))
    rows = []
    for n, group in enumerate(groups):
        first = [group.name]
        if of_tensors:
            first.append(" x ".join(map(str, analysis.inventory[n].shape)) or "scalar")
        rows.append((*first, *(get(group) for _, get in columns)))
    return DataTable(key, title, (*names, *(column for column, _ in columns)), tuple(rows))


def _mean(get: Callable[[Group], Sequence[float | None]]) -> Callable[[Group], str]:
    return lambda group: _share(mean_of(get(group)))


def _relative(group: Group) -> list[float | None]:
    return [x / group.base_l2 if x is not None and group.base_l2 else None for x in group.l2]


def _cosines(group: Group) -> list[float]:
    return [x for x in off_diagonal(group.cosine) if x is not None]


def _spectra(analysis: Analysis) -> DataTable:
    columns = [
        Column("tensor", text=True),
        Column("shape", text=True),
        Column("r", "singular vectors in a subspace"),
        Column("effective rank", "exp of the entropy of the singular values; mean over models"),
        Column("stable rank", "squared Frobenius norm over the squared spectral norm; mean"),
        Column("energy %", "share of the squared norm in the top r; mean"),
    ]
    several = len(analysis.models) > 1
    if several:
        columns += [
            Column("left overlap %", "of the top r left subspaces; mean of the pairs"),
            Column("right overlap %", "of the top r right subspaces; mean of the pairs"),
            Column("interference", "singular task interference of all models together"),
        ]
    rows = []
    for spectrum in analysis.spectra:
        cells = [
            spectrum.tensor,
            " x ".join(map(str, spectrum.shape)),
            str(spectrum.rank),
            number(mean_of(spectrum.effective_rank)),
            number(mean_of(spectrum.stable_rank)),
            _share(mean_of(spectrum.energy)),
        ]
        if several:
            cells += [
                _share(mean_of(off_diagonal(spectrum.left_overlap))),
                _share(mean_of(off_diagonal(spectrum.right_overlap))),
                number(spectrum.interference),
            ]
        rows.append(tuple(cells))
    return DataTable("spectra", "Singular values", tuple(columns), tuple(rows))
