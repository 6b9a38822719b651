"""Fetches Debian packages and unpacks them into a cache, without installing anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.demo.cache import Cache
from benchmarks.demo.console import Log

__all__ = ["unpacked"]


def unpacked(package: str, cache: Cache, log: Log) -> Path:
    """Return a folder with the files of a Debian package, fetched the first time.

    Raises:
        SystemExit: there is no apt-get, or it cannot get the package; says what to do.
    """
    target = cache.path(f"debian-{package}", {"package": package})
    if target.is_dir():
        return target
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise SystemExit(
                f"this suite reads files of the Debian package {package} and unpacks it with"
                f" {program}, which is not here: run it on Debian or Ubuntu"
            )
    log.say(f"fetch the Debian package {package}")

    def make(folder: Path) -> None:
        _call(["apt-get", "download", "-qq", package], folder, package)
        found = sorted(folder.glob("*.deb"))
        if len(found) != 1:
            raise SystemExit(f"{package}: expected one file .deb, found {len(found)}")
        _call(["dpkg-deb", "-x", found[0].name, "."], folder, package)
        found[0].unlink()

    cache.build(target, make)
    return target


def _call(command: list[str], folder: Path, package: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} failed ({done.stderr.strip() or done.returncode}): the suite"
            f" needs the Debian package {package}. `apt-get update` may help."
        )
