"""The report of an analysis: its page, read back as HTML, and its pictures."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymerge.analysis import report
from pymerge.analysis.interference import predict_interference
from pymerge.analysis.page import page
from pymerge.analysis.pictures import pictures
from pymerge.analysis.records import Analysis
from pymerge.errors import MergeError, RequestError
from tests.analysis_samples import sample

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "<b>&lt;$x^2$</b>\u2028",
    "../../etc/passwd\n",
)
VOID = {"meta", "input", "link", "img", "br", "hr"}


class Read(HTMLParser):
    """What a page has: elements, attributes, cells of tables, and its numbers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.data: Any = None
        self._table, self._cell, self._json = "", False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self._table = found["id"] or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        self._cell = tag in ("td", "th") or (tag == "button" and self._cell)
        self._json = found.get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("tbody", "thead", "table"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._json:
            self.data, self._json = json.loads(data), False
        elif self._cell:
            self.tables[self._table][-1][-1] += data.rstrip("\n") if data.strip() else ""

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def read(analysis: Analysis, advice: tuple[str, ...] = ()) -> Read:
    return Read(page(analysis, "/* plotly.js */", advice))


def test_page_loads_nothing() -> None:
    text = page(sample(), "", ())
    found = Read(text)
    assert {"src", "href", "srcset", "action", "style"} & {
        key for tag, attrs in found.elements if tag != "a" for key in attrs
    } == set()
    assert all((attrs["href"] or "").startswith("#") for attrs in found.named("a"))
    policy = [a["content"] for a in found.named("meta") if a.get("http-equiv")]
    assert [(text or "").startswith("default-src 'none'") for text in policy] == [True]
    assert not re.search(r"https?://|@import|url\(", text)


def test_links_and_labels_point_at_something() -> None:
    found = read(sample())
    ids = [attrs["id"] for _, attrs in found.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for a in found.named("a")}
    targets |= {a["aria-labelledby"] for _, a in found.elements if "aria-labelledby" in a}
    assert targets <= set(ids)
    plots = [a for a in found.named("div") if (a.get("class") or "").startswith("plot")]
    assert len(plots) == 11
    assert all(a["role"] == "img" for a in plots)


def test_names_stay_text() -> None:
    types = ('x"><script>alert(3)</script>', "</table><h1>")
    analysis = sample(HOSTILE, types=types, base=HOSTILE[0])
    found = read(analysis, advice=(HOSTILE[1],))
    assert [a for a in found.named("script") if a] == [{"type": "application/json", "id": "data"}]
    assert len(found.named("script")) == 4
    assert found.named("img") == []
    assert len(found.named("h1")) == 1
    assert found.data["models"] == list(HOSTILE)
    rows = found.tables["table-models"][1:]
    assert [row[0].strip() for row in rows] == [name.strip() for name in HOSTILE]
    assert any("alert(3)" in row[0] for row in found.tables["table-tensors"])


def test_tables_have_the_numbers() -> None:
    analysis = sample(("a", "b", "c"))
    tables = read(analysis).tables
    assert set(tables) == {
        f"table-{key}" for key in ("models", "pairs", "layers", "types", "tensors", "spectra")
    }
    pairs = tables["table-pairs"]
    assert [row[:2] for row in pairs[1:]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    column = pairs[0].index("cosine")
    assert float(pairs[1][column]) == pytest.approx(analysis.whole.cosine[0][1], rel=1e-3)
    assert pairs[2][column] == "-"  # c is the base: no direction
    first = tables["table-models"]
    others = first[1][first[0].index("cosine")]
    assert float(others) == pytest.approx(analysis.whole.cosine[0][1], abs=1e-3)  # and no 1
    overlap = pairs[0].index("overlap, top 20 %")
    expected = analysis.whole.trimmed[1].overlap[0][1]
    assert expected is not None
    assert float(pairs[1][overlap]) == pytest.approx(100 * expected, rel=1e-2)
    tensors = tables["table-tensors"]
    assert [row[0] for row in tensors[1:]] == [tensor.name for tensor in analysis.inventory]
    assert all(len(row) == len(tensors[0]) for row in tensors)


def test_plots_have_the_numbers() -> None:
    analysis = sample(("a", "b", "c", "d", "e"))
    data = read(analysis).data
    cosine = [s["key"] for s in data["pairs"]["statistics"]].index("cosine")
    assert data["pairs"]["places"][:2] == ["whole model", "layer 0"]
    values = data["pairs"]["values"][1][cosine]
    expected = [analysis.layers[0].cosine[i][j] for i in range(5) for j in range(i + 1, 5)]
    assert [x is None for x in values] == [x is None for x in expected]  # the last is the base
    defined = [(x, y) for x, y in zip(values, expected, strict=True) if y is not None]
    assert len(defined) == 6
    assert all(x == pytest.approx(y, rel=1e-3) for x, y in defined)
    share = data["ofModels"][0]["series"]
    assert len(share) == 5
    assert share[0][1] == pytest.approx(100 * analysis.layers[1].norm_share[0], rel=1e-3)
    grid = data["grid"]["statistics"][0]["values"]
    assert grid[0][0] == pytest.approx(
        100 * sum(x or 0 for x in analysis.tensors[0].norm_share) / 4, rel=1e-3
    )
    assert grid[0][-1] is None  # the embedding is in no layer
    assert len(data["alike"]["values"]) == len(analysis.layers)
    rows = [
        [group.cosine[i][j] for i in range(4) for j in range(i + 1, 4)] for group in analysis.layers
    ]
    alike = np.array(data["alike"]["values"])
    np.testing.assert_allclose(alike, np.corrcoef(np.array(rows, float)), rtol=1e-3, atol=1e-3)
    assert read(sample(("a", "b", "c"))).data["alike"] is None


@pytest.mark.parametrize("labels", [("one",), ("one", "two")])
@pytest.mark.parametrize("densities", [(), (0.2,)])
def test_little_to_show(labels: tuple[str, ...], densities: tuple[float, ...]) -> None:
    analysis = sample(labels, layers=0, types=(), densities=densities, spectra=False)
    found = read(analysis)
    assert ("table-pairs" in found.tables) == (len(labels) > 1)
    assert [len(row) for row in found.tables["table-models"]] == [
        len(found.tables["table-models"][0])
    ] * (1 + len(labels))
    assert found.data["grid"] is None
    if len(labels) == 1 and densities:
        assert set(pictures(analysis)) == {"depth.png", "magnitudes.png"}


def test_page_of_a_large_analysis_is_small() -> None:
    types = [f"module{n}.weight" for n in range(20)]
    analysis = sample([f"m{n}" for n in range(8)], layers=50, types=types, spectra=False)
    assert len(analysis.tensors) == 1001
    text = page(analysis, "", ())
    assert len(text) < 2_000_000
    assert len(Read(text).tables["table-tensors"]) == 1002


def test_too_many_pairs_are_left_out_and_said() -> None:
    labels = [f"m{n}" for n in range(40)]
    analysis = sample(labels, layers=60, types=(), densities=(0.2,), spectra=False)
    found = read(analysis)
    assert found.data["pairs"]["places"] == ["whole model"]
    assert ["Heat maps of" in note for note in found.data["notes"]] == [True]
    assert any(tag == "li" for tag, _ in found.elements)


def test_write(tmp_path: Path) -> None:
    analysis = sample()
    folder = tmp_path / "new" / "report"
    written = report.write(analysis, folder, advice=("lower lambda",))
    names = ["report.html", "pairs.png", "depth.png", "magnitudes.png", "spectra.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    text = written[0].read_text(encoding="utf-8")
    assert "lower lambda" in text
    assert 4e6 < len(text) < 6e6  # plotly.js is inside
    from matplotlib.image import imread

    for path in written[1:]:
        pixels = imread(BytesIO(path.read_bytes()), format="png")
        assert pixels.shape[0] > 200
        assert pixels.std() > 0.01
    mask = os.umask(0)
    os.umask(mask)
    assert written[0].stat().st_mode & 0o777 == 0o666 & ~mask


def test_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = sample(("one",), layers=1, spectra=False)
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MergeError, match=r"report\.html: cannot be written: No space"):
        report.write(analysis, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="expected a folder, got a file"):
        report.write(sample(("one",), layers=1), tmp_path / "file")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(RequestError, match=r"pip install 'pymerge-kernels\[analysis\]'"):
        report.write(sample(), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def with_dot(analysis: Analysis, dot: list[list[float]]) -> Analysis:
    whole = dataclasses.replace(analysis.whole, dot=tuple(map(tuple, dot)))
    return dataclasses.replace(analysis, whole=whole)


def test_predicted_loss() -> None:
    two = sample(("a", "b"), layers=1, spectra=False)
    # orthogonal, |a| = 1, |b| = 2: a goes 0.5 along itself, and astray by 0.5 * 2 = 1
    found = predict_interference(with_dot(two, [[1.0, 0.0], [0.0, 4.0]]), 0.5, across=0.1)
    assert found.along == (0.5, 0.5)
    assert found.across == pytest.approx((1.0, 1 / 16))
    assert found.lost == pytest.approx((0.25 + 0.1, 0.25 + 0.1 / 16))
    assert found.mean == pytest.approx(sum(x or 0.0 for x in found.lost) / 2)
    # equal task vectors, averaged: nothing is lost, by weights that differ neither
    same = with_dot(two, [[2.0, 2.0], [2.0, 2.0]])
    assert predict_interference(same, 0.5).lost == pytest.approx((0.0, 0.0))
    assert predict_interference(same, 1.0, weights=[0.75, 0.25]).lost == pytest.approx((0, 0))
    # a zero task vector has no gain to lose; the others are alone
    zero = predict_interference(with_dot(two, [[3.0, 0.0], [0.0, 0.0]]), 1.0)
    assert zero.lost == (0.0, None)
    # opposite ones cancel: all is lost
    assert predict_interference(
        with_dot(two, [[1.0, -1.0], [-1.0, 1.0]]), 1.0
    ).lost == pytest.approx((1.0, 1.0))


def test_predicted_loss_of_bad_numbers() -> None:
    analysis = sample(("a", "b"), layers=1, spectra=False)
    with pytest.raises(RequestError, match="weights: expected 2 numbers, got 3"):
        predict_interference(analysis, 0.5, weights=[1, 2, 3])
    for bad in ({"scale": math.nan}, {"scale": 1.0, "across": -0.1}):
        with pytest.raises(RequestError, match="expected finite numbers"):
            predict_interference(analysis, **bad)


@pytest.mark.parametrize("module", ["interference", "report"])
def test_examples_of_the_documentation(module: str) -> None:
    loaded = importlib.import_module(f"pymerge.analysis.{module}")
    assert doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE) == (0, 5)
