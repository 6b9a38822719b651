"""Merging by gradient steps on the tasks' losses: the mean gradient, or matching gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pymerge.errors import RequestError, nearest
from pymerge.methods.sums.functions import linear
from pymerge.statistics.batches import (
    batches,
    check_count,
    check_module,
    device_of,
    evaluating,
    shared_names,
)

__all__ = ["gradient_merge"]

Tensor = torch.Tensor
State = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
_WHERE = "gradient_merge"


def gradient_merge(
    model: nn.Module,
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    loaders: Sequence[Iterable[Any]],
    losses: Loss | Sequence[Loss],
    *,
    objective: str = "average",
    steps: int = 100,
    lr: float = 1e-3,
    start: str = "first",
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    callback: Callable[[int, float], None] | None = None,
) -> State:
    """Merge two or more models by gradient steps on a batch of each task.

    average:   theta := theta - lr * mean_i grad L_i(theta)
    matching:  minimises sum_i |grad L_i(theta) - grad L_i(theta_i)|^2

    "matching" is the stated objective of gradient-based merging. "average" is what its well-known
    code does: it descends along the mean of the tasks' gradients at the merged model, from a copy
    of the first, and never computes the norm of a difference. They are different methods.

    Args:
        model: the architecture, which is not changed. Parameters that do not require gradients are
            not moved.
        models: K >= 2 models theta_i of this architecture: modules or state dicts.
        loaders: batches of each task, restarted when they end.
        losses: `loss(model, batch)`, a scalar; one for all tasks, or one for each.
        objective: "average" or "matching". The latter takes gradients of gradients.
        steps: number of steps, >= 1.
        lr: learning rate, above 0, of `torch.optim.SGD`.
        start: "first" (a copy of the first model) or "average" (of all).
        optimizer: makes another optimizer of the parameters, e.g. `lambda p: torch.optim.Adam(p,
            lr=1e-4)`; `lr` is then unused.
        callback: `callback(step, value)` after each step; value is the mean of the losses, or the
            objective of "matching", before the step.

    The model is in evaluation mode (no dropout; running statistics do not change).

    Returns: a state dict. Buffers are those of the start.

    Raises:
        RequestError: fewer than two models, models that do not fit the architecture, no examples, a
            loss that is not a scalar, NaN.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> states = [{"weight": torch.tensor([[0.0]])}, {"weight": torch.tensor([[2.0]])}]
    >>> data = [[torch.tensor([[1.0, 0.0]])], [torch.tensor([[1.0, 2.0]])]]
    >>> def loss(model, batch):
    ...     return (model(batch[:, :1]) - batch[:, 1:]).square().mean()
    >>> gradient_merge(model, states, data, loss, steps=50, lr=0.3)["weight"].round(decimals=3)
    tensor([[1.]])
    """
    check_module(model, f"{_WHERE}: model")
    states = _states(model, models)
    own_losses = _checked(states, loaders, losses, objective, steps, lr, start)
    state: State = (
        {name: tensor.clone() for name, tensor in states[0].items()}
        if start == "first"
        else dict(linear(states))
    )
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    if not free:
        raise RequestError(f"{_WHERE}: model: no parameter requires gradients")
    moving = {name: state[name].detach().clone().requires_grad_() for name in free}
    chosen = list(moving.values())
    stepper = torch.optim.SGD(chosen, lr=lr) if optimizer is None else optimizer(chosen)
    device = device_of(model)
    streams = [_endless(loader, device, k) for k, loader in enumerate(loaders)]
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            drawn = [next(stream) for stream in streams]
            tasks = [
                _Task(model, loss, batch, own, k, step)
                for k, (loss, batch, own) in enumerate(zip(own_losses, drawn, states, strict=True))
            ]
            value, gradients = (_average if objective == "average" else _matching)(
                tasks, state, moving
            )
            if not math.isfinite(value):
                raise RequestError(
                    f"{_WHERE}: step {step}: the objective is {value}; a smaller lr may help"
                )
            for parameter, gradient in zip(chosen, gradients, strict=True):
                parameter.grad = gradient
            stepper.step()
            if callback is not None:
                callback(step, value)
    state |= {name: tensor.detach() for name, tensor in moving.items()}
    return _tied(model, state)


class _Task:
    """The loss of one task on one batch, as a function of parameters."""

    def __init__(
        self, model: nn.Module, loss: Loss, batch: Any, own: State, number: int, step: int
    ) -> None:
        self.call = _Call(model, loss)
        self.aliases = shared_names(model)
        self.batch = batch
        self.own = own
        self.where = f"{_WHERE}: losses[{number}], step {step}"

    def loss(self, values: Mapping[str, Tensor]) -> Tensor:
        named = {f"model.{n}": t for n, t in values.items() if n not in self.aliases}
        found = functional_call(self.call, named, (self.batch,))
        if not isinstance(found, Tensor) or found.numel() != 1:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RequestError(f"{self.where}: expected a scalar, got {got}")
        if not bool(found.isfinite().all()):
            raise RequestError(f"{self.where}: the loss is {float(found.detach())}")
        return found.reshape(())


class _Call(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Any:
        return self._loss(self.model, batch)


def _gradients(loss: Tensor, wanted: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wanted]
    found = torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True)
    pairs = zip(wanted, found, strict=True)
    return [torch.zeros_like(tensor) if g is None else g for tensor, g in pairs]


def _average(tasks: Sequence[_Task], state: State, moving: State) -> tuple[float, list[Tensor]]:
    losses, total = [], [torch.zeros_like(tensor) for tensor in moving.values()]
    for task in tasks:  # one after the other: only one graph in memory
        loss = task.loss({**state, **moving})
        losses.append(float(loss.detach()))
        for own, gradient in zip(total, _gradients(loss, list(moving.values())), strict=True):
            own += gradient
    return math.fsum(losses) / len(tasks), [own / len(tasks) for own in total]


def _matching(tasks: Sequence[_Task], state: State, moving: State) -> tuple[float, list[Tensor]]:
    value, total = 0.0, [torch.zeros_like(tensor) for tensor in moving.values()]
    for task in tasks:
        own = {name: task.own[name].detach().clone().requires_grad_() for name in moving}
        wanted = _gradients(task.loss({**task.own, **own}), list(own.values()))
        here = _gradients(task.loss({**state, **moving}), list(moving.values()), create_graph=True)
        distance = torch.zeros((), dtype=here[0].dtype, device=here[0].device)
        for a, b in zip(here, wanted, strict=True):
            distance = distance + (a - b.detach()).square().sum()
        value += float(distance.detach())
        for into, gradient in zip(total, _gradients(distance, list(moving.values())), strict=True):
            into += gradient
    return value, total


def _states(model: nn.Module, models: Any) -> list[State]:
    """Return the models as state dicts that fit the architecture."""
    if isinstance(models, (nn.Module, Mapping)) or not isinstance(models, Sequence):
        raise RequestError(
            f"{_WHERE}: models: expected a list of modules or state dicts, got "
            f"{type(models).__name__}"
        )
    if len(models) < 2:
        raise RequestError(f"{_WHERE}: models: expected at least 2, got {len(models)}")
    wanted = model.state_dict()
    states, problems = [], []
    for k, given in enumerate(models):
        where = f"{_WHERE}: models[{k}]"
        state = given.state_dict() if isinstance(given, nn.Module) else given
        if not isinstance(state, Mapping):
            raise RequestError(
                f"{where}: expected a module or a state dict, got {type(given).__name__}"
            )
        problems += [f"{where}: lacks {name!r} of model" for name in wanted if name not in state]
        problems += [f"{where}: {name!r} is not in model" for name in state if name not in wanted]
        for name, tensor in wanted.items():
            if name in state and state[name].shape != tensor.shape:
                problems.append(
                    f"{where}[{name!r}] has shape {tuple(state[name].shape)}, expected "
                    f"{tuple(tensor.shape)} like model"
                )
        states.append({n: t.detach().to(wanted[n].device) for n, t in state.items() if n in wanted})
    if problems:
        raise RequestError(problems)
    return states


def _checked(
    states: Sequence[State],
    loaders: Any,
    losses: Any,
    objective: str,
    steps: int,
    lr: float,
    start: str,
) -> list[Loss]:
    """Check the other arguments, and return a loss for each task."""
    count, problems = len(states), []
    for name, value, known in (
        ("objective", objective, ("average", "matching")),
        ("start", start, ("first", "average")),
    ):
        if value not in known:
            problems.append(
                f"{_WHERE}: {name}: expected one of {', '.join(known)}; got {value!r}"
                f"{nearest(str(value), known)}"
            )
    if not isinstance(lr, (int, float)) or not math.isfinite(lr) or lr <= 0:
        problems.append(f"{_WHERE}: lr: expected a number above 0, got {lr!r}")
    if not isinstance(loaders, Sequence) or len(loaders) != count:
        got = len(loaders) if isinstance(loaders, Sequence) else type(loaders).__name__
        problems.append(f"{_WHERE}: loaders: expected {count}, one for each model; got {got}")
    own: list[Any] = [losses] * count if callable(losses) else list(losses)
    if len(own) != count or not all(callable(loss) for loss in own):
        problems.append(
            f"{_WHERE}: losses: expected a function, or {count} of them, one for each model"
        )
    if problems:
        raise RequestError(problems)
    check_count(steps, "steps", _WHERE)
    return own


def _endless(loader: Iterable[Any], device: torch.device, number: int) -> Iterator[Any]:
    """Iterate over a loader repeatedly."""
    most = 1 << 62
    while True:
        where = f"{_WHERE}: loaders[{number}]"
        for _, batch, _ in batches(loader, most, device, where):
            yield batch


def _tied(model: nn.Module, state: State) -> State:
    """Give a shared parameter's value to all of its names."""
    for alias, name in shared_names(model).items():
        if alias in state:
            state[alias] = state[name]
    return {name: state[name] for name in model.state_dict()}
