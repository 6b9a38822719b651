"""The hash by which a kernel library is recognised: setup.py and csrc/cuda/build.py define it."""

from __future__ import annotations

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parent


def abi() -> str:
    """Return the value of the macro PYMERGE_ABI: a hash of what all backends must agree on."""
    found = hashlib.sha256()
    for path in [CSRC / "kernel_table.h", *sorted(CSRC.glob("*.def"))]:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"0x{found.hexdigest()[:16]}ULL"
