"""A merged layer as a differentiable function of its coefficients.

`merged_layer` computes `theta_0 + sum_k lambda_k (theta_k - theta_0)` in one pass over the
checkpoints (Yang et al. 2024, AdaMerging, eq. 3); its gradient is `d lambda_k = <g, tau_k>`, one
pass too. Task vectors are formed in registers: nothing is kept but references to the checkpoints.
Trimmed task vectors (AdaMerging++) come as bit masks and values, see `pymerge.adamerging.packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pymerge import _ops as _ops  # declares the in-place ops that these run on
from pymerge.backends import choose, takes_fewer_models
from pymerge.backends.arguments import sums_shape
from pymerge.backends.sizes import SUM_CHUNK

if TYPE_CHECKING:
    from pymerge.adamerging.packed import Packed

__all__ = ["merged_layer", "merged_packed_layer"]

Tensor = torch.Tensor
Result = TypeVar("Result")

# Functional twins of the in-place ops, so that torch.compile can trace them.
_LIBRARY = torch.library.Library("pymerge", "FRAGMENT")
_LIBRARY.define(
    "merged_layer(Tensor coefficients, Tensor base, Tensor[] models, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "merged_layer_dots(Tensor gradient, Tensor base, Tensor[] models) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "merged_packed_layer(Tensor coefficients, Tensor base, Tensor[] masks, Tensor[] values, "
    "Tensor[] offsets, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "merged_packed_layer_dots(Tensor gradient, Tensor base, Tensor[] masks, Tensor[] values, "
    "Tensor[] offsets) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1)


def _wide(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _counters(count: tuple[int, ...], dtype: torch.dtype, like: Tensor, backend: str) -> Tensor:
    device = "cpu" if backend == "reference" else like.device
    return torch.zeros(count, dtype=dtype, device=device)


def _run(op: str, device: torch.device, call: Callable[[str], Result]) -> Result:
    """Call an op of `pymerge._ops` with the fastest backend on the device that takes it."""
    refused: list[str] = []
    while True:
        backend = choose(op, None, device, refused)
        try:
            return call(backend)
        except ValueError as error:
            if not takes_fewer_models(error):
                raise
            refused.append(backend)


def _forward(
    coefficients: Tensor, base: Tensor, models: list[Tensor], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    weights, own, others = coefficients.detach().tolist(), _flat(base), [_flat(m) for m in models]
    wide = _wide(coefficients, base, *models)

    def call(backend: str) -> None:
        stats = _counters((3,), torch.int64, base, backend)
        torch.ops.pymerge.task_arithmetic_(
            out.view(-1), stats, own, others, weights, 1.0, 1.0, wide=wide, backend=backend
        )

    if base.numel() > 0:
        _run("task_arithmetic_", base.device, call)
    return out


def _dots(gradient: Tensor, base: Tensor, models: list[Tensor]) -> Tensor:
    if base.numel() == 0:
        return torch.zeros(len(models), dtype=torch.float64)
    tensors = [*(_flat(model) for model in models), _flat(gradient)]
    shape = sums_shape("dots", len(tensors), base.numel(), 0)
    own, wide = _flat(base), _wide(base, *tensors)

    def call(backend: str) -> Tensor:
        partials = _counters(shape, torch.float64, base, backend)
        torch.ops.pymerge.chunk_sums_(partials, own, tensors, "dots", wide=wide, backend=backend)
        return partials

    return _run("chunk_sums_", base.device, call).sum(dim=1).cpu()


def _forward_packed(
    coefficients: Tensor,
    base: Tensor,
    masks: list[Tensor],
    values: list[Tensor],
    offsets: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    weights, own = coefficients.detach().tolist(), _flat(base)
    wide = _wide(coefficients, base, *values)

    def call(backend: str) -> None:
        torch.ops.pymerge.packed_sum_(
            out.view(-1), own, masks, values, offsets, weights, wide=wide, backend=backend
        )

    if base.numel() > 0:
        _run("packed_sum_", base.device, call)
    return out


def _dots_packed(
    gradient: Tensor,
    base: Tensor,
    masks: list[Tensor],
    values: list[Tensor],
    offsets: list[Tensor],
) -> Tensor:
    if base.numel() == 0:
        return torch.zeros(len(masks), dtype=torch.float64)
    shape = len(masks), -(-base.numel() // SUM_CHUNK)
    arguments = _flat(gradient), _flat(base), masks, values, offsets
    wide = _wide(gradient, base, *values)

    def call(backend: str) -> Tensor:
        partials = _counters(shape, torch.float64, base, backend)
        torch.ops.pymerge.packed_dots_(partials, *arguments, wide=wide, backend=backend)
        return partials

    return _run("packed_dots_", base.device, call).sum(dim=1).cpu()


_LIBRARY.impl("merged_layer", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("merged_layer_dots", _dots, "CompositeExplicitAutograd")
_LIBRARY.impl("merged_packed_layer", _forward_packed, "CompositeExplicitAutograd")
_LIBRARY.impl("merged_packed_layer_dots", _dots_packed, "CompositeExplicitAutograd")


def _like_base(_coefficients: Any, base: Tensor, *rest: Any) -> Tensor:
    return torch.empty(base.shape, dtype=rest[-1], device=base.device)


def _one_a_model(_gradient: Any, _base: Any, models: list[Tensor], *_rest: Any) -> Tensor:
    return torch.empty(len(models), dtype=torch.float64)


torch.library.register_fake("pymerge::merged_layer", _like_base, lib=_LIBRARY)
torch.library.register_fake("pymerge::merged_packed_layer", _like_base, lib=_LIBRARY)
torch.library.register_fake("pymerge::merged_layer_dots", _one_a_model, lib=_LIBRARY)
torch.library.register_fake("pymerge::merged_packed_layer_dots", _one_a_model, lib=_LIBRARY)


def _refuse_second(gradient: Tensor) -> None:
    if torch.is_grad_enabled() and gradient.requires_grad:
        raise RuntimeError(
            "AdaMerging: the gradient of a merged layer cannot be differentiated again; call "
            "backward or torch.autograd.grad without create_graph=True"
        )


class _MergedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, dtype: torch.dtype, base: Tensor, *models: Tensor
    ) -> Tensor:
        ctx.save_for_backward(base, *models)  # references: nothing is copied
        ctx.like = (coefficients.dtype, coefficients.device)
        return torch.ops.pymerge.merged_layer(coefficients, base, list(models), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        _refuse_second(gradient)
        base, *models = ctx.saved_tensors
        dots = torch.ops.pymerge.merged_layer_dots(gradient, base, models)
        kind, device = ctx.like
        return (dots.to(device=device, dtype=kind), None, None, *[None] * len(models))


class _MergedPackedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, dtype: torch.dtype, base: Tensor, *packed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(base, *packed)
        ctx.like = (coefficients.dtype, coefficients.device)
        return torch.ops.pymerge.merged_packed_layer(coefficients, base, *_parts(packed), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        _refuse_second(gradient)
        base, *packed = ctx.saved_tensors
        dots = torch.ops.pymerge.merged_packed_layer_dots(gradient, base, *_parts(packed))
        kind, device = ctx.like
        return (dots.to(device=device, dtype=kind), None, None, *[None] * len(packed))


def _parts(packed: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return masks, values and offsets of all models, which come model by model."""
    return list(packed[0::3]), list(packed[1::3]), list(packed[2::3])


