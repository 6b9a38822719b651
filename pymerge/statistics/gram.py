"""Gram matrices of the inputs of linear layers and convolutions: the weights of RegMean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pymerge.errors import RequestError
from pymerge.statistics.batches import (
    Forward,
    batches,
    check_count,
    check_module,
    default_forward,
    device_of,
    evaluating,
    shared_names,
)
from pymerge.statistics.convolutions import (
    Convolutions,
    Patches,
    WatchConvolutions,
    check_convolutions,
    is_convolution,
)
from pymerge.statistics.files import ModelStatistics, make_record

__all__ = ["GramCollector", "check_options", "collect_gram", "is_conv1d", "linear_layers"]

Tensor = torch.Tensor
_WHERE = "collect_gram"


def collect_gram(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int = 256,
    forward: Forward | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    accumulate: torch.dtype = torch.float64,
    convolutions: Convolutions = False,
) -> ModelStatistics:
    """Collect X^T X / rows of the inputs X of every linear layer (Jin et al. 2023).

    A row is one input vector of a layer: an example, or a token of it. Layers are `nn.Linear` and
    transformers' Conv1D, whose weight is [in, out]. A layer that is called several times, or whose
    weight several layers share, gets the rows of all calls. One that no example reaches, such as an
    expert that is never chosen, has none; its matrix is 0, which has no influence on a merge. A
    weight that an embedding shares gets no matrix (it is averaged in a merge, as in the authors'
    code).

    A convolution is a linear layer on the patches under its kernel: these are its rows, with
    in_channels * prod(kernel) elements in the order of the weight, padding included. The paper
    covers linear layers only, so convolutions are optional.

    Args:
        model, loader, samples: as in `collect_fisher`; labels are not needed.
        forward: `forward(model, batch)` runs the model; by default as in `collect_fisher`.
        mask: `mask(batch)` returns a mask [examples, positions] that is 0 for padding; by default
            batch["attention_mask"] if it has that shape. Rows of padding are not counted (they are
            in the authors' code), except in inputs of another shape. `mask=lambda _: None` counts
            all. For convolutions it applies only to one-dimensional ones whose output has as many
            positions.
        accumulate: dtype of the sums over batches, float64 or float32.
        convolutions: True includes nn.Conv1d, Conv2d and Conv3d, "pointwise" only those with a
            kernel of size 1. Excluded are those with groups, and those that compute their kernel
            from the weight: they are averaged in a merge.

    Returns: symmetric float32 matrices [in, in] by the name of the weight, on the CPU; in is
        in_channels * prod(kernel) for a convolution.

    Raises:
        RequestError: no examples, no such layers, NaN or infinity in an input, an invalid
            `convolutions`.

    >>> collect_gram(torch.nn.Linear(2, 1), [torch.tensor([[1.0, 0.0], [1.0, 2.0]])])["weight"]
    tensor([[1., 1.],
            [1., 2.]])
    """
    check_module(model, f"{_WHERE}: model")
    check_options(samples=samples, accumulate=accumulate, convolutions=convolutions)
    layers = linear_layers(model, _WHERE, convolutions)
    collector = GramCollector(model, layers, accumulate, _WHERE, convolutions)
    examples = 0
    with evaluating(model), torch.no_grad(), collector.hooked():
        for number, batch, size in batches(loader, samples, device_of(model), _WHERE):
            collector.begin(batch, size, (mask or attention_mask)(batch), number)
            (forward or default_forward)(model, batch)
            examples += size
    found = collector.statistics(model, examples)
    if not found.record.tokens:
        what = "linear layer or convolution" if convolutions else "linear layer"
        raise RequestError(f"{_WHERE}: no example reached any {what}")
    return found


def check_options(
    *, samples: Any = 256, accumulate: Any = torch.float64, convolutions: Any = False
) -> None:
    """Check the arguments of `collect_gram` that do not depend on the model.

    Raises:
        RequestError: names the first invalid argument.
    """
    check_count(samples, "samples", _WHERE)
    if accumulate not in (torch.float64, torch.float32):
        raise RequestError(
            f"{_WHERE}: accumulate: expected torch.float64 or torch.float32, got {accumulate}"
        )
    check_convolutions(convolutions, _WHERE)


def attention_mask(batch: Any) -> Tensor | None:
    """Return batch["attention_mask"] if it is [examples, positions]."""
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.dim() == 2 else None


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D: a linear layer with a weight [in, out]."""
    kind = type(module)
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in kind.__mro__
    )


