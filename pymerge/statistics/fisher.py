"""Diagonal Fisher information of a model on examples: squared gradients of log-probabilities."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pymerge.errors import RequestError, nearest
from pymerge.statistics.batches import (
    Forward,
    batches,
    check_count,
    check_module,
    default_forward,
    device_of,
    evaluating,
    labels_of,
    logits_of,
    mapped,
    shared_names,
    take,
)
from pymerge.statistics.files import ModelStatistics, make_record
from pymerge.statistics.sampling import draw_classes

__all__ = ["check_options", "collect_fisher"]

Tensor = torch.Tensor
Gradients = dict[str, Tensor]
_WHERE = "collect_fisher"
_VECTOR_BYTES = 256 << 20  # of examples' gradients that are computed at once
_IGNORED = -100  # a label that is not counted, as in torch's cross entropy


def collect_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    estimator: str = "exact",
    labels: str = "expected",
    samples: int = 256,
    logits: Forward | None = None,
    parameters: str | Sequence[str] | None = None,
    vectorize: bool | None = None,
    seed: int = 0,
) -> ModelStatistics:
    """Estimate the diagonal Fisher information of a model's parameters on examples.

    exact, expected:  mean over examples x of sum_y p(y|x) (d log p(y|x) / d theta)^2    the paper
    exact, sampled:   the same with one y ~ p(y|x); true: with the label of the example
    batch, expected:  sum over batches of (d sum_x sum_y sqrt(p) log p)^2, / examples    MergeLM
    batch, sampled:   mean over batches of (d mean_x log p(y|x))^2; or true   gradient matching

    The first is Matena and Raffel 2022, and their code. The third squares sums, so that examples
    and labels mix: it is not an estimate of the first, and depends on the batches (MergeLM,
    FusionBench). The last is what the authors of gradient matching (Daheim et al. 2024) call
    squared gradients.

    Args:
        model: is in evaluation mode meanwhile; its parameters and gradients do not change.
        loader: batches with the examples along the first dimension of every tensor: a tensor, a
            tuple (inputs..., labels), or a mapping of keyword arguments with "labels".
        estimator: "exact" or "batch".
        labels: "expected", "sampled" or "true" (also called "empirical").
        samples: the maximum number of examples, >= 1.
        logits: `logits(model, batch)` returns them, [examples, classes]; by default the output, its
            `.logits`, ["logits"] or first item. For sequences, [examples, positions, classes], an
            example's log-probability is the sum over positions, "expected" labels are refused, and
            true labels of -100 are not counted. A label applies to the logits at its own position,
            so shift the labels of a causal language model.
        parameters: names, or a regular expression to find in names; by default all that require
            gradients. Others get no Fisher information: they are averaged in a merge.
        vectorize: compute gradients of many examples at once with `torch.func.vmap` (True), one by
            one (False), or the former if the model allows it (None). The results agree within
            rounding.
        seed: of sampled labels.

    Returns: float32 tensors of the parameters' shapes, on the CPU.

    Raises:
        RequestError: no examples, no labels, logits without classes, NaN, unknown or frozen
            parameters.

    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> collect_fisher(model, [torch.tensor([[2.0]])])["weight"]
    tensor([[1.],
            [1.]])
    """
    check_module(model, f"{_WHERE}: model")
    check_options(
        estimator=estimator,
        labels=labels,
        samples=samples,
        parameters=parameters,
        vectorize=vectorize,
        seed=seed,
    )
    labels = "true" if labels == "empirical" else labels
    chosen = _chosen(model, parameters)
    call = _Call(model, logits or default_forward)
    how = _How(call, chosen, labels, torch.Generator().manual_seed(seed), vectorize)
    sums = {
        name: torch.zeros_like(parameter, dtype=_wider(parameter.dtype))
        for name, parameter in chosen.items()
    }
    examples = steps = 0
    # Unfused attention where vmap needs it, and on a GPU, where the gradients of the fused one are
    # not reproducible.
    parts = vectorize is not False or device_of(model).type != "cpu"
    attention = sdpa_kernel(SDPBackend.MATH) if parts else nullcontext()
    with evaluating(model), attention:
        for number, batch, size in batches(loader, samples, device_of(model), _WHERE):
            where = f"{_WHERE}: batch {number}"
            found = (how.of_batch if estimator == "batch" else how.of_examples)(batch, size, where)
            for name, squares in found.items():
                if not _finite(squares):
                    raise RequestError(
                        f"{where}: the squared gradient of {name!r} holds NaN or infinity; look "
                        "for NaN in the batch or in the model"
                    )
                sums[name] += squares
            examples, steps = examples + size, steps + 1
    # The mean over examples, or over batches if each gave the gradient of a mean.
    count = steps if estimator == "batch" and labels != "expected" else examples
    tensors = {name: (total / count).float().cpu() for name, total in sums.items()}
    aliases = {alias: name for alias, name in shared_names(model).items() if name in tensors}
    what = f"{estimator}, {labels} labels"
    return ModelStatistics(tensors, make_record("fisher", what, model, examples, aliases=aliases))


def check_options(
    *,
    estimator: Any = "exact",
    labels: Any = "expected",
    samples: Any = 256,
    parameters: Any = None,
    vectorize: Any = None,
    seed: Any = 0,
) -> None:
    """Check the arguments of `collect_fisher` that do not depend on the model.

    Raises:
        RequestError: names the first invalid argument.
    """
    check_count(samples, "samples", _WHERE)
    for name, value, known in (
        ("estimator", estimator, ("exact", "batch")),
        ("labels", "true" if labels == "empirical" else labels, ("expected", "sampled", "true")),
    ):
        if value not in known:
            raise RequestError(
                f"{_WHERE}: {name}: expected one of {', '.join(known)}; got {value!r}"
                f"{nearest(str(value), known)}"
            )
    if not isinstance(parameters, str | None):
        named = isinstance(parameters, Sequence) and all(isinstance(n, str) for n in parameters)
        if not named:
            raise RequestError(
                f"{_WHERE}: parameters: expected names, a regular expression or None, got "
                f"{parameters!r}"
            )
    if not isinstance(vectorize, bool | None):
        raise RequestError(f"{_WHERE}: vectorize: expected True, False or None, got {vectorize!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise RequestError(f"{_WHERE}: seed: expected an integer of 64 bits, got {seed!r}")


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chosen(model: nn.Module, parameters: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the requested parameters, by name."""
    every = dict(model.named_parameters())
    free = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
    if parameters is None:
        if not free:
            raise RequestError(f"{_WHERE}: model: no parameter requires gradients")
        return free
    if isinstance(parameters, str):
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise RequestError(
                f"{_WHERE}: parameters: not a regular expression: {parameters!r}: {error}"
            ) from None
        found = {name: parameter for name, parameter in free.items() if pattern.search(name)}
        if not found:
            raise RequestError(
                f"{_WHERE}: parameters: {parameters!r} is in the name of no parameter that "
                "requires gradients"
            )
        return found
    problems = []
    buffers, aliases = dict(model.named_buffers()), shared_names(model)
    names = [aliases.get(name, name) for name in parameters]
    for name in names:
        if name in every and name not in free:
            problems.append(f"{_WHERE}: parameters: {name!r} is frozen (requires_grad is False)")
        elif name not in every:
            what = "is a buffer, not a parameter" if name in buffers else "is not a parameter"
            problems.append(f"{_WHERE}: parameters: {name!r} {what}{nearest(name, every)}")
    if not names:
        problems.append(f"{_WHERE}: parameters: expected at least one name")
    if problems:
        raise RequestError(problems)
    return {name: free[name] for name in names}


