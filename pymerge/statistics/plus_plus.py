"""RegMean++: RegMean layer by layer, on the activations of the layers merged before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pymerge.errors import RequestError, nearest
from pymerge.methods.statistics.functions import regmean_merge
from pymerge.methods.sums.functions import linear
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
from pymerge.statistics.convolutions import Convolutions, check_convolutions
from pymerge.statistics.files import ModelStatistics
from pymerge.statistics.gram import GramCollector, attention_mask, linear_layers

__all__ = ["regmean_plus_plus"]

Tensor = torch.Tensor
State = dict[str, Tensor]
_WHERE = "regmean_plus_plus"


class _Enough(Exception):
    """Raised when the layer of interest has run."""


def regmean_plus_plus(
    models: Sequence[nn.Module],
    loaders: Sequence[Iterable[Any]],
    *,
    layers: Sequence[str] | None = None,
    off_diagonal: float = 0.95,
    ridge: float = 0.0,
    weights: float | Sequence[float] | None = None,
    samples: int = 256,
    forward: Forward | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    convolutions: Convolutions = False,
) -> State:
    """Merge models by RegMean++: each layer's Gram matrices come from the layers merged before it.

    First everything outside the layers (embeddings, norms) is averaged. Then the layers are merged
    one by one, in the order in which they run. For each task, the merged model runs on the task's
    data, with this one layer taken from the task's own model; the inputs of its linear layers make
    the Gram matrices. The layer is merged by `regmean_merge` and put into the merged model.

    Args:
        models: modules of one architecture, one for each task; they are not changed.
        loaders: batches of each task, as in `collect_gram`; read once for each layer, so they must
            not be iterators.
        layers: names of the modules that are merged as units, such as the blocks of a transformer.
            By default the items of `nn.ModuleList`s that hold linear layers, and every linear layer
            outside of them (or convolution, if requested).
        off_diagonal: as in `regmean_merge`; default 0.95, the authors'.
        ridge, weights: as in `regmean_merge`.
        samples, forward, mask, convolutions: as in `collect_gram`. Convolutions that are not
            requested are averaged first, like everything outside the layers.

    The model runs only up to the end of a layer if the first batches call it once each.

    Returns: a state dict.

    Raises:
        RequestError: as in `collect_gram` and `regmean_merge`.

    Source: RegMean++ (github.com/nthehai01/RegMean-plusplus).

    >>> model = torch.nn.Linear(1, 1)
    >>> merged = regmean_plus_plus([model, model], [[torch.ones(2, 1)]] * 2)
    >>> torch.allclose(merged["weight"], model.weight)
    True
    """
    models, loaders = list(models), list(loaders)
    _check(models, loaders)
    check_count(samples, "samples", _WHERE)
    check_convolutions(convolutions, _WHERE)
    states = [{n: t.detach() for n, t in model.state_dict().items()} for model in models]
    merged = copy.deepcopy(models[0])
    current: State = linear(states, weights=weights)
    merged.load_state_dict(current)
    run = _Run(
        merged,
        loaders,
        samples,
        forward or default_forward,
        mask or attention_mask,
        convolutions,
    )
    with evaluating(merged), torch.no_grad():
        for layer in run.order(layers):
            own = _names_of(merged, layer, run.linear)
            parts = [{name: state[name] for name in own} for state in states]
            grams = [run.grams(k, layer, part) for k, part in enumerate(parts)]
            if not any(len(gram) for gram in grams):
                continue  # no linear layers except those shared with embeddings: averaged
            found = regmean_merge(
                parts, grams, weights=weights, off_diagonal=off_diagonal, ridge=ridge
            )
            current |= found
            merged.load_state_dict(found, strict=False)
    return current


def _check(models: Sequence[nn.Module], loaders: Sequence[Any]) -> None:
    if not models:
        raise RequestError(f"{_WHERE}: models: expected at least one")
    for k, model in enumerate(models):
        check_module(model, f"{_WHERE}: models[{k}]")
    if len(loaders) != len(models):
        raise RequestError(
            f"{_WHERE}: loaders: expected {len(models)}, one for each model; got {len(loaders)}"
        )
    for k, loader in enumerate(loaders):
        if isinstance(loader, Iterator):
            raise RequestError(
                f"{_WHERE}: loaders[{k}]: expected a DataLoader or a list, which can be gone "
                "through many times; got an iterator"
            )


def _names_of(model: nn.Module, layer: str, linear: Mapping[str, Any]) -> list[str]:
    """Return the names of a layer's tensors; a shared one belongs to its first name."""
    prefix = f"{layer}." if layer else ""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    names = [n for n in state if n.startswith(prefix) and state[n].is_floating_point()]
    own = [name for name in names if first[id(state[name])] == name]
    aliases = [n for n in state if first[id(state[n])] in own and n not in own]
    return [*own, *aliases]


