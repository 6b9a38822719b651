"""A merged layer as a differentiable function of its coefficients.

`merged_layer` computes `theta_0 + sum_k lambda_k (theta_k - theta_0)` in one pass over the
checkpoints (Yang et al. 2024, AdaMerging, eq. 3). Its gradient, `d lambda_k = <g, tau_k>`, takes
one pass too. Task vectors are formed in registers: only references to the checkpoints are kept.
Trimmed task vectors (AdaMerging++) are bit masks and values; see `pymerge.adamerging.packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pymerge.adamerging.packed import Packed
from pymerge.dtypes import is_float
from pymerge.errors import RequestError
from pymerge.ops import contract as contract  # declares the in-place ops used here
from pymerge.ops.arguments import sums_shape
from pymerge.ops.backends import choose, takes_fewer_models
from pymerge.ops.constants import SUM_CHUNK

__all__ = ["merged_layer", "merged_packed_layer"]

Tensor = torch.Tensor
Result = TypeVar("Result")

# Functional versions of the in-place ops, so that torch.compile can trace them.
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
    """Call an op of `pymerge.ops.specs` on the fastest backend of the device that accepts the
    call."""
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


class _Dots(torch.autograd.Function):
    """The gradient of a merged layer with respect to its coefficients; not differentiable
    itself."""

    @staticmethod
    def forward(gradient: Tensor, base: Tensor, *models: Tensor) -> Tensor:
        return torch.ops.pymerge.merged_layer_dots(gradient, base, list(models))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "AdaMerging: the gradient of a merged layer cannot be differentiated again; call "
            "backward or torch.autograd.grad without create_graph=True"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Tensor) -> tuple[Tensor, int]:
        return _one_by_one(_Dots, info, in_dims, *arguments)


class _PackedDots(_Dots):
    @staticmethod
    def forward(gradient: Tensor, base: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.pymerge.merged_packed_layer_dots(gradient, base, *_parts(packed))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Tensor) -> tuple[Tensor, int]:
        return _one_by_one(_PackedDots, info, in_dims, *arguments)


class _MergedLayer(torch.autograd.Function):
    @staticmethod
    def forward(coefficients: Tensor, dtype: torch.dtype, base: Tensor, *models: Tensor) -> Tensor:
        return torch.ops.pymerge.merged_layer(coefficients, base, list(models), dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        coefficients, _, *tensors = inputs
        ctx.save_for_backward(*tensors)  # references, not copies
        ctx.like = (coefficients.dtype, coefficients.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        base, *models = ctx.saved_tensors
        if torch.compiler.is_compiling():  # it cannot trace a function inside a backward pass
            dots = torch.ops.pymerge.merged_layer_dots(*gradients, base, models)
        else:
            dots: Any = _Dots.apply(*gradients, base, *models)
        kind, device = ctx.like
        return (dots.to(device=device, dtype=kind), None, None, *[None] * len(models))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _one_by_one(_MergedLayer, info, in_dims, *arguments)


class _MergedPackedLayer(_MergedLayer):
    @staticmethod
    def forward(coefficients: Tensor, dtype: torch.dtype, base: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.pymerge.merged_packed_layer(coefficients, base, *_parts(packed), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        base, *packed = ctx.saved_tensors
        if torch.compiler.is_compiling():
            dots = torch.ops.pymerge.merged_packed_layer_dots(*gradients, base, *_parts(packed))
        else:
            dots: Any = _PackedDots.apply(*gradients, base, *packed)
        kind, device = ctx.like
        return (dots.to(device=device, dtype=kind), None, None, *[None] * len(packed))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _one_by_one(_MergedPackedLayer, info, in_dims, *arguments)


def _one_by_one(
    function: type[torch.autograd.Function], info: Any, in_dims: Any, *arguments: Any
) -> tuple[Tensor, int]:
    """Apply a function to each slice that torch.func.vmap maps over; stack results along axis 0."""
    results = [
        function.apply(
            *(
                one if dim is None else one.select(dim, number)
                for one, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for number in range(info.batch_size)
    ]
    return torch.stack([one for one in results if isinstance(one, Tensor)]), 0


def _parts(packed: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the masks, the values and the offsets of all models, which come model by model."""
    return list(packed[0::3]), list(packed[1::3]), list(packed[2::3])