def linear_layers(
    model: nn.Module, where: str, convolutions: Convolutions = False
) -> dict[str, list[nn.Module]]:
    """Return the linear layers by the name of their weight, except those shared with embeddings.

    Args:
        convolutions: which convolutions to include; see `collect_gram`.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or is_conv1d(module)
        if not linear and not is_convolution(module, convolutions):
            continue
        if id(weight) in names and id(weight) not in embedded:
            found.setdefault(names[id(weight)], []).append(module)
    if not found:
        what, hint = "nn.Linear, Conv1D", ""
        if convolutions:
            what += ", nn.Conv1d, Conv2d or Conv3d without groups"
            what += " and with a kernel of size 1" if convolutions == "pointwise" else ""
        elif any(is_convolution(module, True) for module in model.modules()):
            hint = "; convolutions=True takes its convolutions"
        raise RequestError(f"{where}: model: has no linear layers ({what}){hint}")
    return found


@dataclass
class _Sum:
    total: Tensor  # [in, in]
    rows: int = 0


@dataclass
class GramCollector:
    """Accumulates X^T X of layers while a model runs.

    layers: linear layers and convolutions by the name of their weight. convolutions: which of them
    were requested.
    """

    model: nn.Module
    layers: Mapping[str, list[nn.Module]]
    accumulate: torch.dtype
    where: str
    convolutions: Convolutions = False
    sums: dict[str, _Sum] = field(default_factory=dict)
    _mask: Tensor | None = None
    _number: int = 0
    _kernels: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def begin(self, batch: Any, size: int, mask: Tensor | None, number: int) -> None:
        """Prepare for a run of the model on a batch."""
        if mask is not None and (mask.dim() != 2 or len(mask) != size):
            raise RequestError(
                f"{self.where}: batch {number}: mask: expected shape ({size}, positions), got "
                f"{tuple(mask.shape)}"
            )
        self._mask = None if mask is None else mask.bool()
        self._number = number

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the layers."""
        handles = []
        watch = WatchConvolutions(self._is_kernel, self._add_patches)
        try:
            with watch if self.convolutions else nullcontext():
                for name, modules in self.layers.items():
                    for module in modules:
                        hook = self._hook(name, is_convolution(module, True))
                        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                yield
        finally:
            self._kernels.clear()
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, convolution: bool) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if convolution:
                # At this point the module has the weight that it computes with.
                weight = module.weight
                assert isinstance(weight, Tensor)
                self._kernels[id(weight)] = weight, name
            else:
                self._add(name, inputs[0] if inputs else next(iter(named.values())))

        return watch

    def _is_kernel(self, weight: Tensor) -> bool:
        return id(weight) in self._kernels

    def _add_patches(self, weight: Tensor, patches: Patches) -> None:
        mask = self._mask
        counts = mask is not None and patches.positions == tuple(mask.shape)
        for rows in patches.rows(mask.to(weight.device) if mask is not None and counts else None):
            self._add_rows(self._kernels[id(weight)][1], rows)

    def _add(self, name: str, given: Tensor) -> None:
        given = given.detach()
        rows = given.reshape(-1, given.shape[-1])
        mask = self._mask
        if mask is not None and given.dim() == 3 and given.shape[:2] == mask.shape:
            rows = rows[mask.to(rows.device).reshape(-1)]
        self._add_rows(name, rows)

    def _add_rows(self, name: str, rows: Tensor) -> None:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        if name not in self.sums:
            size = rows.shape[1]
            empty = torch.zeros(size, size, dtype=self.accumulate, device=rows.device)
            self.sums[name] = _Sum(empty)
        own = self.sums[name]
        product = wide.T @ wide
        if not bool(product.isfinite().all()):
            raise RequestError(
                f"{self.where}: batch {self._number}: the inputs of the layer of {name!r} hold NaN "
                "or infinity"
            )
        own.total += product
        own.rows += len(rows)

    def grams(self) -> dict[str, Tensor]:
        """Return the means over rows, 0 for layers without any; float32, symmetric."""
        found = {}
        for name, modules in self.layers.items():
            own = self.sums.get(name)
            if own is not None and own.rows:
                mean = own.total / own.rows
                found[name] = ((mean + mean.T) / 2).float().cpu()
                continue
            weight = modules[0].weight
            assert isinstance(weight, Tensor)
            size = len(weight) if is_conv1d(modules[0]) else weight.shape[1:].numel()
            found[name] = torch.zeros(size, size)
        return found

    def statistics(self, model: nn.Module, examples: int) -> ModelStatistics:
        """Return the collected statistics."""
        found = self.grams()
        aliases = {alias: name for alias, name in shared_names(model).items() if name in found}
        what = f"mean of x x^T over rows, summed in {str(self.accumulate).removeprefix('torch.')}"
        if self.convolutions:
            kind = "pointwise convolutions" if self.convolutions == "pointwise" else "convolutions"
            what += f", {kind} too"
        record = make_record(
            "gram",
            what,
            model,
            examples,
            max((own.rows for own in self.sums.values()), default=0),
            frozenset(n for n, modules in self.layers.items() if is_conv1d(modules[0]))
            & set(found),
            aliases,
        )
        return ModelStatistics(found, record)
