"""A merged layer as a differentiable function of its coefficients.

`merged_layer` computes `theta_0 + sum_k lambda_k (theta_k - theta_0)` in one pass over the
checkpoints (Yang et al. 2024, AdaMerging, eq. 3); its gradient is `d lambda_k = <g, tau_k>`, one
pass too. Task vectors are formed in registers: nothing is kept but references to the checkpoints.
Trimmed task vectors (AdaMerging++) come as bit masks and values, see `pymerge.adamerging.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pymerge import _ops as _ops  # declares the in-place ops that these run on
from pymerge.backends import resolve
from pymerge.backends.arguments import sums_shape
from pymerge.backends.cpu_packed import packed_dots, packed_sum
from pymerge.backends.sizes import SUM_CHUNK

if TYPE_CHECKING:
    from pymerge.adamerging.packed import Packed

__all__ = ["merged_layer", "merged_packed_layer"]

Tensor = torch.Tensor

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


def _forward(
    coefficients: Tensor, base: Tensor, models: list[Tensor], dtype: torch.dtype
) -> Tensor:
    backend = resolve(None, base.device).NAME
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    if base.numel() > 0:
        torch.ops.pymerge.task_arithmetic_(
            out.view(-1),
            _counters((3,), torch.int64, base, backend),
            _flat(base),
            [_flat(model) for model in models],
            coefficients.detach().tolist(),
            1.0,
            1.0,
            wide=_wide(coefficients, base, *models),
            backend=backend,
        )
    return out


def _dots(gradient: Tensor, base: Tensor, models: list[Tensor]) -> Tensor:
    backend = resolve(None, base.device).NAME
    if base.numel() == 0:
        return torch.zeros(len(models), dtype=torch.float64)
    tensors = [*(_flat(model) for model in models), _flat(gradient)]
    shape = sums_shape("dots", len(tensors), base.numel(), 0)
    partials = _counters(shape, torch.float64, base, backend)
    torch.ops.pymerge.chunk_sums_(
        partials, _flat(base), tensors, "dots", wide=_wide(base, *tensors), backend=backend
    )
    return partials.sum(dim=1).cpu()


def unpack(mask: Tensor, values: Tensor, base: Tensor) -> Tensor:
    """Return a trimmed task vector as a dense one, in float32 (float64 if an input is).

    Args:
        mask: int32 words [ceil(n / 32)], bit i of word j says whether element 32 j + i is kept.
        values: the model's own numbers where the mask says so, [kept].
        base: of any shape, n elements.
    """
    wide = torch.float64 if _wide(values, base) else torch.float32
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    kept = ((mask.unsqueeze(-1) >> bits) & 1).view(-1)[: base.numel()].bool()
    flat = base.detach().reshape(-1)
    dense = torch.zeros(base.numel(), dtype=wide, device=base.device)
    dense[kept] = values.to(wide) - flat[kept].to(wide)
    return dense.view(base.shape)


def _forward_packed(
    coefficients: Tensor,
    base: Tensor,
    masks: list[Tensor],
    values: list[Tensor],
    offsets: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    wide = _wide(coefficients, base, *values)
    weights = coefficients.detach().tolist()
    if resolve(None, base.device).NAME == "cpu":
        out = torch.empty(base.shape, dtype=dtype, device=base.device)
        if base.numel() > 0:
            packed_sum(out.view(-1), _flat(base), masks, values, offsets, weights, wide)
        return out
    kind = torch.float64 if wide else torch.float32
    total = torch.zeros(base.shape, dtype=kind, device=base.device)
    for weight, mask, own in zip(weights, masks, values, strict=True):
        # One product and one sum an element, in the order of the models, as the kernels do it.
        total = total + unpack(mask, own, base).to(kind) * torch.tensor(weight, dtype=kind)
    return (base.detach().to(kind) + total).to(dtype)


def _dots_packed(
    gradient: Tensor,
    base: Tensor,
    masks: list[Tensor],
    values: list[Tensor],
    offsets: list[Tensor],
) -> Tensor:
    result = torch.zeros(len(masks), dtype=torch.float64)
    if base.numel() == 0:
        return result
    if resolve(None, base.device).NAME == "cpu":
        partials = torch.zeros(len(masks), -(-base.numel() // SUM_CHUNK), dtype=torch.float64)
        wide = _wide(gradient, base, *values)
        packed_dots(partials, _flat(gradient), _flat(base), masks, values, offsets, wide)
        return partials.sum(dim=1)
    for k, (mask, own) in enumerate(zip(masks, values, strict=True)):
        delta = unpack(mask, own, base).double()
        result[k] = torch.dot(delta.reshape(-1), gradient.detach().double().reshape(-1)).cpu()
    return result


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
