"""Trimmed task vectors as bit masks and values: the ops, and layers that are merged from them, on
the CPU and the reference. `tests/test_cuda_host.py` and `tests/test_triton.py` have the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pymerge.adamerging import Packed, merged_packed_layer, ops
from pymerge.ops.native import cpu
from tests.conftest import NATIVE
from tests.packed_checks import CHECKS, differing
from tests.packing import pack


def test_random_cases(use_backend: Callable[[str], str]) -> None:
    for identifier in NATIVE:
        assert differing(use_backend(identifier), range(60), 20_000, lambda t: t) == [], identifier


# torch's own tracer makes an instance of the function, which torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_layers(backend: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "choose", lambda *_: backend)
    assert CHECKS[check]("cpu")


def test_what_is_not_kept_adds_nothing() -> None:
    """Not even where the base, the gradient or a coefficient is infinite."""
    base = torch.zeros(40)
    base[7] = float("inf")
    kept = pack([torch.ones(40)], [0.0])
    packed = [Packed(kept["masks"][0], kept["values"][0], kept["offsets"][0])]
    at = torch.tensor([float("inf")], requires_grad=True)
    merged = merged_packed_layer(at, base, packed)
    assert torch.equal(merged, base)
    merged.backward(torch.full((40,), float("inf")))
    assert at.grad is not None
    assert at.grad.tolist() == [0.0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_unfit_tensors_are_refused(backend: str) -> None:
    kept = pack([torch.ones(2000)], [0.5])
    base, op = torch.zeros(2000), torch.ops.pymerge.packed_sum_
    how = {"weights": [1.0], "backend": backend}
    short = {**kept, "masks": [kept["masks"][0][:-1]]}
    with pytest.raises(ValueError, match=r"a mask of 62 words and 3 offsets do not fit 2000"):
        op(base.clone(), base, **short, **how)
    with pytest.raises(ValueError, match="masks, values and offsets of as many models"):
        op(base.clone(), base, **{**kept, "values": []}, **how)
    partials = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"partials of shape \(1, 2\), got \(1, 3\)"):
        torch.ops.pymerge.packed_dots_(partials, base, base, **kept, backend=backend)
    if backend == "cpu":
        with pytest.raises(ValueError, match="weights: expected 1 values"):
            op(base.clone(), base, **kept, weights=[], backend=backend)
        assert cpu.reason() is None