def _check_layer(
    coefficients: Any, base: Any, models: Any, dtype: torch.dtype | None, label: str
) -> None:
    """Raise RequestError unless these tensors can be merged into a layer."""
    if not isinstance(base, Tensor) or not is_float(base.dtype):
        raise RequestError(f"base: expected a floating-point tensor, got {_kind(base)}")
    if dtype is not None and not is_float(dtype):
        raise RequestError(f"dtype: expected a floating-point dtype, got {dtype}")
    if not isinstance(models, Sequence) or not models:
        raise RequestError(f"{label}: expected a list of at least one model, got {models!r:.60}")
    for k, model in enumerate(models):
        if label == "packed":
            _check_packed(model, base, f"packed[{k}]")
        elif not isinstance(model, Tensor) or not is_float(model.dtype):
            raise RequestError(f"models[{k}]: expected a floating-point tensor, got {_kind(model)}")
        elif model.shape != base.shape or model.device != base.device:
            raise RequestError(
                f"models[{k}]: expected shape {tuple(base.shape)} on {base.device} like the base, "
                f"got {tuple(model.shape)} on {model.device}"
            )
    wanted = (len(models),)
    if not isinstance(coefficients, Tensor) or not coefficients.is_floating_point():
        raise RequestError(
            f"coefficients: expected a floating-point tensor of shape {wanted}, got "
            f"{_kind(coefficients)}"
        )
    if coefficients.shape != wanted:
        raise RequestError(
            f"coefficients: expected shape {wanted}, one for each model; got "
            f"{tuple(coefficients.shape)}"
        )


def _check_packed(packed: Any, base: Tensor, where: str) -> None:
    if not isinstance(packed, Packed):
        raise RequestError(f"{where}: expected a Packed, got {_kind(packed)}")
    words, chunks = -(-base.numel() // 32), -(-base.numel() // SUM_CHUNK)
    if packed.mask.numel() != words or packed.offsets.numel() != chunks + 1:
        raise RequestError(
            f"{where}: expected a mask of {words} words and {chunks + 1} offsets for the base's "
            f"shape {tuple(base.shape)}, got {packed.mask.numel()} and {packed.offsets.numel()}"
        )
    if packed.mask.device != base.device:
        raise RequestError(
            f"{where}: expected tensors on {base.device} like the base, got {packed.mask.device}"
        )


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def merged_layer(
    coefficients: Tensor,
    base: Tensor,
    models: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `theta_0 + sum_k lambda_k (theta_k - theta_0)`, differentiable in lambda.

    AdaMerging (Yang et al. 2024, eq. 3), for one layer. The backward pass computes
    `d lambda_k = <g, theta_k - theta_0>`, summed in doubles. It frees the gradient g of this layer
    before that of the preceding layer is computed, and cannot be differentiated again.

    Args:
        coefficients: lambda, [K], float32 or float64; the only argument that gets a gradient.
        base: theta_0, of any shape, of dtype float32, float16, bfloat16 or float64.
        models: theta_1 .. theta_K, of the shape of `base`, in any mixture of dtypes.
        dtype: dtype of the result; default: that of `base`. Arithmetic is in float32 (float64 if an
            input is), with one rounding.

    Raises:
        RequestError: shapes, dtypes or devices that do not fit, or no model.

    >>> lam = torch.tensor([0.5], requires_grad=True)
    >>> layer = merged_layer(lam, torch.zeros(2), [torch.tensor([1.0, 3.0])])
    >>> layer.sum().backward()
    >>> lam.grad
    tensor([4.])
    """
    _check_layer(coefficients, base, models, dtype, "models")
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
    """Return the same for trimmed task vectors that are stored as bit masks and values.

    Args:
        packed: the task vector of each model; see `pymerge.adamerging.packed`.

    Raises:
        RequestError: as in `merged_layer`.
    """
    _check_layer(coefficients, base, packed, dtype, "packed")
    tensors = [tensor for own in packed for tensor in own.tensors]
    result = _MergedPackedLayer.apply(coefficients, dtype or base.dtype, base, *tensors)
    assert isinstance(result, Tensor)
    return result