class _Call(nn.Module):
    """Makes a module of (model, function), so that its parameters can be replaced by name."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.model, batch)


@dataclass
class _How:
    """How squared gradients are computed: for which parameters and labels."""

    call: _Call
    chosen: dict[str, nn.Parameter]
    labels: str
    generator: torch.Generator
    vectorize: bool | None

    def _logits(self, batch: Any, where: str) -> Tensor:
        return logits_of(self.call(batch), where)

    def _draw(self, batch: Any, logits: Tensor, where: str) -> Tensor:
        """Return the label of every example (and position): sampled, or the true one."""
        if self.labels == "true":
            found = labels_of(batch, where)
            if found.shape != logits.shape[:-1] or found.is_floating_point():
                raise RequestError(
                    f"{where}: labels: expected integers of shape {tuple(logits.shape[:-1])}, got "
                    f"{found.dtype} of shape {tuple(found.shape)}"
                )
            if bool(((found != _IGNORED) & ((found < 0) | (found >= logits.shape[-1]))).any()):
                raise RequestError(
                    f"{where}: labels: expected numbers of the {logits.shape[-1]} classes, got "
                    f"{int(found.min())} to {int(found.max())}"
                )
            return found.long()
        drawn = draw_classes(logits.detach().reshape(-1, logits.shape[-1]), self.generator)
        return drawn.reshape(logits.shape[:-1]).to(logits.device)

    # -------------------------------------------------------------- per example

    def of_examples(self, batch: Any, size: int, where: str) -> Gradients:
        """Return the sum over examples of the squared gradients of each."""
        with torch.no_grad():
            logits = self._logits(batch, where)
            _check_logits(logits, size, self.labels, where)
            drawn = None if self.labels == "expected" else self._draw(batch, logits, where)
        if self.vectorize is not False:
            try:
                return self._vectorized(batch, drawn, size, where)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                if self.vectorize or isinstance(error, RequestError):
                    raise
                # The model does something that vmap cannot. Continue one by one, which raises the
                # same error again if vmap was not the cause.
                self.vectorize = False
        return self._one_by_one(batch, drawn, size, where)

    def _vectorized(self, batch: Any, drawn: Tensor | None, size: int, where: str) -> Gradients:
        values = {f"model.{name}": p.detach() for name, p in self.chosen.items()}
        elements = sum(value.numel() for value in values.values())
        chunk = max(1, min(size, _VECTOR_BYTES // max(1, 12 * elements)))
        spec, leaves = _split(batch, size)

        def squares(own: tuple[Tensor, ...], label: Tensor | None) -> Gradients:
            def log_odds(given: Gradients) -> Tensor:
                output = functional_call(self.call, given, (_joined(spec, own),))
                return logits_of(output, where)[0].log_softmax(-1)

            found, pull, *_ = vjp(log_odds, values)
            return _weighted_squares(found, label, lambda seed: pull(seed)[0])

        total: Gradients = {}
        for start in range(0, size, chunk):
            part = tuple(leaf[start : start + chunk] for leaf in leaves)
            if drawn is None:
                each = vmap(lambda *own: squares(cast(Any, own), None))(*part)
            else:
                each = vmap(lambda label, *own: squares(cast(Any, own), label))(
                    drawn[start : start + chunk], *part
                )
            for name, found in each.items():
                own = found.sum(dim=0)
                total[name] = total[name] + own if name in total else own
        return {name.removeprefix("model."): found for name, found in total.items()}

    def _one_by_one(self, batch: Any, drawn: Tensor | None, size: int, where: str) -> Gradients:
        total = {
            name: torch.zeros_like(p, dtype=_wider(p.dtype)) for name, p in self.chosen.items()
        }
        wanted = list(self.chosen.values())
        for index in range(size):
            logits = self._logits(take(batch, index, index + 1), where)
            log_odds = logits[0].log_softmax(-1)

            def pull(seed: Tensor, log_odds: Tensor = log_odds) -> Gradients:
                found = torch.autograd.grad(
                    log_odds, wanted, seed, retain_graph=True, allow_unused=True
                )
                pairs = zip(self.chosen.items(), found, strict=True)
                return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}

            if drawn is None:
                for name, found in _weighted_squares(log_odds, None, pull).items():
                    total[name] += found
                continue
            for name, gradient in pull(_seed(log_odds, drawn[index])).items():
                wide = gradient.to(total[name].dtype)
                total[name].addcmul_(wide, wide)
        return total

    # -------------------------------------------------------------- per batch

    def of_batch(self, batch: Any, size: int, where: str) -> Gradients:
        """Return the squared gradient of one sum over the batch."""
        logits = self._logits(batch, where)
        if logits.dim() > 0 and logits.shape[-1] == 1 and self.labels != "sampled":
            # Regression, as in MergeLM: the squared gradient of the mean squared error.
            wanted = labels_of(batch, where).to(logits.dtype)
            value = nn.functional.mse_loss(logits.reshape(wanted.shape), wanted)
        else:
            _check_logits(logits, size, self.labels, where)
            log_odds = logits.log_softmax(-1)
            if self.labels == "expected":
                value = (log_odds.detach().exp().sqrt() * log_odds).sum()
            else:
                drawn = self._draw(batch, logits, where)
                value = nn.functional.nll_loss(
                    log_odds.flatten(0, -2), drawn.flatten(), ignore_index=_IGNORED
                )
        found = torch.autograd.grad(value, list(self.chosen.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p, dtype=_wider(p.dtype))
            if gradient is None
            else gradient.to(_wider(p.dtype)).square()
            for (name, p), gradient in zip(self.chosen.items(), found, strict=True)
        }


def _weighted_squares(
    log_odds: Tensor, label: Tensor | None, pull: Callable[[Tensor], Gradients]
) -> Gradients:
    """Return sum_y p(y) (d log p(y))^2 of one example, or the square for its label alone.

    Args:
        log_odds: [classes], or [positions, classes] with labels.
        pull: gradients of a weighted sum of `log_odds`.
    """
    if label is not None:
        seed = _seed(log_odds, label)
        return {name: g.to(_wider(g.dtype)).square() for name, g in pull(seed).items()}
    total: Gradients = {}
    odds = log_odds.detach().exp()
    for y in range(log_odds.shape[-1]):
        seed = nn.functional.one_hot(
            torch.tensor(y, device=log_odds.device), log_odds.shape[-1]
        ).to(log_odds.dtype)
        for name, gradient in pull(seed).items():
            own = odds[y] * gradient.to(_wider(gradient.dtype)).square()
            total[name] = total[name] + own if name in total else own
    return total


def _seed(log_odds: Tensor, label: Tensor) -> Tensor:
    """Return the weights that sum the log-probabilities of an example's labels: 1 at each."""
    # One value per position: a one-hot integer vector would need three times the logits' memory.
    counts = (label != _IGNORED).to(log_odds.dtype).unsqueeze(-1)
    return torch.zeros_like(log_odds).scatter(-1, label.clamp(min=0).unsqueeze(-1), counts)


