"""The kinds of ops: one list, csrc/*.def, that all backends and the case table agree with."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pymerge import _C
from pymerge.ops.arguments import DIVERGENCE, DIVERGENCE_ROWS, sums_shape
from pymerge.ops.reference.pointwise import POINTWISE
from pymerge.ops.reference.sums import SUMS
from pymerge.ops.triton import sums as triton_sums
from tests.case import make_inputs
from tests.cases import CASES
from tests.conftest import BACKEND_IDS, NATIVE
from tests.kind_checks import kinds_of_ops, wrong_statuses, wrongly_named

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KINDS = kinds_of_ops(_C)


def rows_of_cases(op: str, name: str) -> set[str]:
    """Return the kinds of an op that the case table has rows of."""
    base, models = make_inputs(33, 2, [torch.float32])
    return {case.arguments(base, models)[name] for case in CASES if case.op == op}


def test_every_kind_is_defined_and_tested() -> None:
    """In torch, in Triton, and with a row in the case table."""
    assert set(KINDS["pointwise"]) == set(POINTWISE)
    assert set(KINDS["chunk_sums"]) == set(SUMS) == set(triton_sums.ROWS)
    assert rows_of_cases("pointwise_", "method") == set(KINDS["pointwise"])
    assert rows_of_cases("chunk_sums_", "kind") == set(KINDS["chunk_sums"])
    assert rows_of_cases("divergence_sums_", "kind") == set(KINDS["divergence_sums"])


@pytest.mark.parametrize("models", [1, 2, 3, 17])
def test_numbers_of_each_kind(models: int) -> None:
    """What Python says of a kind is what its line in the .def file says."""
    assert _C.pointwise_kinds(models) == {
        name: kind.reals + kind.for_each * models for name, kind in POINTWISE.items()
    }
    rows = {kind: found for kind, (found, _) in _C.sums_kinds(models).items()}
    assert rows == {kind: sums_shape(kind, models, 1, 0)[0] for kind in rows}
    assert _C.divergence_kinds() == DIVERGENCE
    assert max(first + count for first, count in DIVERGENCE.values()) == DIVERGENCE_ROWS


@pytest.mark.parametrize("identifier", BACKEND_IDS)
def test_an_unknown_kind_is_named(identifier: str, use_backend: Callable[[str], str]) -> None:
    backend = use_backend(identifier)
    assert wrongly_named(backend, KINDS) == []


@pytest.mark.parametrize("identifier", NATIVE)
def test_an_unknown_code_is_refused(identifier: str, use_backend: Callable[[str], str]) -> None:
    """By every entry of the kernel table, whoever fills it."""
    use_backend(identifier)
    assert wrong_statuses(_C.table(), KINDS) == []


def test_wrong_numbers_are_named() -> None:
    base, models = make_inputs(33, 3, [torch.float32])
    out, stats = torch.zeros(33), torch.zeros(3, dtype=torch.int64)
    partials, ops = torch.zeros(6, 1, dtype=torch.float64), torch.ops.pymerge
    with pytest.raises(ValueError, match="_: reals: expected 6 for 'ram' of 3 models; got 2"):
        ops.pointwise_(out, stats, base, models, "ram", [0.1, 0.2], backend="cpu")
    with pytest.raises(ValueError, match="_: reals: expected 0 for 'gram' of 3 models; got 1"):
        ops.chunk_sums_(partials, base, models, "gram", [1.0], backend="cpu")


def test_partials_of_another_shape_are_refused() -> None:
    base, models = make_inputs(2048, 3, [torch.float32])
    for shape in ((6, 1), (5, 2), (6, 3), (12,)):
        partials = torch.zeros(shape, dtype=torch.float64)
        said = re.escape(f"chunk_sums_: expected partials of shape (6, 2), got {shape}")
        with pytest.raises(ValueError, match=said):
            torch.ops.pymerge.chunk_sums_(partials, base, models, "gram", backend="cpu")


def test_dots_need_a_gradient_and_a_model() -> None:
    base, models = make_inputs(33, 1, [torch.float32])
    partials = torch.zeros(0, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="chunk_sums 'dots': the kernel refused its arguments"):
        torch.ops.pymerge.chunk_sums_(partials, base, models, "dots", backend="cpu")


def test_the_hash_covers_the_header_and_the_kinds(tmp_path: Path) -> None:
    """Whatever of them changes, a library built before is refused."""
    names = ["kernel_table.h", *(path.name for path in CSRC.glob("*.def"))]
    assert len(names) == 4
    for name in ("abi.py", *names):
        shutil.copy(CSRC / name, tmp_path)

    def found() -> str:
        return str(runpy.run_path(str(tmp_path / "abi.py"))["abi"]())

    before = found()
    assert before == f"0x{_C.abi}ULL"
    for name in names:
        path = tmp_path / name
        text = path.read_text()
        path.write_text(text + "\n")
        assert found() != before, name
        path.write_text(text)
