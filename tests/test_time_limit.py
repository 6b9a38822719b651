"""A test that does not end is a failure, whatever it waits in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import itertools, time

def test_in_python():
    while True:
        time.sleep(0.01)

def test_quick():
    pass

def test_in_native_code():
    sum(itertools.repeat(0))
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run these tests with the project's settings."""
    (folder / "test_limits.py").write_text(TESTS)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests" / "time_limit.py", folder / "conftest.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_limits.py"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_an_endless_test_fails(tmp_path: Path) -> None:
    pytest.importorskip("pytest_timeout")
    done = run(tmp_path, "-v", "--timeout=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "test_in_python FAILED" in done.stdout
    assert "test_quick PASSED" in done.stdout
    assert "in test_in_native_code" in done.stderr


def test_every_test_has_a_limit(request: pytest.FixtureRequest) -> None:
    assert float(request.config.getini("timeout")) > 0


def test_without_the_plugin(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "no:timeout", "-k", "quick")
    assert done.returncode == 0, done.stdout + done.stderr
