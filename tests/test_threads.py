"""Threads and processes of the caller: merges side by side, forks, and a GIL that is let go."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import pymerge
from pymerge.ops.native import cpu
from pymerge.ops.threads import kernel_threads, torch_threads
from tests import models

no_waiting = models.no_waiting
pytestmark = pytest.mark.usefixtures("no_waiting")


def draw(numel: int, count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(numel, generator=generator)
    tuned = [base + torch.randn(numel, generator=generator) * 0.1 for _ in range(count)]
    return [tensor.bfloat16() for tensor in (base, *tuned)]


def test_merges_side_by_side() -> None:
    """Several Python threads merge at once, each its own models, by every method."""
    calls: list[Callable[[], torch.Tensor]] = []
    for seed in range(4):
        base, *tuned = draw(150_000 + seed, 2, seed)
        calls += [
            lambda t=tuned: pymerge.linear(t),
            lambda b=base, t=tuned: pymerge.task_arithmetic(b, t, scale=0.5),
            lambda b=base, t=tuned: pymerge.ties_merge(b, t),
            lambda b=base, t=tuned: pymerge.ties_merge(b, t, semantics="mergekit", density=0.4),
        ]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            merged = list(pool.map(lambda call: call(), calls))
            assert all(torch.equal(a, b) for a, b in zip(merged, expected, strict=True))


def test_checkpoints_side_by_side(tmp_path: Path) -> None:
    """Also with different numbers of threads, which are the caller's again afterwards."""
    base, tuned = models.llama(2)
    models.save_family(tmp_path, base, tuned)
    requests = [
        ("linear", {}),
        ("ties", {"density": 0.2, "semantics": "official"}),
        ("ties", {"density": 0.3}),
        ("task_arithmetic", {"scale": 0.5}),
    ]
    before = cpu.threads(), torch.get_num_threads()

    def merge(number: int, place: str) -> dict[str, bytes]:
        method, parameters = requests[number % len(requests)]
        pymerge.merge_checkpoints(
            models.config(tmp_path, method, 2, **parameters),
            tmp_path / f"{place}{number}",
            threads=1 + number % 3,
        )
        return models.weight_bytes(tmp_path / f"{place}{number}")

    expected = [merge(number, "alone") for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        merged = list(pool.map(lambda number: merge(number, "beside"), range(8)))
    assert merged == expected * 2
    assert (cpu.threads(), torch.get_num_threads()) == before


def test_a_failing_merge_beside_others() -> None:
    """The error goes to its own thread."""
    base, *tuned = draw(150_000, 2, 1)
    spoiled = [tuned[0], torch.where(torch.arange(150_000) == 7, torch.nan, tuned[1])]
    expected = pymerge.ties_merge(base, tuned)

    def attempt(number: int) -> torch.Tensor | None:
        try:
            return pymerge.ties_merge(base, spoiled if number % 2 else tuned)
        except pymerge.NonFiniteError:
            return None

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, range(12)))
    for number, result in enumerate(results):
        assert (result is None) == bool(number % 2)
        assert result is None or torch.equal(result, expected)


def in_fork(work: Callable[[], Any]) -> int:
    """Run something in a forked child; return its exit status, -SIGALRM if it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the handler of pytest-timeout
            signal.alarm(30)
            torch.set_num_threads(1)  # torch's own threads (OpenMP) do not survive a fork
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_after_use(tmp_path: Path) -> None:
    """Threads do not survive a fork; the child makes its own, the parent keeps its own."""
    base, *tuned = draw(200_000, 3, 2)
    cpu.set_threads(3)
    try:
        expected = pymerge.ties_merge(base, tuned)

        def again() -> bool:
            return torch.equal(pymerge.ties_merge(base, tuned), expected)

        assert in_fork(again) == 0
        assert again()
        assert in_fork(lambda: in_fork(again) == 0 and again()) == 0
        assert again()
        # while another thread of the parent is in the middle of kernels
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                pymerge.linear(tuned)

        worker = threading.Thread(target=busy)
        worker.start()
        try:
            assert [in_fork(again) for _ in range(4)] == [0] * 4
        finally:
            stop.set()
            worker.join()
    finally:
        cpu.set_threads(None)

    state, (first,) = models.llama(1, layers=1, buffers=False)
    models.save_family(tmp_path, state, [first])
    config = models.config(tmp_path, "task_arithmetic", 1)
    pymerge.merge_checkpoints(config, tmp_path / "parent")

    def merges() -> bool:
        pymerge.merge_checkpoints(config, tmp_path / "child")
        return True

    assert in_fork(merges) == 0
    assert models.weight_bytes(tmp_path / "child") == models.weight_bytes(tmp_path / "parent")


def test_the_gil_is_released() -> None:
    """While one thread is in a kernel for a while, another runs Python."""
    numel, count = 1 << 20, 17
    tuned = [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(count)]
    out, stats = torch.zeros(numel, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    repeated = tuned * 40  # one call of many models takes long
    weights = [1.0] * len(repeated)
    began, ended = threading.Event(), threading.Event()

    def kernel() -> None:
        began.set()
        torch.ops.pymerge.weighted_sum_(out, stats, repeated, weights, 1.0, backend="cpu")
        ended.set()

    cpu.set_threads(1)
    try:
        worker = threading.Thread(target=kernel)
        worker.start()
        began.wait()
        time.sleep(0.005)
        steps = 0
        longest, last = 0.0, time.perf_counter()
        started = last
        while not ended.is_set():
            steps += 1
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        whole = time.perf_counter() - started
        worker.join()
    finally:
        cpu.set_threads(None)
    # Held for the whole call, the GIL would let this thread make a step or two.
    assert steps > 100, (steps, whole)
    assert longest < 0.8 * whole, (longest, whole)


def test_numbers_of_threads_are_put_back() -> None:
    """Requests may be nested and may overlap; what was set before the first holds in the end."""
    cpu.set_threads(3)
    try:
        with kernel_threads(2):
            assert cpu.threads() == 2
            with kernel_threads(5):
                assert cpu.threads() == 5
            assert cpu.threads() == 2
        assert cpu.threads() == 3
        first, second = kernel_threads(2), kernel_threads(5)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert cpu.threads() == 5
        second.__exit__(None, None, None)
        assert cpu.threads() == 3
        with pytest.raises(KeyError), kernel_threads(4):
            raise KeyError
        assert cpu.threads() == 3
    finally:
        cpu.set_threads(None)
    assert cpu.set_threads(None) is None
    before = torch.get_num_threads()
    with torch_threads(before + 1) as was:
        assert (was, torch.get_num_threads()) == (before, before + 1)
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), torch_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_merge_keeps_the_number_of_threads(tmp_path: Path) -> None:
    state, (first,) = models.llama(1, layers=1, buffers=False)
    models.save_family(tmp_path, state, [first])
    config = models.config(tmp_path, "task_arithmetic", 1)
    cpu.set_threads(3)
    try:
        pymerge.merge_checkpoints(config, tmp_path / "out", threads=1)
        assert cpu.threads() == 3
        pymerge.analyze(state, [first], threads=1)
        assert cpu.threads() == 3
    finally:
        cpu.set_threads(None)
