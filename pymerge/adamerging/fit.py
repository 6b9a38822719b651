"""Learns the coefficients of an `AdaMerging` without labels: minimises the entropy with Adam."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pymerge.adamerging.fitting import Fitting, check_fitting
from pymerge.adamerging.join import Join, split_rows
from pymerge.adamerging.losses import entropy, find_logits
from pymerge.errors import MergeError, RequestError

if TYPE_CHECKING:
    from pymerge.adamerging.module import AdaMerging

__all__ = ["FitResult", "batch_inputs", "fit", "moved"]

Tensor = torch.Tensor
Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Tensor | None]]

_LABELS = ("labels", "label", "targets", "target")


@dataclass
class FitResult:
    """The outcome of a run of `fit`.

    Attributes:
        history: for each step, {"step", "entropy" (mean over tasks, nats), "tasks" (one for each
            task), "seconds"}.
        steps: number of steps taken, including those before a resumption.
        stopped: "steps", "patience" or "already done".
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    stopped: Literal["steps", "patience", "already done"] = "steps"
    seconds: float = 0.0


def batch_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Return (args, kwargs, mask) for a batch: the inputs of the model, and what is not padding.

    A tensor is the only argument. Of a tuple or list, the first item is the only argument; the rest
    are labels. A dictionary, without its labels, is keyword arguments; its `attention_mask` marks
    padding.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, Mapping):
        kwargs = {key: value for key, value in batch.items() if key not in _LABELS}
        mask = kwargs.get("attention_mask")
        return (), kwargs, mask if isinstance(mask, Tensor) else None
    if isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], Mapping):
            return batch_inputs(batch[0])
        return (batch[0],), {}, None
    raise RequestError(
        f"inputs: expected batches that are tensors, tuples or dictionaries, got "
        f"{type(batch).__name__}; give inputs=, a function of a batch that returns (args, kwargs, "
        "mask or None)"
    )


def fit(
    ada: AdaMerging,
    loaders: Sequence[Iterable[Any]],
    steps: int | None = None,
    *,
    lr: float | None = None,
    batches_per_task: int | None = None,
    entropy: str | None = None,
    weights: Sequence[float] | None = None,
    inputs: Inputs = batch_inputs,
    tokens: int | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    accumulate: str = "gradients",
    join: str | Join | None = None,
    patience: int | None = None,
    min_delta: float = 1e-4,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 25,
    resume: bool = True,
    progress: bool = True,
) -> FitResult:
    """Learn the coefficients by minimising the entropy of predictions (Yang et al. 2024, eq. 4).

    Each step merges once, runs `batches_per_task` batches of every task, adds up all gradients, and
    takes one step of Adam (betas 0.9 and 0.999, no weight decay) on

        sum_k sum_{batches of task k} mean_x H(softmax f_theta(x))

    Args:
        loaders: for each task, an iterable of batches, restarted when it ends. With heads, task k
            uses head k; without, all tasks use the model's own output.
        steps, lr, batches_per_task, entropy: default: those of the preset (official: 500, 1e-3, 2,
            "exact"; fusion_bench: 1000, 1e-3, 1, "fusion_bench").
        weights: positive weights of the tasks' entropies in the sum; default: 1 each, as in the
            paper. Entropies reach up to log(classes), so 1 / log(classes) gives tasks equal
            influence.
        inputs: returns the inputs of the model for a batch; see `batch_inputs`.
        tokens: for a language model, the number of predictions per batch to use, drawn at random.
        autocast: run the model in mixed precision, e.g. torch.bfloat16.
        seed: seed of everything that is drawn here; data loaders have their own.
        accumulate: what is summed over the batches of a step. "gradients": those of the merged
            tensors, as large as one model; reduced to coefficients once per step. "coefficients":
            each layer's gradient is reduced to K numbers and freed at once, which needs the least
            memory, but one pass over the checkpoints for each batch.
        join: run the model once for the batches of all tasks, and pass to each head the rows of its
            task. This is faster if batches are small, and needs memory for the activations of all
            of them. "concatenate": batches have equal shapes except for the first dimension. A
            function takes the list of the tasks' batches and returns them as one batch, in that
            order (padded if necessary). The results agree up to rounding if the model treats
            examples independently.
        patience, min_delta: stop if the mean entropy of the last 20 steps has not decreased by
            `min_delta` for `patience` steps.
        checkpoint: file in which the coefficients and Adam's state are saved, every
            `checkpoint_every` steps and at the end. With `resume`, a run continues from it, at the
            batch it had reached.
            Earlier batches are skipped: those of a list by index, those of any other loader by
            reading them. The result equals that of an uninterrupted run if a loader yields the same
            batches again, i.e. if its shuffling is seeded.
        progress: show a bar with the entropy of each task (on a terminal).

    Raises:
        RequestError: loaders that are empty or yield NaN, outputs without classes, values out of
            range.
        MergeError: the run diverges; the last good coefficients are kept and saved.
    """
    how = check_fitting(
        ada,
        loaders,
        steps,
        lr=lr,
        batches_per_task=batches_per_task,
        entropy=entropy,
        weights=weights,
        tokens=tokens,
        autocast=autocast,
        seed=seed,
        accumulate=accumulate,
        join=join,
        patience=patience,
        min_delta=min_delta,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
    )
    return _Run(ada, loaders, how, inputs).run()