@dataclass
class _Run:
    """Runs the merged model on the data of the tasks."""

    model: nn.Module
    loaders: Sequence[Iterable[Any]]
    samples: int
    forward: Forward
    mask: Callable[[Any], Tensor | None]
    convolutions: Convolutions
    linear: dict[str, list[nn.Module]] = field(default_factory=dict)
    once: set[str] = field(default_factory=set)

    def order(self, layers: Sequence[str] | None) -> list[str]:
        """Return the names of the layers in the order in which they run first."""
        self.linear = linear_layers(self.model, _WHERE, self.convolutions)
        modules = dict(self.model.named_modules())
        chosen = self._default() if layers is None else list(layers)
        unknown = [name for name in chosen if name not in modules]
        if unknown:
            raise RequestError(
                f"{_WHERE}: layers: the model has no module {unknown[0]!r}"
                f"{nearest(unknown[0], modules)}"
            )
        for one in chosen:
            inside = [other for other in chosen if other != one and _holds(one, other)]
            if inside:
                raise RequestError(f"{_WHERE}: layers: {inside[0]!r} is a part of {one!r}")
        calls: dict[str, int] = {}
        most: dict[str, int] = {}

        def counter(name: str) -> Callable[..., None]:
            def count(*_: Any) -> None:
                calls[name] = calls.get(name, 0) + 1

            return count

        handles = [modules[name].register_forward_pre_hook(counter(name)) for name in chosen]
        seen: list[str] = []
        try:
            for k, loader in enumerate(self.loaders):
                where = f"{_WHERE}: loaders[{k}]"
                for _, batch, _ in batches(loader, self.samples, device_of(self.model), where):
                    calls.clear()
                    self.forward(self.model, batch)
                    seen += [name for name in calls if name not in seen]
                    most = {n: max(most.get(n, 0), calls.get(n, 0)) for n in chosen}
                    break
        finally:
            for handle in handles:
                handle.remove()
        self.once = {name for name, count in most.items() if count == 1}
        idle = [name for name in chosen if name not in seen]
        if idle and layers is not None:
            raise RequestError(f"{_WHERE}: layers: {idle[0]!r} is not called by the model")
        return seen

    def _default(self) -> list[str]:
        """Return the items of module lists with linear layers, and the linear layers elsewhere."""
        names = {id(module): name for name, module in self.model.named_modules()}
        linear = [names[id(module)] for modules in self.linear.values() for module in modules]
        blocks: list[str] = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(_holds(b, name) for b in blocks):
                items = [f"{name}.{key}" if name else key for key in module._modules]
                blocks += [item for item in items if any(_holds(item, one) for one in linear)]
        rest = [one for one in linear if not any(_holds(block, one) for block in blocks)]
        return [*blocks, *rest]

    def grams(self, task: int, layer: str, own: State) -> ModelStatistics:
        """Return the Gram matrices of a layer with a task's weights, on that task's data."""
        module = dict(self.model.named_modules())[layer]
        mine = {id(inner) for inner in module.modules()}
        watched = {
            name: inside
            for name, modules in self.linear.items()
            if name in own and (inside := [m for m in modules if id(m) in mine])
        }
        where = f"{_WHERE}: loaders[{task}]"
        collector = GramCollector(self.model, watched, torch.float64, where, self.convolutions)
        call = _Call(self.model, self.forward)
        aliases = shared_names(self.model)
        given = {f"model.{n}": tensor for n, tensor in own.items() if n not in aliases}
        with collector.hooked(), self._until(module, layer in self.once):
            stream = batches(self.loaders[task], self.samples, device_of(self.model), where)
            for number, batch, size in stream:
                collector.begin(batch, size, self.mask(batch), number)
                with suppress(_Enough):
                    functional_call(call, given, (batch,))
        return collector.statistics(self.model, 0)

    @contextmanager
    def _until(self, module: nn.Module, once: bool) -> Iterator[None]:
        """Stop the model after a layer if it is called only once."""
        if not once:
            yield
            return

        def stop(*_: Any) -> None:
            raise _Enough

        handle = module.register_forward_hook(stop)
        try:
            yield
        finally:
            handle.remove()


class _Call(nn.Module):
    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.model, batch)


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or outer == "" or inner.startswith(f"{outer}.")
