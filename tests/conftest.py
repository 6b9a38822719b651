"""Shared fixtures. Fresh memory is filled with NaN, so that an output that is not written fails
loudly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
from pymerge.ops.backends import BACKENDS
from pymerge.ops.native import cpu
from tests.time_limit import (  # noqa: F401  hooks
    pytest_addoption,
    pytest_timeout_cancel_timer,
    pytest_timeout_set_timer,
    pytest_unconfigure,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell starts background jobs with SIGINT ignored; programs that tests start and interrupt would
# inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of pytest-xdist share the cores: torch's threads in different workers would wait for each
# other. The kernels' own threads are not limited.
if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)

REQUIRED = [name for name in os.environ.get("PYMERGE_REQUIRE", "cpu").split(",") if name]


def pytest_report_header() -> str:
    found = {name: backend.reason() or "available" for name, backend in BACKENDS.items()}
    return "pymerge backends: " + "; ".join(f"{name}: {state}" for name, state in found.items())


def pytest_configure() -> None:
    """Require the backends that PYMERGE_REQUIRE names; by default the native CPU kernels."""
    for name in REQUIRED:
        if name not in BACKENDS:
            raise pytest.UsageError(f"PYMERGE_REQUIRE: unknown backend {name!r}")
        reason = BACKENDS[name].reason()
        if reason is not None:
            raise pytest.UsageError(f"PYMERGE_REQUIRE: backend {name!r} is not available: {reason}")


COMPILE = (
    "test_cuda_build.py",
    "test_cuda_engine.py",
    "test_cuda_host.py",
    "test_triton_compile.py",
)
PEERS = "peers"
# Seconds for each test that compiles, installs or compares; pyproject.toml sets those of others.
LONG = 1800


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that compile for minutes or need other programs: `make test` leaves them out."""
    for item in items:
        if item.path.name in COMPILE:
            item.add_marker(pytest.mark.compile)
        if item.path.parent.name == PEERS:
            item.add_marker(pytest.mark.peers)
        if config.pluginmanager.hasplugin("timeout") and any(
            item.get_closest_marker(name) for name in ("compile", "packaging", "peers", "browser")
        ):
            item.add_marker(pytest.mark.timeout(LONG))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty and torch.empty_like return NaN (or a large integer)."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
            return tensor
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype is not torch.bool and not tensor.is_complex():
            tensor.fill_(77)
        return tensor

    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda *args, _original=original, **kwargs: poison(_original(*args, **kwargs)),
        )


# Every way to compute: the reference, and the CPU kernels of each supported instruction set.
NATIVE = [f"cpu-{isa}" for isa in cpu.supported_isas()]
BACKEND_IDS = ["reference", *NATIVE]


def check_same(found: torch.Tensor, expected: torch.Tensor, label: str) -> None:
    """Compare numbers and signs, of zeros too; NaN equals NaN. Names the first difference."""
    wrong = ~((found == expected) & (found.signbit() == expected.signbit()))
    wrong &= ~(found.isnan() & expected.isnan())
    first = int(wrong.nonzero()[0]) if bool(wrong.any()) else -1
    assert first < 0, (label, first, float(found[first]), float(expected[first]))


@pytest.fixture
def use_backend() -> Iterator[object]:
    """Return a function that selects the kernels for an id of BACKEND_IDS and returns the backend's
    name."""

    def choose(identifier: str) -> str:
        name, _, isa = identifier.partition("-")
        if isa:
            cpu.use_isa(isa)
        return name

    yield choose
    if cpu.reason() is None:
        cpu.use_isa(os.environ.get("PYMERGE_CPU_ISA") or "auto")
