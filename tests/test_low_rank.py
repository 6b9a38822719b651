"""Weights that adapters make: the kernel has the bits of its definition, everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pymerge.ops.array import as_array
from pymerge.ops.native import cpu
from pymerge.ops.native.low_rank import low_rank, rescale
from tests.adapter_files import delta
from tests.conftest import BACKEND_IDS

SHAPES = [
    (1, 1, 1),
    (3, 5, 2),
    (7, 256, 4),
    (33, 257, 16),
    (64, 1023, 8),
    (5, 4097, 3),
    (300, 64, 9),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_factors(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    return (
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )


@pytest.mark.parametrize("backend", BACKEND_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("based", [False, True])
def test_bits(
    backend: str, dtype: torch.dtype, based: bool, use_backend: Callable[[str], str]
) -> None:
    reference = use_backend(backend) == "reference"
    for rows, columns, rank in SHAPES:
        b, a = random_factors(rows, columns, rank)
        base = torch.randn(rows * columns + 1)[1:].to(dtype)  # misaligned
        out = torch.empty(rows * columns, dtype=dtype)
        low_rank(
            as_array(out),
            as_array(base) if based else None,
            b.numpy(),
            a.numpy(),
            0.3,
            reference=reference,
        )
        expected = delta(b, a, 0.3)
        if based:
            expected = base.view(rows, columns).float() + expected
        assert torch.equal(out.view(rows, columns), expected.to(dtype)), (rows, columns, rank)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    b, a = random_factors(700, 300, 5)
    out = torch.empty(700 * 300)
    before = cpu.threads()
    cpu.set_threads(threads)
    try:
        low_rank(as_array(out), None, b.numpy(), a.numpy(), 1.0)
    finally:
        cpu.set_threads(before)
    assert torch.equal(out.view(700, 300), delta(b, a, 1.0))


def test_doubles_are_computed_in_doubles() -> None:
    b, a = random_factors(4, 6, 2)
    base = torch.full((24,), 1 / 3, dtype=torch.float64)
    out = torch.empty(24, dtype=torch.float64)
    low_rank(as_array(out), as_array(base), b.numpy(), a.numpy(), 0.5)
    expected = base.view(4, 6) + 0.5 * (b.double() @ a.double())
    torch.testing.assert_close(out.view(4, 6), expected, rtol=1e-14, atol=1e-14)


def test_nan_and_infinity_stay() -> None:
    b, a = torch.ones(2, 1), torch.tensor([[float("nan"), float("inf"), 1.0]])
    for dtype in DTYPES:
        out = torch.empty(6, dtype=dtype)
        for reference in (False, True):
            low_rank(as_array(out), None, b.numpy(), a.numpy(), -1.0, reference=reference)
            assert out[0].isnan()
            assert out[1] == -float("inf")
            assert out[2] == -1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rescaling(dtype: torch.dtype) -> None:
    base = torch.randn(6, 5).to(dtype)
    out = torch.empty(30, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for factors in (torch.randn(6, 1), torch.randn(1, 5)):
        rescale(as_array(out), as_array(base.view(-1)), factors.numpy(), 5)
        assert torch.equal(out.view(6, 5), (base.to(wide) * factors).to(dtype))


def test_rounding_is_that_of_torch() -> None:
    from pymerge.ops.native.low_rank import store

    bits = np.arange(0, 2**32, 9973, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(len(values), dtype=dtype)
        store(as_array(out), values)
        expected = torch.from_numpy(values).to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(out[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 6 elements, got 5"):
        low_rank(as_array(torch.empty(5)), None, np.ones((2, 1), "f"), np.ones((1, 3), "f"), 1.0)
