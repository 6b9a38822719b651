"""Benchmarks of the CPU kernels: each row of the case table, data in memory, bf16, K = 4.

Each call is timed in turns with a loop that reads the same arrays, writes as long an output and
computes nothing. The timed result is compared with the reference before its time is reported.

    pytest benchmarks --benchmark-only -k ties
    pytest benchmarks --benchmark-only -k ties --benchmark-compare  # with the last that was saved
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.eager import EAGER
from benchmarks.kernel_checks import MODELS, make_arrays
from benchmarks.kernel_tables import GATHERING_CASES, MAIN_CASES, METHOD_CASES
from benchmarks.kernels import Kernel
from benchmarks.timed import Timed
from pymerge.ops.native import cpu
from tests.cases import CASES

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ISAS = cpu.supported_isas()
_DOCUMENTED = {*METHOD_CASES.values(), *GATHERING_CASES.values()}
# Elements per thread that justify a thread and stay in its core's cache.
_CACHED = 1 << 16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread the rows over instruction sets and threads, according to the options."""
    config, everything = metafunc.config, cpu.threads()
    top = max(config.getoption("threads") or [everything])
    if metafunc.function is test_kernel:
        rows = []
        for name in (case.name for case in CASES):
            main = name in MAIN_CASES
            isas = config.getoption("isa") or (ISAS if main else ISAS[-1:])
            counts = config.getoption("threads") or ({1, everything} if main else {everything})
            for threads in sorted(counts):
                for isa in isas:
                    documented = main or (
                        name in _DOCUMENTED and isa == isas[-1] and threads == max(counts)
                    )
                    marks = [pytest.mark.documents] if documented else []
                    label = f"{name}-{isa}-{threads}"
                    rows.append(pytest.param(name, isa, threads, id=label, marks=marks))
        metafunc.parametrize(("case", "isa", "threads"), rows)
    elif metafunc.function is test_plain_torch:
        for_documents = set(MAIN_CASES)
        rows = [
            pytest.param(
                name,
                top,
                id=f"{name}-{top}",
                marks=[pytest.mark.documents] if name in for_documents else [],
            )
            for name in EAGER
        ]
        metafunc.parametrize(("case", "threads"), rows)
    elif metafunc.function is test_vector_units:
        metafunc.parametrize("threads", [top] if top > 1 else [])


def test_kernel(
    case: str,
    isa: str,
    threads: int,
    kernel_of: Callable[[str], Kernel],
    timed: Timed,
    benchmark: BenchmarkFixture,
) -> None:
    """Time a kernel beside the streaming loop of the widest instruction set."""
    kernel = kernel_of(case)
    cpu.set_threads(threads)

    def stream() -> None:
        cpu.use_isa(ISAS[-1])
        kernel.stream(threads)

    def prepare() -> None:
        cpu.use_isa(isa)
        kernel.clear()

    def check() -> None:
        kernel.check(f"{case} on {isa}, {threads} threads")
        cpu.use_isa(ISAS[-1])
        kernel.check_stream(threads)

    turns = timed(kernel.call, beside=stream, prepare=prepare, check=check)
    if turns is not None:
        loop = statistics.median(turns.beside)
        benchmark.extra_info |= {
            "elements": kernel.elements,
            "models": MODELS,
            "dtype": "bfloat16",
            "bytes": kernel.nbytes,
            "GB/s": kernel.nbytes / statistics.median(turns.seconds) / 1e9,
            "loop_bytes": kernel.loop_bytes,
            "loop_seconds": list(turns.beside),
            "loop_GB/s": kernel.loop_bytes / loop / 1e9,
            "of_streaming": turns.ratio * kernel.nbytes / kernel.loop_bytes,
        }


def test_plain_torch(
    case: str,
    threads: int,
    kernel_of: Callable[[str], Kernel],
    timed: Timed,
    benchmark: BenchmarkFixture,
) -> None:
    """Time the same in eager operators, for comparison."""
    kernel, kept = kernel_of(case), list[torch.Tensor]()
    torch.set_num_threads(threads)

    def call() -> None:
        kept[:] = [kernel.plain_torch()]

    timed(call, rounds=3, check=lambda: kernel.check_plain_torch(kept[0]))
    benchmark.extra_info |= {"elements": kernel.elements}


@pytest.mark.documents
def test_vector_units(threads: int, timed: Timed, benchmark: BenchmarkFixture) -> None:
    """Measure the vector work of this many threads relative to that of one.

    A kernel that is limited by arithmetic, with data in the cache, runs on twice the elements for
    twice the threads. Cores that are two threads of one real core share its vector units: 1.0.
    """
    case = next(case for case in CASES if case.name == "pcb_vision_es")
    one = Kernel(case, make_arrays(_CACHED))
    all_of_them = Kernel(case, make_arrays(threads * _CACHED))
    cpu.use_isa(ISAS[-1])

    def alone() -> None:
        cpu.set_threads(1)
        one.call()

    def together() -> None:
        all_of_them.call()

    turns = timed(
        together,
        beside=alone,
        prepare=lambda: cpu.set_threads(threads),
        rounds=200,  # of a tenth of a millisecond
        check=lambda: all_of_them.check(f"{case.name}, {threads} threads"),
    )
    if turns is not None:
        benchmark.extra_info |= {"times_one_thread": threads * turns.ratio}
