"""`pymerge ada CONFIG OUT`: learns coefficients according to a config and writes the model."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from pymerge.adamerging.config import read_config
from pymerge.adamerging.correlations import require_scipy
from pymerge.adamerging.entry_point import call_entry
from pymerge.adamerging.fit import FitResult
from pymerge.adamerging.module import AdaMerging
from pymerge.byte_sizes import parse_size
from pymerge.errors import RequestError
from pymerge.merging.publish import check_output
from pymerge.merging.report import MergeReport
from pymerge.output import write_file

__all__ = ["run_ada"]


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
        out: directory of the merged model; it appears complete or not at all. `OUT.ada`, beside it,
            gets the coefficients (safetensors, JSON, HTML, PNG), the history, the correlations of
            entropy and loss if the entry point returns labelled data, and the state from which an
            interrupted run continues.
        force: replace `out` if it exists.
        quiet: show no progress.
        memory, threads: for the merge that writes the model; see `merge_checkpoints`.
        resume: continue from the state of an earlier run.

    Raises:
        RequestError: the config, the models or the return value of the entry point are invalid.
        MergeError: the run diverged, or the output cannot be written.
    """
    parse_size(memory, "memory")
    read, out = read_config(config), Path(out)
    values = read.values
    # The fit may take hours, so problems with the output are found before it.
    check_output(out, read.files, force=force)
    setup = call_entry(read)
    if setup.labelled is not None:
        require_scipy()
    clamp: Any = values.clamp
    how: dict[str, Any] = dict(read.fit)
    if setup.join is not None:
        how["join"] = setup.join
    side = out.with_name(f"{out.name}.ada")
    try:
        ada = AdaMerging(
            setup.model,
            read.base,
            read.paths,
            values.granularity,
            values.trimmed,
            values.init,
            values.preset,
            heads=setup.heads,
            clamp=tuple(clamp) if isinstance(clamp, list) else clamp,
            density=values.density,
            names=read.names,
            fixed=values.fixed,
        )
        side.mkdir(parents=True, exist_ok=True)
        result = ada.fit(
            setup.loaders,
            inputs=setup.inputs,
            checkpoint=side / "state.safetensors",
            resume=resume,
            progress=not quiet,
            **how,
        )
        _write_side(ada, result, side)
        found = None
        if setup.labelled is not None:
            found = ada.correlations(setup.labelled, inputs=setup.inputs, labels=setup.labels)
    except RequestError as error:
        raise read.located(error) from None
    if found is not None:
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
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
