"""The seat of the CUDA backend: compiled kernels over the same math headers as the CPU's."""

from __future__ import annotations

NAME = "cuda"
SUMMARY = "compiled CUDA kernels"


def reason() -> str | None:
    """Say why the backend cannot be used, or return None."""
    return "this version of pymerge ships no CUDA kernels"
