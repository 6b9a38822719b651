"""A time limit for each test that also covers native code that never returns, and environments
without pytest-timeout."""

from __future__ import annotations

import faulthandler
import os
from typing import Any

import pytest

# Extra time, as a share of the limit, for a test that does not react to the signal.
GRACE = 0.2
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept the limit of pyproject.toml without effect if pytest-timeout is missing."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds for each test; needs pytest-timeout")


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """End the process soon after the limit, because only Python code reacts to pytest-timeout."""
    stash = item.config.stash
    if _STDERR not in stash:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        assert capture is not None
        with capture.global_and_fixture_disabled():
            stash[_STDERR] = os.dup(2)
    faulthandler.dump_traceback_later(
        settings.timeout * (1 + GRACE), file=stash[_STDERR], exit=True
    )


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """Cancel the timer, because the test has ended."""
    faulthandler.cancel_dump_traceback_later()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _STDERR in config.stash:
        os.close(config.stash[_STDERR])
        del config.stash[_STDERR]
