"""Measures programs in separate processes; defines the error for wrong results."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["ProcessRun", "WrongResult", "in_threads", "run_process"]

_POLL_SECONDS = 0.005


class WrongResult(Exception):
    """A timed result is wrong; none of its numbers may be shown."""


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Apply a function to items, with one thread for each core and torch single-threaded in each.

    This is for preparing and checking, not for timing: on busy cores, torch's own threads mostly
    wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class ProcessRun:
    """The measurements of a finished process.

    wall: seconds from its start to its end, including interpreter and imports.
    cpu: seconds of all its threads, user and system.
    peak_resident: largest resident set (with mapped files), bytes.
    peak_anonymous: largest RssAnon observed from outside, bytes; 0 if /proc has none.
    """

    wall: float
    cpu: float
    peak_resident: int
    peak_anonymous: int


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ValueError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def run_process(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> ProcessRun:
    """Run a program to its end and return its measurements.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    peak = 0
    ended = threading.Event()
    with tempfile.TemporaryFile("w+b") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )

        def watch() -> None:
            nonlocal peak
            while not ended.wait(_POLL_SECONDS):
                peak = max(peak, _anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            ended.set()
            watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            tail = log.read()[-3000:].decode(errors="replace")
            raise RuntimeError(
                f"{' '.join(arguments)} ended with exit code {process.returncode}:\n{tail}"
            )
    return ProcessRun(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak)
