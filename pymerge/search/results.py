"""Writes the results of a search: best.yml, tables, the record, plots."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pymerge.merging.report import package_version, versions
from pymerge.output.replace import replace_file

if TYPE_CHECKING:
    from pymerge.search.study import SearchResult

__all__ = ["BEST", "MERGED", "missing_packages", "provenance", "record", "write"]

BEST, MERGED, RECORD = "best.yml", "merged", "search.json"
_FORMAT = 1


def missing_packages() -> list[str]:
    """Return a warning for each missing package that some plots need."""
    found = []
    for name, what in (("matplotlib", "PNGs"), ("plotly", "search.html")):
        if importlib.util.find_spec(name) is None:
            found.append(
                f"{name} is not installed: no {what} (pip install 'pymerge-kernels[search]')"
            )
    return found


def provenance(result: SearchResult) -> dict[str, Any]:
    """Return how the coefficients were chosen, for reports and cards."""
    config, best = result.config, result.best
    assert best is not None
    found: dict[str, Any] = {
        "sampler": config.sampler,
        "preset": config.preset,
        "metric": config.metric_name,
        "direction": config.direction,
        "data": config.search_data.to_dict(),
        "evaluations": len(result.trials),
        "seed": config.seed,
        "trial": best.number,
        "value": best.value,
        "allow_test_split": config.allow_test_split,
    }
    return found


def record(result: SearchResult) -> dict[str, Any]:
    """Return the whole record of a search as plain values."""
    config, best = result.config, result.best

    def shown(trial: Any) -> dict[str, Any] | None:
        if trial is None:
            return None
        return {
            "trial": trial.number,
            "value": trial.value,
            "named": trial.named,
            "values": trial.values,
        }

    return {
        "format": _FORMAT,
        "study": {**config.identity(), "inputs": result.inputs},
        "preset": config.preset,
        "chosen_on": config.search_data.to_dict(),
        "allow_test_split": config.allow_test_split,
        "budget": {
            "evaluations": config.budget.evaluations,
            "seconds": config.budget.seconds,
        },
        "finished": result.finished,
        "variables": {
            v.name: {
                "low": v.domain.low,
                "high": v.domain.high,
                "scale": "log" if v.domain.log else "linear",
                "values": list(v.domain.values) or None,
                "initial": v.initial,
            }
            for v in result.space.variables
        },
        "evaluations": len(result.trials),
        "failures": result.failures,
        "cost": {
            "seconds": result.seconds,
            "seconds_merging": result.seconds_merging,
            "seconds_evaluating": result.seconds_evaluating,
        },
        "first": shown(result.first),
        "best": shown(best),
        "best_config": None if best is None else result.best_config(),
        "report": result.report,
        "warnings": result.warnings,
        "versions": versions(),
    }


def best_text(result: SearchResult) -> str:
    """Return the text of best.yml."""
    assert result.best is not None
    config, best = result.config, result.best
    lines = [
        f"Coefficients chosen by pymerge search {package_version()}: trial {best.number} of "
        f"{len(result.trials)} ({config.sampler}, seed {config.seed}),",
        f"{config.metric_name} = {best.value!r} ({config.direction}) on the data "
        f"{config.search_data}.",
    ]
    if config.allow_test_split:
        lines.append("allow_test_split was set: the data may be test data.")
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    return head + yaml.safe_dump(result.best_config(), sort_keys=False, allow_unicode=True)


def write(result: SearchResult, folder: Path, *, plots: bool = True) -> None:
    """Write everything except the merged model.

    Raises:
        MergeError: something cannot be written.
    """
    replace_file(folder / "trials.csv", _csv(result).encode())
    trials = [
        {
            "number": t.number,
            "state": t.state,
            "value": t.value,
            "values": t.values,
            "named": t.named,
            "error": t.error,
            "seconds_merging": t.seconds_merging,
            "seconds_evaluating": t.seconds_evaluating,
        }
        for t in result.trials
    ]
    replace_file(folder / "trials.json", _json(trials).encode())
    replace_file(folder / RECORD, _json(record(result)).encode())
    if result.best is None:
        return
    replace_file(folder / BEST, best_text(result).encode())
    if plots:
        from pymerge.search import plots as drawn

        if importlib.util.find_spec("matplotlib") is not None:
            drawn.save_pngs(result, folder)
        if importlib.util.find_spec("plotly") is not None:
            replace_file(folder / "search.html", drawn.html(result).encode())


def _csv(result: SearchResult) -> str:
    names = result.space.names
    more = list(dict.fromkeys(key for trial in result.trials for key in trial.named))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            *("number", "state", "value", *names),
            *(f"metric: {key}" for key in more),
            *("seconds_merging", "seconds_evaluating", "error"),
        ]
    )
    for trial in result.trials:
        writer.writerow(
            [trial.number, trial.state, "" if trial.value is None else repr(trial.value)]
            + [repr(trial.values[name]) for name in names]
            + [repr(trial.named[key]) if key in trial.named else "" for key in more]
            + [f"{trial.seconds_merging:.4f}", f"{trial.seconds_evaluating:.4f}"]
            + [trial.error or ""]
        )
    return buffer.getvalue()


def _json(value: Any) -> str:
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """Return plain values without NaN, which JSON does not have."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
