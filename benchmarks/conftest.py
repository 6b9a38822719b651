"""Additions of `pytest benchmarks` to pytest-benchmark: options, fixtures, a table with GB/s."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.kernel_checks import SAMPLE, make_arrays
from benchmarks.kernel_tables import Measurements, all_kernels, tables
from benchmarks.kernels import Kernel, settings_kept
from benchmarks.tables import console, machine
from benchmarks.timed import Timed
from pymerge.byte_sizes import parse_size
from pymerge.errors import RequestError
from pymerge.ops.native import cpu
from tests.case import Inputs
from tests.cases import CASES

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

_QUICK_ELEMENTS = 1 << 18
_LONGEST = 1800  # seconds

_RECORDS = pytest.StashKey[list[dict[str, Any]]]()
_BEFORE = pytest.StashKey["Before"]()


@dataclass(frozen=True)
class Before:
    """A run to compare with: shares of streaming by name, and how its machine differs."""

    shares: dict[str, float]
    elsewhere: list[str]


def _elements(text: str) -> int:
    try:
        elements = parse_size(text.removesuffix("B") + "B", "elements")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if elements > SAMPLE and elements % SAMPLE:
        raise argparse.ArgumentTypeError(f"expected at most 1Mi, or a multiple of it, got {text}")
    return elements


def _isas(text: str) -> list[str]:
    isas = text.split(",")
    unknown = [isa for isa in isas if isa not in cpu.supported_isas()]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(cpu.supported_isas())}, got {', '.join(unknown)}"
        )
    return isas


def _threads(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(counts) != text.count(",") + 1 or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2, got {text}")
    return sorted(set(counts))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the kernel benchmarks."""
    group = parser.getgroup("kernels")
    group.addoption(
        "--elements", type=_elements, metavar="N", help="elements of each array (default: 64Mi)"
    )
    group.addoption(
        "--isa",
        type=_isas,
        metavar="ISAS",
        help="instruction sets of all rows, such as avx2,avx512 (default: all that run here for "
        "the main rows, the widest for the others)",
    )
    group.addoption(
        "--threads",
        type=_threads,
        metavar="NUMBERS",
        help="of all rows (default: 1 and all for the main rows, all for the others)",
    )
    group.addoption(
        "--quick",
        action="store_true",
        help="small arrays, few rounds: to see that all of it runs, not to measure",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start if nothing can be measured."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install -e '.[bench]'")
    reason = cpu.reason()
    if reason is not None:
        raise pytest.UsageError(f"backend cpu: {reason}")
    # A warning of pytest-benchmark now, before `pytest_sessionstart`, would be an internal error.
    warnings.filterwarnings("default", module="pytest_benchmark")
    config.addinivalue_line("markers", "documents: rows of the documents' tables (`make bench`)")
    config.stash[_RECORDS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give a benchmark more time than a test: the reference is slow over large arrays."""
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.timeout(_LONGEST))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to start measurements that would be compared with nothing."""
    asked = session.config.getoption("benchmark_compare")
    if asked and _BEFORE not in session.config.stash:
        which = "" if asked is True else f" named {asked}"
        storage = session.config.getoption("benchmark_storage")
        raise pytest.UsageError(f"--benchmark-compare: no saved run{which} in {storage}")


def elements_of(config: pytest.Config) -> int:
    """Return the number of elements of each array."""
    default = _QUICK_ELEMENTS if config.getoption("quick") else 64 << 20
    return config.getoption("elements") or default


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Describe the machine by constant properties: no clock rates, no names."""
    return machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Name the project, not the folder that contains it."""
    commit_info["project"] = "pymerge"


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: Mapping[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Keep the shares of a run to compare with, and refuse a run with arrays of another size."""
    before = config.stash.setdefault(_BEFORE, Before({}, []))
    own = elements_of(config)
    for record in compared_benchmark["benchmarks"]:
        more = record["extra_info"]
        if more.get("elements", own) != own:
            raise pytest.UsageError(
                f"--benchmark-compare: {record['name']} was measured with --elements "
                f"{more['elements']}, this run has {own}"
            )
        if "of_streaming" in more:
            before.shares[record["fullname"]] = more["of_streaming"]
    was = compared_benchmark["machine_info"]
    before.elsewhere.extend(
        f"{key} {was.get(key)}, here {machine_info.get(key)}"
        for key in sorted(was.keys() | machine_info.keys())
        if was.get(key) != machine_info.get(key)
    )
    # The table shows this; pytest-benchmark's own warning would be an error here.
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show columns that pytest-benchmark's table lacks: GB/s, and shares of streaming."""
    records = config.stash[_RECORDS]
    found = Measurements(records, cpu.supported_isas())
    if not found.kernels:
        return
    before = config.stash.get(_BEFORE, None)
    shown = [all_kernels(found, found.kernels, before and before.shares)]
    if before and before.elsewhere:
        shown[0].notes.append(f"Before was another machine: {'; '.join(before.elsewhere)}.")
    result = {"benchmarks": records, "machine_info": {"isa": cpu.supported_isas()}}
    shown += [table for name, table in tables(result).items() if name == "methods"]
    for table in shown:
        with console.capture() as captured:
            table.show()
        terminalreporter.ensure_newline()
        terminalreporter.write(captured.get())


@pytest.fixture(scope="session")
def arrays(pytestconfig: pytest.Config) -> Inputs:
    """A base and models, in bf16."""
    return make_arrays(elements_of(pytestconfig))


@pytest.fixture(scope="session")
def kernel_of(pytestconfig: pytest.Config, arrays: Inputs) -> Callable[[str], Kernel]:
    """Return a function that returns the kernel of a row; only the last one's arrays are kept."""
    cases = {case.name: case for case in CASES}
    slots = max(pytestconfig.getoption("threads") or [cpu.threads()])
    kept: dict[str, Kernel] = {}

    def kernel(name: str) -> Kernel:
        if name not in kept:
            kept.clear()
            kept[name] = Kernel(cases[name], arrays, slots)
        return kept[name]

    return kernel


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Restore threads and instruction set after each benchmark."""
    with settings_kept():
        yield


@pytest.fixture
def timed(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Iterator[Timed]:
    """Yield a timer that times a function in turns with another, and checks its result."""
    option = pytestconfig.option
    seconds = 0.0 if option.quick else float(option.benchmark_max_time)
    yield Timed(benchmark, seconds, option.benchmark_min_rounds)
    if benchmark.stats:
        pytestconfig.stash[_RECORDS].append(benchmark.stats.as_dict(include_data=False))
