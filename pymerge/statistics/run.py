"""`pymerge collect CONFIG`: statistics of models, each in a file next to its model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint import Checkpoint
from pymerge.errors import MergeError, RequestError
from pymerge.plan.inputs import open_model
from pymerge.statistics.config import CollectConfig, ModelToCollect, read_config
from pymerge.statistics.entry_point import CollectSetup, call_entry, functions_of, loader_of
from pymerge.statistics.files import ModelStatistics, save_statistics
from pymerge.statistics.fisher import collect_fisher
from pymerge.statistics.gram import collect_gram
from pymerge.statistics.loading import Architecture
from pymerge.statistics.progress import CollectProgress, Counted
from pymerge.statistics.target import Target, make_targets, settings_of

__all__ = ["CollectSetup", "Collected", "run_collect"]


@dataclass
class Collected:
    """The outcome for a model.

    model: its name. file: the statistics. examples, size: number of examples, and bytes of the
    file; None while there is no file. state: "collected" or "replaced", "was there" (from an
    earlier run with the same settings); in a dry run "to collect" or "to replace".
    """

    model: str
    file: Path
    examples: int | None
    size: int | None
    state: str


def run_collect(
    config: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    quiet: bool = True,
    verbose: bool = False,
) -> list[Collected]:
    """Collect statistics of the models of a configuration, and save them.

    Each model in turn is loaded into the architecture that the entry point returns, tensor by
    tensor, and `collect_fisher` or `collect_gram` is called on its batches. The file appears whole
    or not at all, and records all settings. An interrupted run resumes with the models that have no
    file with the same settings.

    Args:
        config: path of a YAML file; see docs/statistics.md.
        out: folder of the files, `NAME-fisher.safetensors` or `NAME-gram.safetensors`; it is
            created. By default each is `fisher.safetensors` or `gram.safetensors` next to its
            model, where a merge finds it by the model's directory.
        force: collect again, and replace existing files.
        device: where the models run: "cpu", "cuda", "cuda:N", or "auto": the device of the entry
            point's architecture.
        dry_run: check everything but the batches, write nothing, and report what would be done.
        quiet, verbose: show nothing on stderr, or more.

    Returns: an item for each model, in their order.

    Raises:
        RequestError: there is a problem with the configuration, the models, the entry point's
            result, or the examples; or a file with other settings exists. Files of finished models
            are kept.
        MergeError: a file cannot be written.
    """
    settings = read_config(config)
    check_device(device)
    with ExitStack() as stack:
        checkpoints = _open(settings, stack)
        targets = make_targets(settings, checkpoints, out)
        setup = call_entry(settings)
        reason = Architecture(setup.model).unfit()
        if reason is not None:
            where = f"{settings.where(('entry',))}: entry: {settings.entry}"
            raise RequestError(f"{where}: model: {reason}")
        architecture = Architecture(setup.model if device == "auto" else setup.model.to(device))
        problems = [problem for one in checkpoints for problem in architecture.misfits(one)]
        jobs: list[_Job] = []
        for index, model in enumerate(settings.models):
            loader, state = loader_of(setup, settings, index)[1], "collect"
            try:
                state = targets[index].state(
                    settings, model, checkpoints[index], loader, force=force
                )
            except RequestError as error:
                problems += error.problems
            jobs.append(_Job(index, model, checkpoints[index], targets[index], state))
        if problems:
            raise RequestError(problems)
        with CollectProgress(quiet=quiet) as progress:
            run = _Run(settings, setup, architecture, progress, verbose)
            return run.planned(jobs) if dry_run else run.all(jobs)


def check_device(name: str) -> None:
    """Raise RequestError if a device does not exist."""
    if name in ("auto", "cpu"):
        return
    kind, _, index = name.partition(":")
    if kind != "cuda" or (":" in name and not index.isdecimal()):
        raise RequestError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        there = f"there are {count} CUDA devices" if count else "torch finds no CUDA device"
        raise RequestError(f"device: {name!r} is not available: {there}")


def _open(config: CollectConfig, stack: ExitStack) -> list[Checkpoint]:
    problems: list[str] = []
    found = [_opened(model, config, problems) for model in config.models]
    opened = [stack.enter_context(one) for one in found if one is not None]
    if problems:
        raise RequestError(problems)
    return opened


def _opened(model: ModelToCollect, config: CollectConfig, problems: list[str]) -> Checkpoint | None:
    where = config.where(model.at)
    try:
        return open_model(model.path, model.adapter, model.label)
    except RequestError as error:
        problems += [f"{where}: {problem}" for problem in error.problems]
    except OSError as error:
        problems.append(f"{where}: {model.label}: cannot be read: {error.strerror or error}")
    return None


@dataclass(frozen=True)
class _Job:
    index: int
    model: ModelToCollect
    checkpoint: Checkpoint
    target: Target
    state: str

    def result(self, state: str) -> Collected:
        examples, size = self.target.contents()
        return Collected(self.model.name, self.target.file, examples, size, state)


@dataclass
class _Run:
    config: CollectConfig
    setup: CollectSetup
    architecture: Architecture
    progress: CollectProgress
    verbose: bool

    def planned(self, jobs: list[_Job]) -> list[Collected]:
        """Return what would be done."""
        self._introduce(jobs)
        self.progress.say("dry run: nothing is written")
        words = {"done": "was there", "collect": "to collect", "replace": "to replace"}
        return [job.result(words[job.state]) for job in jobs]

    def all(self, jobs: list[_Job]) -> list[Collected]:
        """Collect statistics of all models that are not done."""
        self._introduce(jobs)
        done = [job for job in jobs if job.state == "done"]
        if done:
            self.progress.say(
                f"going on: {len(done)} of {len(jobs)} models are done, with the same settings"
            )
        found = []
        for job in jobs:
            if job.state == "done":
                found.append(job.result("was there"))
                continue
            self._collect(job)
            found.append(job.result("collected" if job.state == "collect" else "replaced"))
        return found

    def _introduce(self, jobs: list[_Job]) -> None:
        for job in jobs:
            for warning in job.checkpoint.warnings:
                self.progress.say(f"pymerge: warning: {job.checkpoint.label}: {warning}")
        if self.verbose:
            options = ", ".join(f"{key} {value}" for key, value in self.config.options.items())
            module = type(self.setup.model).__name__
            names = len(self.architecture.names)
            self.progress.say(f"{self.config.kind} of {module} with {names} tensors: {options}")

    def _collect(self, job: _Job) -> None:
        name = job.model.label
        job.target.prepare()
        self.architecture.load(job.checkpoint)
        loader, which = loader_of(self.setup, self.config, job.index)
        settings = settings_of(self.config, job.model, job.checkpoint, which)
        self.progress.begin(name, self.config.options["samples"])
        try:
            found = self._statistics(job.index, loader)
        except RequestError as error:
            problems = [
                located if (located := self.config.located(problem)) else f"{name}: {problem}"
                for problem in error.problems
            ]
            raise RequestError(problems) from error
        except (MergeError, OSError):
            raise
        except Exception as error:
            raise RequestError(
                f"{name}: the model or its data raised {type(error).__name__}: {error} "
                "(PYMERGE_DEBUG=1 shows where)"
            ) from error
        record = replace(found.record, settings=settings)
        save_statistics(job.target.file, ModelStatistics(dict(found), record))
        if self.verbose:
            without = len(self.architecture.names) - len(found)
            rows = f", {record.tokens} rows" if record.tokens else ""
            self.progress.say(
                f"{name}: {record.estimator}; {record.examples} examples{rows}; statistics of "
                f"{len(found)} tensors, {without} have none -> {job.target.file}"
            )

    def _statistics(self, index: int, loader: Any) -> ModelStatistics:
        counted = loader
        if isinstance(loader, Iterable) and not isinstance(loader, (torch.Tensor, str, Mapping)):
            counted = Counted(loader, self.progress.advance)
        collect = collect_fisher if self.config.kind == "fisher" else collect_gram
        given = {
            **self.config.arguments_of_function(),
            **functions_of(self.setup, self.config, index),
        }
        return collect(self.setup.model, counted, **given)