def merged_layer(
    coefficients: Tensor,
    base: Tensor,
    models: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `theta_0 + sum_k lambda_k (theta_k - theta_0)`, differentiable in lambda.

    AdaMerging (Yang et al. 2024, eq. 3), one layer. The backward pass gives
    `d lambda_k = <g, theta_k - theta_0>`, summed in doubles, and frees the gradient g of this layer
    before that of the layer before it is made. It cannot be differentiated again.

    Args:
        coefficients: lambda, [K], float32 or float64; the only argument that gets a gradient.
        base: theta_0, of any shape, of dtype float32, float16, bfloat16 or float64.
        models: theta_1 .. theta_K, of the shape of `base`, dtypes in any mixture.
        dtype: of the result; default that of `base`. Arithmetic is in float32 (float64 if an input
            is), rounded once.

    >>> lam = torch.tensor([0.5], requires_grad=True)
    >>> layer = merged_layer(lam, torch.zeros(2), [torch.tensor([1.0, 3.0])])
    >>> layer.sum().backward()
    >>> lam.grad
    tensor([4.])
    """
    result = _MergedLayer.apply(coefficients, dtype or base.dtype, base, *models)
    assert isinstance(result, Tensor)
    return result


def merged_packed_layer(
    coefficients: Tensor,
    base: Tensor,
    packed: Sequence[Packed],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the same of trimmed task vectors that are stored as bit masks and values.

    Args:
        packed: of each model; see `pymerge.adamerging.packed`.
    """
    tensors = [tensor for own in packed for tensor in own.tensors]
    result = _MergedPackedLayer.apply(coefficients, dtype or base.dtype, base, *tensors)
    assert isinstance(result, Tensor)
    return result
