"""AdaMerging: merged layers and their gradients, of dense and of trimmed task vectors."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

import pymerge
from pymerge import AdaMerging, RequestError
from pymerge.adamerging import merged_layer, merged_packed_layer, pack_trimmed
from pymerge.ops.reference.packed import unpack
from tests.oracles import official_delta
from tests.test_adamerging import make


def layer(
    count: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    base = torch.randn(7, 5, dtype=dtype)
    return base, [base + torch.randn(7, 5, dtype=dtype) for _ in range(count)]


# ------------------------------------------------------------------ gradients of a layer


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0, -0.7, 2.5])
def test_gradient_of_a_layer(at: float) -> None:
    base, models = layer()
    lam = torch.full((3,), at, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: merged_layer(c, base, models), (lam,))


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0, -0.7])
def test_gradient_of_a_trimmed_layer(at: float) -> None:
    base, models = layer()
    packed = pack_trimmed({"w": base}, [{"w": m} for m in models], density=0.4)["w"]
    lam = torch.full((3,), at, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: merged_packed_layer(c, base, packed), (lam,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (5, 1031), (0, 3)])
def test_layer_and_gradient_are_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    base = torch.randn(shape).to(dtype)
    models = [(base.float() + 0.1 * torch.randn(shape)).to(dtype) for _ in range(4)]
    lam = torch.tensor([0.3, 0.0, 1.0, -0.5], requires_grad=True)
    merged = merged_layer(lam, base, models, dtype=torch.float32)
    expected = base.float()
    total = torch.zeros(shape)
    for weight, model in zip(lam.tolist(), models, strict=True):
        total = total + weight * (model.float() - base.float())
    assert torch.equal(merged, expected + total)
    gradient = torch.randn(shape)
    merged.backward(gradient)
    dots = [(gradient.double() * (m.double() - base.double())).sum() for m in models]
    assert lam.grad is not None
    torch.testing.assert_close(lam.grad.double(), torch.stack(dots), rtol=1e-6, atol=1e-6)


def test_second_derivative_is_refused() -> None:
    base, models = layer()
    lam = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    loss = merged_layer(lam, base, models).square().sum()
    (first,) = torch.autograd.grad(loss, lam, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), lam)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


@pytest.mark.parametrize("trimmed", [False, True])
def test_functional_transforms(trimmed: bool) -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, trimmed=trimmed)
    x = torch.randn(4, 8)
    table = ada.raw_coefficients.detach().clone()

    def outputs(table: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ada, {"raw_coefficients": table}, (x,)).square().sum(0)

    def loss(table: torch.Tensor) -> torch.Tensor:
        return outputs(table).sum()

    rows = []
    for one in outputs(ada.raw_coefficients):
        rows.append(torch.autograd.grad(one, ada.raw_coefficients, retain_graph=True)[0])
    expected = torch.stack(rows)
    torch.testing.assert_close(torch.func.jacrev(outputs)(table), expected)
    torch.testing.assert_close(torch.func.grad(loss)(table), expected.sum(0))
    pull: Any = torch.func.vjp(loss, table)[1]
    torch.testing.assert_close(pull(torch.tensor(1.0))[0], expected.sum(0))
    tables = torch.stack([table, 0.5 * table, 0 * table])
    each = torch.stack([loss(one) for one in tables])
    torch.testing.assert_close(torch.func.vmap(loss)(tables), each)
    each = torch.stack([torch.func.grad(loss)(one) for one in tables])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(tables), each)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda one: torch.func.grad(loss)(one).sum())(table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), None, None), r"coefficients: expected shape \(2,\), one .*; got \(3,\)"),
        ((torch.zeros(2, 1), None, None), r"coefficients: expected shape \(2,\), .*got \(2, 1\)"),
        (([0.1, 0.2], None, None), "coefficients: expected a floating-point tensor .*, got list"),
        ((torch.zeros(2).int(), None, None), "coefficients: expected a floating.*got torch.int32"),
        ((None, torch.zeros(3, 2).int(), None), "base: expected a floating-point .*torch.int32"),
        ((None, [1.0], None), "base: expected a floating-point tensor, got list"),
        ((None, None, []), r"models: expected a list of at least one model, got \[\]"),
        ((None, None, torch.zeros(2)), "models: expected a list of at least one model, got tensor"),
        (
            (None, None, [torch.zeros(2, 3)] * 2),
            r"models\[0\]: expected shape \(3, 2\) on cpu like",
        ),
        ((None, None, [torch.zeros(3, 2), 1]), r"models\[1\]: expected a floating-point .*got int"),
    ],
)
def test_layers_that_cannot_be_merged(arguments: tuple[Any, ...], message: str) -> None:
    good = (torch.zeros(2), torch.zeros(3, 2), [torch.zeros(3, 2)] * 2)
    given: list[Any] = [
        own if one is None else one for one, own in zip(arguments, good, strict=True)
    ]
    with pytest.raises(RequestError, match=message):
        merged_layer(*given)
    with pytest.raises(
        RequestError, match=r"dtype: expected a floating-point dtype, got torch\.int"
    ):
        merged_layer(*good, dtype=torch.int32)


def test_packed_layers_that_cannot_be_merged() -> None:
    base = {"x": torch.zeros(3, 40)}
    (packed,) = pack_trimmed(base, [{"x": torch.randn(3, 40)}], density=0.5)["x"]
    good = merged_packed_layer(torch.ones(1), base["x"], [packed])
    assert 60 <= int((good != 0).sum()) <= 61
    with pytest.raises(RequestError, match=r"packed\[0\]: expected a Packed, got torch.float32"):
        merged_packed_layer(torch.ones(1), base["x"], [base["x"]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        RequestError, match=r"packed\[0\]: expected a mask of 3 words and 2 offsets"
    ):
        merged_packed_layer(torch.ones(1), torch.zeros(90), [packed])
    with pytest.raises(RequestError, match="packed: expected a list of at least one model"):
        merged_packed_layer(torch.ones(1), base["x"], [])
    with pytest.raises(RequestError, match=r"coefficients: expected shape \(1,\)"):
        merged_packed_layer(torch.ones(2), base["x"], [packed])


def test_nothing_is_copied_for_the_backward_pass() -> None:
    base, models = layer()
    lam = torch.full((3,), 0.3, requires_grad=True, dtype=torch.float64)
    merged = merged_layer(lam, base, models)
    assert merged.grad_fn is not None
    saved = merged.grad_fn.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (base, *models)]


def test_gradient_of_each_layer_is_freed_as_it_goes() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models)
    alive: list[weakref.ref[Any]] = []
    most = 0

    def seen(gradient: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(one() is not None for one in alive))

    merged = ada.merged_parameters()
    for tensor in merged.values():
        tensor.register_hook(seen)
    ada.run(merged, (torch.randn(4, 8),), {}).sum().backward()
    assert len(alive) == 4
    # A layer's weight and bias may live at once, but not the gradients of the whole model.
    assert most <= 3


# ------------------------------------------------------------------ trimmed task vectors


def test_packed_is_what_ties_keeps() -> None:
    torch.manual_seed(3)
    base = {"a": torch.randn(33, 7), "b": torch.randn(5), "c": torch.randn(0, 2)}
    models = [{n: t + torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    packed = pack_trimmed(base, models, density=0.2)
    flat = torch.cat([base[n].flatten() for n in sorted(base)])
    deltas = torch.stack([torch.cat([m[n].flatten() for n in sorted(base)]) - flat for m in models])
    own = [
        torch.cat(
            [
                unpack(p.mask, p.values, base[n]).flatten()
                for n, p in ((n, packed[n][k]) for n in sorted(base))
            ]
        )
        for k in range(3)
    ]
    # Their sum is TIES with "sum", and each holds nothing but its own task vector.
    merged = official_delta(deltas, 0.2, "sum")
    torch.testing.assert_close(torch.stack(own).sum(0), merged, rtol=0, atol=1e-6)
    for delta, kept in zip(deltas, own, strict=True):
        assert torch.equal(kept[kept != 0], delta[kept != 0])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (1024,), (1025,), (33, 67), (3, 40000)])
def test_packed_gives_the_bits_of_dense_task_vectors(
    kind: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(5)
    base = torch.randn(shape).to(kind)
    models = [(base.double() + 0.2 * torch.randn(shape).double()).to(kind) for _ in range(3)]
    packed = pack_trimmed({"w": base}, [{"w": model} for model in models])["w"]
    wide = torch.float64 if kind == torch.float64 else torch.float32
    dense = [unpack(one.mask, one.values, base) for one in packed]
    assert all(one.offsets[-1] == one.values.numel() for one in packed)
    lam = torch.tensor([0.3, 1.0, -0.7], dtype=wide, requires_grad=True)
    merged = merged_packed_layer(lam, base, packed)
    total = torch.zeros(shape, dtype=wide)
    for weight, delta in zip(lam.tolist(), dense, strict=True):
        total = total + torch.tensor(weight, dtype=wide) * delta
    assert torch.equal(merged, (base.to(wide) + total).to(kind))
    gradient = torch.randn(shape).to(kind)
    merged.backward(gradient)
    dots = torch.stack([(gradient.double() * delta.double()).sum() for delta in dense])
    torch.testing.assert_close(lam.grad, dots.to(wide), rtol=1e-5, atol=1e-5)


def test_packed_keeps_the_dtype_of_the_checkpoint() -> None:
    torch.manual_seed(3)
    base = {"a": torch.randn(1000).bfloat16()}
    models = [{"a": (base["a"] + 0.05 * torch.randn(1000)).bfloat16()}]
    (packed,) = pack_trimmed(base, models, density=0.2)["a"]
    assert packed.values.dtype == torch.bfloat16
    assert packed.nbytes < 0.7 * models[0]["a"].nbytes


def test_plus_plus_starts_as_ties_with_sum() -> None:
    net, base, models = make()
    ada = AdaMerging(net, base, models, trimmed=True, init=1.0)
    names = list(ada.layers)
    expected = pymerge.ties_merge(
        {n: base[n] for n in names},
        [{n: m[n] for n in names} for m in models],
        semantics="adamerging",
    )
    state = ada.merged_state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in names)
