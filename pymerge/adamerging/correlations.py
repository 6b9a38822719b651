"""Tests the assumption behind AdaMerging: that low entropy means low loss on these tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pymerge.adamerging.fit import batch_inputs, moved
from pymerge.adamerging.losses import entropy_of_each, find_logits
from pymerge.errors import RequestError

if TYPE_CHECKING:
    from pymerge.adamerging.module import AdaMerging

__all__ = [
    "IGNORED",
    "TaskCorrelation",
    "batch_labels",
    "correlations",
    "next_tokens",
    "require_scipy",
]

Tensor = torch.Tensor

# The label of positions that are not counted, as in torch.nn.functional.cross_entropy.
IGNORED = -100


@dataclass(frozen=True)
class TaskCorrelation:
    """The entropy and the loss of each example of a task.

    Attributes:
        spearman, pearson: correlation in [-1, 1]; NaN if all entropies or all losses are equal.
        entropies, losses: float32 [examples], in nats. The loss is the cross-entropy with the
            labels.
        accuracy: share of correct predictions.
    """

    task: str
    spearman: float
    pearson: float
    accuracy: float
    entropies: Tensor
    losses: Tensor

    @property
    def examples(self) -> int:
        return len(self.entropies)


def _first(result: Any) -> float:
    """Return the correlation from a scipy result, which also holds a p-value."""
    return float(result[0])


def batch_labels(batch: Any) -> Tensor:
    """Return the labels of a batch: the second item of a tuple, or "labels" of a dictionary."""
    if isinstance(batch, Mapping):
        for name in ("labels", "label", "targets", "target"):
            if name in batch:
                return batch[name]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise RequestError(
        "labels: expected batches (inputs, labels) or dictionaries with 'labels', got "
        f"{type(batch).__name__}; give labels=, a function of a batch"
    )


def next_tokens(batch: Any) -> Tensor:
    """Return the targets of a causal language model: the next token at each position.

    For `correlations(labels=next_tokens)`. The last position and positions before padding have no
    target.

    Args:
        batch: token numbers [batch, length]: a tensor, the first item of a tuple, or "input_ids" of
            a dictionary, whose "attention_mask" marks padding.

    Returns:
        Token numbers [batch, length], int64; IGNORED if there is no next token.

    >>> next_tokens(torch.tensor([[5, 6, 7]]))
    tensor([[   6,    7, -100]])
    """
    mask = None
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        batch = batch.get("input_ids")
    if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point():
        got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise RequestError(f"labels: expected token numbers of shape [batch, length], got {got}")
    following = torch.full_like(batch, IGNORED, dtype=torch.int64)
    following[:, :-1] = batch[:, 1:]
    if isinstance(mask, Tensor):
        following[:, :-1].masked_fill_(mask[:, 1:].to(batch.device) == 0, IGNORED)
    return following


def require_scipy() -> Any:
    """Return scipy.stats; raise RequestError if scipy is missing."""
    try:
        from scipy import stats
    except ImportError as error:
        raise RequestError(
            f"correlations: needs scipy ({error}); pip install 'pymerge-kernels[plot]'"
        ) from None
    return stats


@torch.no_grad()
def correlations(
    ada: AdaMerging,
    loaders: Sequence[Iterable[Any]],
    *,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = batch_inputs,
    labels: Callable[[Any], Tensor] = batch_labels,
    names: Sequence[str] | None = None,
) -> list[TaskCorrelation]:
    """Return, for each task, the Spearman and Pearson correlations of entropy and loss.

    Yang et al. 2024, section 3.2.2 and figure 4, report an average Spearman correlation of 0.87
    over their eight tasks. Where it is low, minimising the entropy need not help. Needs scipy.

    Args:
        loaders: for each task, batches with labels.
        inputs: returns the inputs of the model for a batch, and a mask; see `fit.batch_inputs`.
            Positions that the mask marks as padding are left out.
        labels: returns the labels of a batch; see `batch_labels`. They are class numbers, one for
            each prediction, of the logits' shape without its last dimension: [batch] or [batch,
            length]. Predictions with the label -100 (IGNORED) are left out. For a causal language
            model, use `next_tokens`.
        names: names of the tasks; default: those of the models.

    Raises:
        RequestError: no batches, or fewer than two examples; labels that are not class numbers;
            logits that are not finite.
    """
    stats = require_scipy()
    if not isinstance(loaders, Sequence) or isinstance(loaders, str):
        raise RequestError(f"loaders: expected a list, one loader per task; got {loaders!r:.60}")
    if ada.heads is not None and len(loaders) > len(ada.heads):
        raise RequestError(
            f"loaders: expected at most {len(ada.heads)}, one for each head; got {len(loaders)}"
        )
    merged = {name: tensor.detach() for name, tensor in ada.merged_parameters().items()}
    named = list(names or ada.names)
    device = ada.raw_coefficients.device
    found: list[TaskCorrelation] = []
    for task, loader in enumerate(loaders):
        entropies: list[Tensor] = []
        losses: list[Tensor] = []
        right = 0
        for batch in loader:
            batch = moved(batch, device)
            args, kwargs, mask = inputs(batch)
            where = f"loaders[{task}]"
            logits = find_logits(ada.run(merged, args, kwargs, task), f"{where}: logits")
            logits, wanted = _predictions(logits.float(), labels(batch), mask, where)
            entropies.append(entropy_of_each(logits).cpu())
            losses.append(nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
            right += int((logits.argmax(-1) == wanted).sum())
        own = torch.cat(entropies) if entropies else torch.empty(0)
        if len(own) < 2:
            raise RequestError(f"loaders[{task}]: expected at least two examples, got {len(own)}")
        loss = torch.cat(losses)
        if not bool(torch.isfinite(own).all() and torch.isfinite(loss).all()):
            raise RequestError(
                f"loaders[{task}]: expected finite entropies and losses, got NaN or infinity"
            )
        constant = bool((own == own[0]).all() or (loss == loss[0]).all())
        pair = own.double().numpy(), loss.double().numpy()
        spearman = float("nan") if constant else _first(stats.spearmanr(*pair))
        pearson = float("nan") if constant else _first(stats.pearsonr(*pair))
        name = named[task] if task < len(named) else f"task {task}"
        found.append(TaskCorrelation(name, spearman, pearson, right / len(own), own, loss))
    return found


def _predictions(
    logits: Tensor, labels: Any, mask: Tensor | None, where: str
) -> tuple[Tensor, Tensor]:
    """Return the logits [n, classes] and labels [n] of the predictions that are counted."""
    shape, classes = tuple(logits.shape[:-1]), logits.shape[-1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise RequestError(f"{where}: labels: expected integers of shape {shape}, got {got}")
    if tuple(labels.shape) != shape:
        raise RequestError(
            f"{where}: labels: expected class numbers of shape {shape}, got {tuple(labels.shape)}"
        )
    wanted = labels.to(logits.device).long()
    counts = wanted != IGNORED
    if mask is not None and tuple(mask.shape) == shape:
        counts &= mask.to(logits.device) != 0
    wanted, logits = wanted[counts], logits[counts]
    wrong = wanted[(wanted < 0) | (wanted >= classes)]
    if len(wrong):
        raise RequestError(
            f"{where}: labels: expected class numbers 0 .. {classes - 1} (or {IGNORED}, not "
            f"counted), got {int(wrong[0])}"
        )
    return logits, wanted