def _finite(tensor: Tensor) -> bool:
    """Return whether there is no NaN or infinity, without a boolean tensor."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def _check_logits(logits: Tensor, size: int, labels: str, where: str) -> None:
    shape = tuple(logits.shape)
    if not logits.is_floating_point() or logits.dim() < 2 or shape[-1] < 2 or shape[0] != size:
        raise RequestError(
            f"{where}: the logits have shape {shape}; expected ({size}, classes) with at least 2 "
            "classes; give logits=callable(model, batch) (one output, a regression: "
            "estimator='batch' with true labels)"
        )
    if labels == "expected" and logits.dim() > 2:
        raise RequestError(
            f"{where}: the logits have shape {shape}: {math.prod(shape[1:-1])} positions an "
            "example; expected labels are for (examples, classes); take labels='sampled' or "
            "'true', or give logits=callable(model, batch)"
        )
    if not _finite(logits):
        raise RequestError(f"{where}: the logits hold NaN or infinity")


def _split(batch: Any, size: int) -> tuple[Any, list[Tensor]]:
    """Return a batch with its tensors of `size` rows replaced by numbers, and these tensors."""
    leaves: list[Tensor] = []

    def put(tensor: Tensor) -> _Slot:
        leaves.append(tensor)
        return _Slot(len(leaves) - 1)

    return mapped(batch, put, size), leaves


@dataclass(frozen=True)
class _Slot:
    number: int


def _joined(spec: Any, own: Sequence[Tensor]) -> Any:
    """Put the tensors of one example back, as a batch of one."""
    if isinstance(spec, _Slot):
        return own[spec.number].unsqueeze(0)
    if isinstance(spec, dict):
        return {key: _joined(item, own) for key, item in spec.items()}
    if isinstance(spec, tuple):
        return tuple(_joined(item, own) for item in spec)
    return spec
