"""`pymerge ada CONFIG OUT`: learns coefficients as a config says, and writes the merged model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError
from torch import nn

from pymerge.adamerging.fit import FitResult, batch_inputs
from pymerge.adamerging.join import Join
from pymerge.adamerging.module import AdaMerging
from pymerge.adamerging.statistics import batch_labels, require_scipy
from pymerge.config.yaml_lines import LinedYaml, read_yaml
from pymerge.entry import as_setup, call_function
from pymerge.errors import RequestError, nearest
from pymerge.report import MergeReport

__all__ = ["AdaSetup", "run_ada"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class AdaSetup:
    """What a config's entry point returns (or a dictionary of the same).

    model: the architecture. loaders: for each task, an iterable of batches without or with labels
    (which are not used). heads: for each task, what makes logits, or None. inputs: what the model
    is called with; see `pymerge.adamerging.fit.batch_inputs`. labelled: for each task, batches with
    labels, for the correlation of entropy and loss; or None. labels: what they are, a function of a
    batch; see `pymerge.adamerging.correlations`. join: instead of the config's; see
    `pymerge.adamerging.fit.fit`.
    """

    model: nn.Module
    loaders: Sequence[Iterable[Any]]
    heads: Sequence[Callable[..., Any]] | None = None
    inputs: Callable[[Any], Any] = batch_inputs
    labelled: Sequence[Iterable[Any]] | None = None
    labels: Callable[[Any], torch.Tensor] = batch_labels
    join: str | Join | None = None


class _Fit(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int | None = None
    lr: float | None = None
    batches_per_task: int | None = None
    entropy: StrictStr | None = None
    weights: list[float] | None = None
    tokens: int | None = None
    autocast: StrictStr | None = None
    seed: int = 0
    accumulate: StrictStr = "gradients"
    join: StrictStr | None = None
    patience: int | None = None
    min_delta: float = 1e-4
    checkpoint_every: int = 25


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    name: StrictStr | None = None


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base_model: StrictStr
    models: list[StrictStr | _Named] = Field(min_length=1)
    entry: StrictStr
    arguments: dict[str, Any] = {}
    granularity: StrictStr | list[StrictStr] = "layer"
    trimmed: StrictBool = False
    density: float = 0.2
    init: float | list[float] = 0.3
    preset: StrictStr = "official"
    clamp: list[float] | StrictStr | None = "preset"
    fixed: StrictStr = "equal"
    fit: _Fit = _Fit()


def _load(path: Path) -> tuple[_Config, LinedYaml]:
    keys = "base_model: ..., models: ..., entry: ..."
    document, _ = read_yaml(path, "an AdaMerging configuration", keys)
    try:
        return _Config.model_validate(document.data), document
    except ValidationError as error:
        raise RequestError([_problem(one, document) for one in error.errors()]) from None


def _problem(error: Any, document: LinedYaml) -> str:
    path: tuple[str | int, ...] = tuple(
        part for part in error["loc"] if part not in ("str", "_Named", "list[str]")
    )
    known = _Fit.model_fields if path[:1] == ("fit",) and len(path) > 1 else _Config.model_fields
    shown = ".".join(str(part) for part in path)
    where = f"{document.where(path)}: {shown}"
    if error["type"] == "extra_forbidden":
        hint = nearest(shown.rpartition(".")[2], known)
        return f"{where}: unknown key{hint} (known: {', '.join(known)})"
    if error["type"] == "missing":
        return f"{document.name}: {shown}: is missing"
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {error['input']!r:.60}"


def _entry(settings: _Config, document: LinedYaml) -> AdaSetup:
    """Call the entry point and check what it returns."""
    where = f"{document.where(('entry',))}: entry"
    at = f"{document.where(('arguments',))}: arguments"
    found = call_function(settings.entry, settings.arguments, where, at)
    return as_setup(found, AdaSetup, f"{where}: {settings.entry}")


def run_ada(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    quiet: bool = True,
    memory: int | str = "2GiB",
    threads: int | None = None,
    resume: bool = True,
) -> tuple[FitResult, MergeReport]:
    """Learn coefficients and write the merged model.

    Args:
        config: path of a YAML file; see docs/adamerging.md.
        out: directory of the merged model; appears complete or not at all. Beside it, `OUT.ada`
            gets the coefficients (safetensors, JSON, HTML, PNG), the history, the correlations of
            entropy and loss where the entry point gives labelled data, and the state from which
            an interrupted run goes on.
        force: replace `out` if it exists.
        quiet: show no progress.
        memory, threads: of the merge that writes the model; see `merge_checkpoints`.
        resume: go on from the state of an earlier run.

    Raises:
        RequestError: something is wrong with the config, the models or what the entry point gives.
        MergeError: the run diverged, or the output cannot be written.
    """
    path, out = Path(config), Path(out)
    settings, document = _load(path)
    how = settings.fit
    cast = None
    if how.autocast is not None:
        cast = _DTYPES.get(how.autocast)
        if cast is None:
            raise RequestError(
                f"{document.where(('fit', 'autocast'))}: fit.autocast: expected one of "
                f"{', '.join(_DTYPES)}, got {how.autocast!r}"
            )
    from pymerge.output import OutputDirectory

    entries = [_Named(model=one) if isinstance(one, str) else one for one in settings.models]
    paths = [entry.model for entry in entries]
    inputs = [Path(one) for one in (settings.base_model, *paths)]
    # Hours may go into the fit: what would stop the writing is found before.
    problems = OutputDirectory(out, force=force, inputs=inputs).check()
    if problems:
        raise RequestError(problems)
    setup = _entry(settings, document)
    if setup.labelled is not None:
        require_scipy()
    clamp = settings.clamp
    ada = AdaMerging(
        setup.model,
        settings.base_model,
        paths,
        settings.granularity,
        settings.trimmed,
        settings.init,
        settings.preset,
        heads=setup.heads,
        clamp=tuple(clamp) if isinstance(clamp, list) else clamp,  # pyright: ignore[reportArgumentType]
        density=settings.density,
        names=[entry.name or Path(entry.model).name for entry in entries],
        fixed=settings.fixed,
    )
    side = out.with_name(f"{out.name}.ada")
    side.mkdir(parents=True, exist_ok=True)
    # Every key of the config's `fit` is an argument of `AdaMerging.fit`.
    chosen: dict[str, Any] = dict(how) | {"autocast": cast}
    if setup.join is not None:
        chosen["join"] = setup.join
    result = ada.fit(
        setup.loaders,
        inputs=setup.inputs,
        checkpoint=side / "state.safetensors",
        resume=resume,
        progress=not quiet,
        **chosen,
    )
    _write_side(ada, result, side)
    if setup.labelled is not None:
        found = ada.correlations(setup.labelled, inputs=setup.inputs, labels=setup.labels)
        rows = [
            {
                "task": one.task,
                "spearman": None if math.isnan(one.spearman) else one.spearman,
                "pearson": None if math.isnan(one.pearson) else one.pearson,
                "accuracy": one.accuracy,
                "examples": one.examples,
            }
            for one in found
        ]
        _write_json(side / "correlations.json", rows)
    report = ada.save(
        out,
        coefficients=side / "coefficients.safetensors",
        force=force,
        quiet=quiet,
        memory=memory,
        threads=threads,
    )
    assert report is not None
    return result, report


def _write_side(ada: AdaMerging, result: FitResult, side: Path) -> None:
    table = ada.coefficients
    _write_json(side / "coefficients.json", table.to_dict())
    _write_json(side / "history.json", result.history)
    table.save_html(side / "coefficients.html")
    try:
        import matplotlib as matplotlib
    except ImportError:
        return
    table.save_png(side / "coefficients.png")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