def endless(loader: Iterable[Any], label: str, skip: int = 0) -> Iterator[Any]:
    """Yield the batches of a loader, again and again, starting at number `skip`."""
    if isinstance(loader, Sequence) and len(loader) > 0:
        while True:
            yield loader[skip % len(loader)]
            skip += 1
    while True:
        empty = True
        for batch in loader:
            empty = False
            if skip > 0:
                skip -= 1
                continue
            yield batch
        if empty:
            raise RequestError(
                f"{label}: expected at least one batch, got none (an iterator that has ended "
                "cannot begin again: give a list or a DataLoader)"
            )


class _Run:
    def __init__(
        self, ada: AdaMerging, loaders: Sequence[Iterable[Any]], how: Fitting, inputs: Inputs
    ) -> None:
        self.ada, self.how, self.inputs = ada, how, inputs
        self.loaders = loaders
        self.batches: list[Iterator[Any]] = []
        self.optimizer = torch.optim.Adam([ada.raw_coefficients], lr=how.lr)
        self.result = FitResult()
        self.settings: dict[str, Any] = {}  # of the state file, if there is one
        self.good = ada.raw_coefficients.detach().clone()  # the last ones with finite entropies

    def run(self) -> FitResult:
        from pymerge.adamerging.checkpoint import fit_settings, load_state
        from pymerge.adamerging.show import FitBar

        how, result, begun = self.how, self.result, time.monotonic()
        if how.checkpoint is not None:
            self.settings = fit_settings(self.ada, how)
        if how.checkpoint is not None and how.resume and how.checkpoint.exists():
            result.history = load_state(how.checkpoint, self.ada, self.optimizer, self.settings)
            result.steps = len(result.history)
            self.good = self.ada.raw_coefficients.detach().clone()
            if result.steps >= how.steps:
                result.stopped = "already done"
                return result
        taken = result.steps * how.batches
        self.batches = [endless(one, f"loaders[{k}]", taken) for k, one in enumerate(self.loaders)]
        with FitBar(how.steps, result.steps, self.ada.names, shown=how.progress) as bar:
            while result.steps < how.steps:
                started = time.monotonic()
                losses = self._step(result.steps)
                result.steps += 1
                mean = sum(losses) / len(losses)
                row = {"step": result.steps, "entropy": mean, "tasks": losses}
                result.history.append(row | {"seconds": time.monotonic() - started})
                bar.advance(losses)
                if how.checkpoint is not None and result.steps % how.checkpoint_every == 0:
                    self._save(how.checkpoint)
                if self._impatient():
                    result.stopped = "patience"
                    break
        if how.checkpoint is not None:
            self._save(how.checkpoint)
        result.seconds = time.monotonic() - begun
        return result

    def _save(self, path: Path, adam: bool = True) -> None:
        from pymerge.adamerging.checkpoint import save_state

        optimizer = self.optimizer if adam else None
        save_state(path, self.ada, optimizer, self.settings, self.result.history)

    def _step(self, step: int) -> list[float]:
        self.optimizer.zero_grad(set_to_none=True)
        table = self.ada.raw_coefficients
        generator = torch.Generator().manual_seed((self.how.seed * 1_000_003 + step) % 2**63)
        losses = self._accumulate(step, generator)
        gradient = table.grad
        if gradient is None:  # no output depends on any layer
            raise RequestError(
                "model: expected outputs that depend on the merged parameters; none of them got a "
                "gradient"
            )
        if not bool(torch.isfinite(gradient).all()):
            self._diverged(step, "a gradient is not finite")
        self.good.copy_(table.detach())
        self.optimizer.step()
        if not bool(torch.isfinite(table).all()):
            self._diverged(step, "a coefficient is not finite")
        return losses

    def _accumulate(self, step: int, generator: torch.Generator) -> list[float]:
        """Add up the gradients of all tasks; return the mean entropy of each."""
        ada = self.ada
        merged = ada.merged_parameters()
        leaves = merged
        if self.how.accumulate == "gradients":
            leaves = {name: t.detach().requires_grad_() for name, t in merged.items()}
        totals = [0.0] * len(self.batches)
        turns = self.how.batches * (1 if self.how.join else len(self.batches))
        for turn, found in enumerate(self._losses(leaves, step, generator), 1):
            # The graph of the merge owns no tensors, so retaining it costs nothing.
            self._backward(found, totals, leaves is merged and turn < turns)
        if leaves is not merged:
            taken = [(merged[n], leaf.grad) for n, leaf in leaves.items() if leaf.grad is not None]
            if taken:
                torch.autograd.backward([t for t, _ in taken], [g for _, g in taken])
        return [total / self.how.batches for total in totals]

    def _backward(self, found: dict[int, Tensor], totals: list[float], retain: bool) -> None:
        """Add the entropies to the totals of their tasks, backpropagate them, and clear `found`."""
        for task, loss in found.items():
            totals[task] += float(loss.detach())
        parts = [loss * self.how.weights[task] for task, loss in found.items()]
        found.clear()
        torch.autograd.backward(parts, retain_graph=retain)

    def _losses(
        self, merged: Mapping[str, Tensor], step: int, generator: torch.Generator
    ) -> Iterator[dict[int, Tensor]]:
        """Yield the entropies of the step's batches by task, together if they share a graph.

        The caller must drop them before it requests the next ones, so that only one graph exists at
        a time.
        """
        if self.how.join is not None:
            for _ in range(self.how.batches):
                yield self._joined(self.how.join, merged, step, generator)
            return
        for task in range(len(self.batches)):
            for _ in range(self.how.batches):
                yield {task: self._alone(merged, task, step, generator)}

    def _alone(
        self, merged: Mapping[str, Tensor], task: int, step: int, generator: torch.Generator
    ) -> Tensor:
        batch = self._next(task)
        args, kwargs, mask = self.inputs(batch)
        with self._precision():
            output = self.ada.run(merged, args, kwargs, task)
        return self._loss(output, mask, batch, task, step, generator)

    def _joined(
        self, join: Join, merged: Mapping[str, Tensor], step: int, generator: torch.Generator
    ) -> dict[int, Tensor]:
        batches = [self._next(task) for task in range(len(self.batches))]
        args, kwargs, mask = self.inputs(join(batches))
        masks = [None] * len(batches) if mask is None else split_rows(mask, batches)
        with self._precision():
            outputs = split_rows(self.ada.run_architecture(merged, args, kwargs), batches)
            outputs = [self.ada.apply_head(output, task) for task, output in enumerate(outputs)]
        return {
            task: self._loss(output, masks[task], batches[task], task, step, generator)
            for task, output in enumerate(outputs)
        }

    def _next(self, task: int) -> Any:
        return moved(next(self.batches[task]), self.ada.raw_coefficients.device)

    def _loss(
        self,
        output: Any,
        mask: Tensor | None,
        batch: Any,
        task: int,
        step: int,
        generator: torch.Generator,
    ) -> Tensor:
        logits = find_logits(output, f"loaders[{task}]: logits")
        fits = mask is not None and tuple(mask.shape) == tuple(logits.shape[:-1])
        loss = entropy(
            logits,
            kind=self.how.entropy,
            mask=mask if fits else None,
            tokens=self.how.tokens,
            generator=generator,
        )
        if not bool(torch.isfinite(loss.detach())):
            for name, tensor in _tensors(batch):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise RequestError(
                        f"loaders[{task}]: expected finite numbers, got NaN or infinity in a "
                        f"batch{name} (step {step + 1})"
                    )
            if (culprit := self.ada.find_nonfinite()) is not None:
                raise RequestError(f"{culprit}: expected finite numbers, got NaN or infinity")
            self._diverged(step, f"the entropy of task {task} is {float(loss.detach())}")
        return loss

    def _precision(self) -> AbstractContextManager[Any]:
        if self.how.autocast is None:
            return nullcontext()
        return torch.autocast(self.ada.raw_coefficients.device.type, self.how.autocast)

    def _diverged(self, step: int, why: str) -> None:
        with torch.no_grad():
            self.ada.raw_coefficients.copy_(self.good)
        saved = ""
        if self.how.checkpoint is not None:
            path = self.how.checkpoint
            path = path.with_name(f"{path.stem}.last-good{path.suffix}")
            self._save(path, adam=False)
            saved = f", and saved to {path}"
        raise MergeError(
            f"fit: diverged at step {step + 1}: {why}; the coefficients are the last good "
            f"ones{saved}; a smaller lr (now {self.how.lr:g}) may help"
        )

    def _impatient(self) -> bool:
        patience = self.how.patience
        means = [row["entropy"] for row in self.result.history]
        window = 20
        if patience is None or len(means) < window + patience:
            return False
        smooth = [sum(means[i : i + window]) / window for i in range(len(means) - window + 1)]
        return min(smooth[-patience:]) > min(smooth[:-patience]) - self.how.min_delta


def _tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield "", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from ((f"[{key!r}]{rest}", tensor) for rest, tensor in _tensors(value))
    elif isinstance(batch, (tuple, list)):
        for number, value in enumerate(batch):
            yield from ((f"[{number}]{rest}", tensor) for rest, tensor in _tensors(value))


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device: the batch itself, or one of the same form."""
    if callable(move := getattr(batch, "to", None)):  # tensors, and batches that can move
        return move(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch
