"""The report in a real browser, from a file, without a network (`make test-browser`)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pymerge.analysis import report
from tests.analysis_samples import sample

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,1000",
    # no name has an address
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PLOTS = {
    "pairs",
    "models-lines",
    "models-map",
    "pairs-lines",
    "grid",
    "alike",
    "histogram",
    "trim",
    "spectra-models",
    "spectra-values",
    "spectra-pairs",
    "predicted",
}
LABELS = ("german", "<script>window.hacked = 1</script>", "<b>bold</b> & $x$", "code")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, NAMES)), None)
    program = shutil.which("chromedriver")
    if browser is None or program is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(program))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    small = sample(("one",), layers=1, types=("weight",), densities=(), spectra=False)
    made = {"usual": sample((*LABELS, "base"), layers=4), "small": small}
    return {
        name: report.write(analysis, folder / name, advice=("Try 0.3.",))[0].as_uri()
        for name, analysis in made.items()
    }


def opened(driver: Any, address: str, colours: str = "light") -> None:
    """Open a page and wait until it is drawn; no error may have been reported."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": colours}]},
    )
    driver.get(address)
    until = time.monotonic() + 60
    while driver.execute_script("return document.documentElement.dataset.drawn") != "true":
        assert time.monotonic() < until, driver.get_log("browser")
        time.sleep(0.05)
    assert driver.get_log("browser") == []


def drawn(driver: Any) -> dict[str, int]:
    """Return how many shapes each plot has."""
    return dict(
        driver.execute_script(
            "return [...document.querySelectorAll('.js-plotly-plot')].map(plot => [plot.id,"
            " plot.querySelectorAll('svg.main-svg .trace path, svg.main-svg .hm image').length])"
        )
    )


def column(driver: Any, table: str, number: int) -> list[str]:
    return driver.execute_script(
        "return [...document.getElementById(arguments[0]).tBodies[0].rows]"
        ".filter(row => !row.hidden).map(row => row.cells[arguments[1]].textContent)",
        table,
        number,
    )


def test_everything_is_drawn(driver: Any, pages: dict[str, str], tmp_path: Path) -> None:
    opened(driver, pages["usual"])
    found = drawn(driver)
    assert set(found) == PLOTS
    assert min(found.values()) > 0, found
    assert driver.execute_script("return window.hacked") is None
    described = driver.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.getAttribute('aria-label'))"
    )
    assert all(described)
    shown = driver.execute_script(
        "return [...document.querySelectorAll('#pairs .ytick text')].map(t => t.textContent)"
    )
    assert shown[2] == LABELS[2]  # and not in bold
    picture = tmp_path / "report.png"
    assert driver.save_screenshot(str(picture))
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.std() > 0.02
    assert pixels[-1, 0].mean() > 0.9  # a light page


def test_dark_colours(driver: Any, pages: dict[str, str], tmp_path: Path) -> None:
    opened(driver, pages["usual"], "dark")
    from matplotlib.image import imread

    def corner() -> float:
        picture = tmp_path / "page.png"
        driver.save_screenshot(str(picture))
        return float(imread(picture)[-1, 0, :3].mean())

    assert corner() < 0.2
    driver.find_element("id", "theme").click()
    assert corner() > 0.9
    assert driver.get_log("browser") == []


def test_tables_sort(driver: Any, pages: dict[str, str]) -> None:
    opened(driver, pages["usual"])
    heads = driver.find_elements("css selector", "#table-tensors thead button")
    names = [head.text for head in heads]
    number = names.index("norm share %")
    for expected in (True, False):
        driver.execute_script("arguments[0].click()", heads[number])
        values = [float(text) for text in column(driver, "table-tensors", number)]
        assert values == sorted(values, reverse=expected)
        assert len(set(values)) > 5
    driver.execute_script("arguments[0].click()", heads[0])
    texts = column(driver, "table-tensors", 0)
    assert texts == sorted(texts)
    # what is not defined comes last, in both directions
    cosine = driver.find_elements("css selector", "#table-pairs thead button")[2]
    for _ in range(2):
        driver.execute_script("arguments[0].click()", cosine)
        cells = column(driver, "table-pairs", 2)
        assert cells[-4:] == ["-"] * 4
        assert "-" not in cells[:-4]


def test_tables_are_searched(driver: Any, pages: dict[str, str]) -> None:
    opened(driver, pages["usual"])
    driver.find_element("css selector", "input[data-of=tensors]").send_keys("LAYERS.2.mlp")
    names = ["layers.2.mlp.up.weight", "layers.2.mlp.down.weight"]
    assert column(driver, "table-tensors", 0) == names
    assert driver.find_element("id", "found-tensors").text == "2 of 17 rows"


def test_selections_redraw(driver: Any, pages: dict[str, str]) -> None:
    opened(driver, pages["usual"])
    before = driver.execute_script("return document.getElementById('pairs').data[0].z[0][1]")
    driver.execute_script(
        "for (const list of document.querySelectorAll('select')) {"
        " list.selectedIndex = list.options.length - 1; list.dispatchEvent(new Event('change')); }"
    )
    after = driver.execute_script("return document.getElementById('pairs').data[0].z[0][1]")
    assert after != before
    assert min(drawn(driver).values()) > 0
    assert driver.get_log("browser") == []


def test_small_page(driver: Any, pages: dict[str, str]) -> None:
    opened(driver, pages["small"])
    assert set(drawn(driver)) == {"models-lines", "models-map", "grid", "histogram", "predicted"}


def test_nothing_is_requested(driver: Any, pages: dict[str, str]) -> None:
    driver.get_log("performance")
    opened(driver, pages["usual"])
    import json

    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert all(address.startswith(("file:", "data:", "blob:")) for address in asked), asked
    assert pages["usual"] in asked
