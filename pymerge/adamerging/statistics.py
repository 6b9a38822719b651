"""Whether low entropy means low loss on these tasks: the assumption that AdaMerging stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pymerge.adamerging.fit import batch_inputs
from pymerge.adamerging.losses import entropy_of_each, find_logits
from pymerge.errors import RequestError

if TYPE_CHECKING:
    from pymerge.adamerging.module import AdaMerging

__all__ = ["TaskCorrelation", "correlations"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class TaskCorrelation:
    """Entropy and loss of each example of a task.

    spearman, pearson: correlation in [-1, 1]; NaN where all entropies or all losses are equal.
    entropies, losses: float32 [examples], in nats; the loss is the cross-entropy with the labels.
    accuracy: share of right predictions.
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
    """Return the correlation of a result of scipy, which comes with a p-value."""
    return float(result[0])


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, dict):
        for name in ("labels", "label", "targets", "target"):
            if name in batch:
                return batch[name]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise RequestError(
        "labels: expected batches (inputs, labels) or dictionaries with 'labels', got "
        f"{type(batch).__name__}; give labels=, a function of a batch"
    )


@torch.no_grad()
def correlations(
    ada: AdaMerging,
    loaders: Sequence[Iterable[Any]],
    *,
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = batch_inputs,
    labels: Callable[[Any], Tensor] = _labels,
    names: Sequence[str] | None = None,
) -> list[TaskCorrelation]:
    """Return the Spearman and Pearson correlation of entropy and loss, for each task.

    Yang et al. 2024, section 3.2.2 and figure 4, report a Spearman correlation of 0.87 on average
    for their eight tasks; where it is low, minimising the entropy need not help. Needs scipy.

    Args:
        loaders: for each task, batches with labels: class numbers, [batch].
        inputs: what the model is called with; see `fit.batch_inputs`.
        labels: of a batch; default its second item, or its "labels".
        names: of the tasks; default those of the models.

    Raises:
        RequestError: no batches, or fewer than two examples; labels that are no class numbers.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise RequestError(
            f"correlations: needs scipy ({error}); pip install 'pymerge-kernels[plot]'"
        ) from None
    merged = {name: tensor.detach() for name, tensor in ada.merged_parameters().items()}
    named = list(names or ada.names)
    device = ada.raw_coefficients.device
    found: list[TaskCorrelation] = []
    for task, loader in enumerate(loaders):
        entropies: list[Tensor] = []
        losses: list[Tensor] = []
        right = 0
        for batch in loader:
            args, kwargs, _ = inputs(batch)
            args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            logits = find_logits(ada.run(merged, args, kwargs, task), f"loaders[{task}]: logits")
            wanted = labels(batch).to(logits.device)
            if tuple(wanted.shape) != tuple(logits.shape[:-1]) or wanted.is_floating_point():
                raise RequestError(
                    f"loaders[{task}]: labels: expected class numbers of shape "
                    f"{tuple(logits.shape[:-1])}, got {wanted.dtype} {tuple(wanted.shape)}"
                )
            flat, wanted = logits.float().reshape(-1, logits.shape[-1]), wanted.reshape(-1).long()
            entropies.append(entropy_of_each(flat).cpu())
            losses.append(torch.nn.functional.cross_entropy(flat, wanted, reduction="none").cpu())
            right += int((flat.argmax(-1) == wanted).sum())
        own = torch.cat(entropies) if entropies else torch.empty(0)
        if len(own) < 2:
            raise RequestError(f"loaders[{task}]: expected at least two examples, got {len(own)}")
        loss = torch.cat(losses)
        constant = bool((own == own[0]).all() or (loss == loss[0]).all())
        pair = own.double().numpy(), loss.double().numpy()
        spearman = float("nan") if constant else _first(stats.spearmanr(*pair))
        pearson = float("nan") if constant else _first(stats.pearsonr(*pair))
        name = named[task] if task < len(named) else f"task {task}"
        found.append(TaskCorrelation(name, spearman, pearson, right / len(own), own, loss))
    return found
