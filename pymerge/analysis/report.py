"""Writes the report of an analysis: one HTML file that opens offline, and pictures beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pymerge.analysis.records import Analysis
from pymerge.errors import RequestError
from pymerge.output.replace import replace_file

__all__ = ["HTML", "require", "write"]

HTML = "report.html"


def require() -> None:
    """Raise a RequestError if the libraries that draw the report are not installed.

    Call this before models are read, which may take long.
    """
    try:
        import matplotlib.figure  # noqa: F401
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"the report needs plotly and matplotlib ({error}): "
            "pip install 'pymerge-kernels[analysis]'; JSON and CSV need nothing"
        ) from None


def write(
    analysis: Analysis, folder: str | os.PathLike[str], *, advice: Sequence[str] = ()
) -> list[Path]:
    """Write `report.html` and PNG files into a folder, each either complete or not at all.

    The page contains plotly.js (about 5 MB), loads nothing, and is of bounded size: single tensors
    have rows of a table, and no matrix. Files with these names are replaced.

    Args:
        analysis: the result of `pymerge.analyze`.
        folder: created if it does not exist.
        advice: paragraphs of plain text, shown as heuristic.

    Returns:
        The written files, the page first.

    Raises:
        RequestError: plotly or matplotlib is missing, or `folder` is a file.
        MergeError: a file cannot be written.

    Example:
        >>> import tempfile, torch, pymerge
        >>> base = {"w": torch.zeros(4)}
        >>> models = [{"w": torch.ones(4)}, {"w": torch.tensor([1.0, 2.0, -1.0, 0.0])}]
        >>> written = write(pymerge.analyze(base, models), tempfile.mkdtemp())
        >>> written[0].name
        'report.html'
    """
    require()
    from plotly.offline import get_plotlyjs

    from pymerge.analysis.page import page
    from pymerge.analysis.pictures import pictures

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"report: expected a folder, got a file: {folder}")
    made = {HTML: page(analysis, get_plotlyjs(), advice).encode()}
    made.update(pictures(analysis))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        replace_file(folder / name, content)
    return [folder / name for name in made]
