"""How backends refuse kinds of ops that they do not know."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "kernel_table.h"
BAD_ARGUMENT, UNKNOWN_KIND = 1, 4  # of Status
# The byte offset of the kind in the struct of an op's arguments.
KIND_AT = {"pointwise": 72, "chunk_sums": 56, "divergence_sums": 56}
MODELS_AT, NUMEL_AT = 20, 24


def wrongly_named(backend: str, kinds: dict[str, list[str]], device: str = "cpu") -> list[str]:
    """Call each op that has kinds with one that does not exist; return the wrong messages.

    kinds: the kinds of each op.
    """
    out, stats = torch.zeros(8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    table = torch.zeros(5, 1, dtype=torch.float64, device=device)
    arguments = {
        "pointwise": (out, stats, out, [out], "foo", []),
        "chunk_sums": (table, out, [out], "foo"),
        "divergence_sums": (table, out, out, "foo"),
    }
    wrong = []
    for op, given in arguments.items():
        with pytest.raises(ValueError, match=backend) as caught:
            getattr(torch.ops.pymerge, f"{op}_")(*given, backend=backend)
        said = str(caught.value)
        begin, known = f"backend '{backend}': {op}_: expected one of ", kinds[op]
        listed = said.removeprefix(begin).removesuffix("; got 'foo'").split(", ")
        if not said.startswith(begin) or sorted(listed) != sorted(known):
            wrong.append(said)
    return wrong


def kinds_of_ops(native: Any) -> dict[str, list[str]]:
    """Return the kinds of each op that has kinds, from pymerge._C."""
    return {
        "pointwise": list(native.pointwise_kinds(1)),
        "chunk_sums": list(native.sums_kinds(1)),
        "divergence_sums": list(native.divergence_kinds()),
    }


def status_of_code(table: int, op: str, code: int) -> int:
    """Call an entry of a kernel table with the code of a kind and an invalid length."""
    # The entries of the table, in order, after its hash and its name.
    names = re.findall(r"^  (?:Status|const char\*) \(\*(\w+)\)\(", HEADER.read_text(), re.M)
    address = ctypes.c_void_p.from_address(table + 8 * (2 + names.index(op))).value
    assert address is not None
    arguments = bytearray(512)
    struct.pack_into("i", arguments, MODELS_AT, 1)
    struct.pack_into("q", arguments, NUMEL_AT, -1)
    struct.pack_into("i", arguments, KIND_AT[op], code)
    entry = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)(address)
    return int(entry(bytes(arguments)))


def wrong_statuses(table: int, kinds: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Return the codes of kinds for which a table gives the wrong status.

    kinds: the kinds of each op.
    """
    return [
        (op, code)
        for op, known in kinds.items()
        for code in (-1, *range(len(known) + 1), 2**31 - 1)
        if status_of_code(table, op, code)
        != (BAD_ARGUMENT if 0 <= code < len(known) else UNKNOWN_KIND)
    ]
