"""Writes an analysis: JSON, CSV, and the report if requested."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pymerge.analysis.records import Analysis, Group
from pymerge.merging import publish
from pymerge.output import OutputDirectory, write_file
from pymerge.strict_json import read_bytes

__all__ = ["JSON", "check_output", "load_analysis", "tables", "write_analysis"]

JSON = "analysis.json"
GROUPS, PAIRS, SPECTRA = "groups.csv", "pairs.csv", "spectra.csv"
_REPORT = "pymerge.analysis.report"


def write_analysis(
    analysis: Analysis,
    out: str | os.PathLike[str],
    *,
    html: bool = True,
    force: bool = False,
    advice: Sequence[str] = (),
) -> list[str]:
    """Write an analysis into a new directory, which appears either complete or not at all.

    Args:
        analysis: the result of `pymerge.analyze`.
        out: directory to write; must not exist unless `force`.
        html: also write the report and its pictures, which need plotly and matplotlib.
        force: replace an existing `out`.
        advice: paragraphs of plain text for the report; see `pymerge.analysis.advise`.

    Returns:
        The names of the files: analysis.json (everything; `load_analysis` reads it), groups.csv (a
        row for each group and model), pairs.csv (for each group and pair of models), spectra.csv
        if there are spectra, and those of the report.

    Raises:
        RequestError: `out` exists, or cannot be written, or the report's libraries are missing.
        MergeError: writing failed; nothing is left behind.

    >>> import tempfile, torch, pymerge
    >>> found = pymerge.analyze(torch.zeros(3), [torch.ones(3)])
    >>> out = Path(tempfile.mkdtemp()) / "report"
    >>> write_analysis(found, out, html=False)
    ['analysis.json', 'groups.csv', 'pairs.csv']
    """
    check_output(out, html=html, force=force, inputs=_inputs(analysis))
    directory = OutputDirectory(Path(out), force=force, inputs=_inputs(analysis))
    texts = _texts(analysis)
    with directory:
        for name, text in texts.items():
            write_file(directory.path / name, text.encode())
        if html and has_report():
            from pymerge.analysis import report

            report.write(analysis, directory.path, advice=advice)
        directory.commit()
    others = {path.name for path in Path(out).iterdir()} - set(texts)
    return [*texts, *sorted(others)]


def check_output(
    out: str | os.PathLike[str],
    *,
    html: bool,
    force: bool,
    inputs: Sequence[Path],
) -> None:
    """Raise RequestError if `write_analysis` would, before anything is read."""
    publish.check_output(out, inputs, force=force)
    if html and has_report():
        from pymerge.analysis import report

        report.require()


def has_report() -> bool:
    """Return whether this installation has the module that writes reports."""
    return importlib.util.find_spec(_REPORT) is not None


def load_analysis(path: str | os.PathLike[str]) -> Analysis:
    """Read an analysis from its directory or its JSON file, and return it.

    Raises:
        RequestError: it cannot be read, is no analysis, or is of another version.
    """
    path = Path(path)
    path = path / JSON if path.is_dir() else path
    return Analysis.from_json(read_bytes(path, "an analysis"), str(path))


def _inputs(analysis: Analysis) -> list[Path]:
    return [Path(model.path) for model in (analysis.base, *analysis.models) if model.path]


def _texts(analysis: Analysis) -> dict[str, str]:
    texts = {JSON: analysis.to_json() + "\n"}
    for name, rows in tables(analysis).items():
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        texts[name] = text.getvalue()
    return texts


def tables(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """Return the tables by the names of their files; undefined numbers are empty."""
    found = {
        GROUPS: [
            row for scope, group in _all(analysis) for row in _group_rows(analysis, scope, group)
        ],
        PAIRS: [
            row for scope, group in _all(analysis) for row in _pair_rows(analysis, scope, group)
        ],
    }
    if analysis.spectra:
        found[SPECTRA] = [
            {
                "tensor": spectrum.tensor,
                "model": label,
                "rank": spectrum.rank,
                "effective_rank": spectrum.effective_rank[k],
                "stable_rank": spectrum.stable_rank[k],
                "energy": spectrum.energy[k],
                "interference": spectrum.interference,
            }
            for spectrum in analysis.spectra
            for k, label in enumerate(analysis.labels)
        ]
    return found


def _all(analysis: Analysis) -> Iterator[tuple[str, Group]]:
    yield "whole", analysis.whole
    for scope, groups in (
        ("layer", analysis.layers),
        ("module_type", analysis.module_types),
        ("tensor", analysis.tensors),
    ):
        for group in groups:
            yield scope, group


def _group_rows(analysis: Analysis, scope: str, group: Group) -> Iterator[dict[str, Any]]:
    for k, label in enumerate(analysis.labels):
        row: dict[str, Any] = {
            "scope": scope,
            "name": group.name,
            "model": label,
            "parameters": group.parameters,
            "tensors": group.tensors,
            "base_l2": group.base_l2,
            "l1": group.l1[k],
            "l2": group.l2[k],
            "norm_share": group.norm_share[k],
            "unchanged": group.unchanged[k],
            "sign_agreement": group.sign_agreement,
        }
        for trimmed in group.trimmed:
            at = f"@{trimmed.density:g}"
            row[f"threshold{at}"] = trimmed.threshold[k]
            row[f"kept{at}"] = trimmed.kept[k]
            row[f"kept_norm{at}"] = trimmed.kept_norm[k]
            row[f"sign_agreement{at}"] = trimmed.sign_agreement
        for level, value in zip(group.quantiles.levels, group.quantiles.values[k], strict=True):
            row[f"quantile_{level:g}"] = value
        yield row


def _pair_rows(analysis: Analysis, scope: str, group: Group) -> Iterator[dict[str, Any]]:
    labels = analysis.labels
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            row: dict[str, Any] = {
                "scope": scope,
                "name": group.name,
                "model_a": labels[i],
                "model_b": labels[j],
                "dot": group.dot[i][j],
                "cosine": group.cosine[i][j],
                "l1_distance": group.l1_distance[i][j],
                "l2_distance": group.l2_distance[i][j],
                "equal": group.equal[i][j],
                "sign_conflict": group.sign_conflict[i][j],
            }
            for trimmed in group.trimmed:
                row[f"sign_conflict@{trimmed.density:g}"] = trimmed.sign_conflict[i][j]
                row[f"overlap@{trimmed.density:g}"] = trimmed.overlap[i][j]
            yield row
