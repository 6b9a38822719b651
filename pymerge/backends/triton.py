"""The seat of the Triton backend: the kernels of `pymerge.triton_kernels`."""

from __future__ import annotations

NAME = "triton"
SUMMARY = "Triton kernels"


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return "this version of pymerge ships no Triton kernels"
