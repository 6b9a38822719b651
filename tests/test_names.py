"""Packages that load their names on first access: each name is in the stub, once."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pymerge

ROOT = Path(pymerge.__file__).parent
PACKAGES = sorted(
    ".".join(stub.parent.relative_to(ROOT.parent).parts) for stub in ROOT.rglob("__init__.pyi")
)


def test_which_packages_have_a_stub() -> None:
    assert [
        "pymerge",
        *(f"pymerge.{name}" for name in ("adapters", "analysis", "search", "statistics")),
    ] == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package: str) -> None:
    loaded = importlib.import_module(package)
    assert loaded.__all__
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
        assert name in dir(loaded)
        assert vars(loaded)[name] is getattr(loaded, name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        loaded.nothing  # noqa: B018


def test_what_a_stub_alone_declares_is_no_name() -> None:
    assert "ModuleType" not in pymerge.__all__
    assert "_C" not in pymerge.__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_none_of_its_names(package: str) -> None:
    code = f"import sys, {package}; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_star_import_gives_all_names() -> None:
    found: dict[str, object] = {}
    exec("from pymerge import *", found)
    assert set(pymerge.__all__) <= set(found)
    assert callable(found["methods"])
