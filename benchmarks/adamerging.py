"""Benchmark of AdaMerging, compared with FusionBench and the authors' construction.

    make bench-ada                  sets up an environment with fusion-bench 0.2.33, and runs this
    python -m benchmarks.adamerging [--models 8] [--steps 6] [--repetitions 5] [--turns 2]

All sides get the same models, batches and steps, each in its own process, in turns. No number is
shown unless the coefficients of pymerge agree with those of the other side.
PYMERGE_FUSION_PYTHON names a Python with fusion-bench; without one, that side is left out.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.adamerging_sides import BATCH, LENGTH, make_family
from benchmarks.measure import WrongResult, run_process
from benchmarks.run import parser
from benchmarks.tables import Table, console, save

__all__ = ["main"]

_NAMES = {
    "fusion_bench": "FusionBench 0.2.33, LayerWiseMergedModel",
    "pymerge": "pymerge, preset fusion_bench",
    "pymerge_joined": 'the same, join="concatenate"',
    "pymerge_coefficients": 'the same, accumulate="coefficients"',
    "official": "authors' construction, torch",
    "pymerge_official": "pymerge, preset official",
}
_RIVAL = {
    "pymerge": "fusion_bench",
    "pymerge_joined": "fusion_bench",
    "pymerge_coefficients": "fusion_bench",
    "pymerge_official": "official",
}
_TOLERANCE = 2e-4  # of coefficients that moved by about lr * steps = 6e-3


def _python(side: str) -> str | None:
    if side != "fusion_bench":
        return sys.executable
    root = Path(__file__).resolve().parent.parent
    named = os.environ.get("PYMERGE_FUSION_PYTHON")
    python = Path(named) if named else root / ".venv-fusion" / "bin" / "python"
    return str(python) if python.is_file() else None


def _table_of(found: dict[str, Any]) -> dict[str, list[float]]:
    columns = torch.tensor(found["coefficients"]).T.tolist()
    return dict(zip(found["layers"], columns, strict=True))


def _agree(own: dict[str, Any], other: dict[str, Any]) -> float:
    mine, theirs = _table_of(own), _table_of(other)
    if set(mine) != set(theirs):
        raise WrongResult(f"adamerging: other layers: {set(mine) ^ set(theirs)}")
    pairs = [(torch.tensor(mine[name]), torch.tensor(theirs[name])) for name in mine]
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    if apart > _TOLERANCE:
        raise WrongResult(f"adamerging: coefficients differ by {apart:.2e}")
    return apart


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all sides in turns and show them."""
    made = parser(__doc__ or "")
    made.add_argument("--models", type=int, default=8)
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--turns", type=int, default=2)
    options = made.parse_args(arguments)
    sides = [side for side in _NAMES if _python(side) is not None]
    if "fusion_bench" not in sides:
        console.print("no fusion-bench: `make bench-ada` sets it up; its side is left out")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="pymerge-ada-") as name:
        folder = Path(name)
        make_family(folder, options.models)
        size = (folder / "model-0" / "model.safetensors").stat().st_size
        for turn in range(options.turns):
            for side in sides:
                console.print(f"  {turn + 1} of {options.turns}: {_NAMES[side]}", style="dim")
                command = [_python(side) or "", "-m", "benchmarks.adamerging_sides", side]
                command += [str(folder), "--models", str(options.models)]
                command += ["--steps", str(options.steps)]
                command += ["--repetitions", str(options.repetitions)]
                process = run_process(command)
                found = json.loads((folder / f"{side}.json").read_text())
                found["peak_anonymous"] = process.peak_anonymous
                found["peak_resident"] = process.peak_resident
                runs[side].append(found)
    _show(runs, size, options)


def _show(runs: dict[str, list[dict[str, Any]]], size: int, options: Any) -> None:
    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[side])

    title = (
        f"AdaMerging, layer-wise, {size / 4e6:.1f} M parameters in float32, K = {options.models}"
    )
    columns = ["", "merging in a step, ms", "faster", "step, s", "faster", "memory, MB", "apart"]
    table = Table(title, columns)
    for side, found in runs.items():
        rival = _RIVAL.get(side)
        rival = rival if rival in runs else None
        merge, step = median(side, "merge"), median(side, "step")
        table.add(
            _NAMES[side],
            f"{1e3 * merge:.0f}",
            "" if rival is None else f"{median(rival, 'merge') / merge:.1f}x",
            f"{step:.2f}",
            "" if rival is None else f"{median(rival, 'step') / step:.1f}x",
            f"{max(run['peak_anonymous'] for run in found) / 1e6:.0f}",
            "" if rival is None else f"{_agree(found[0], runs[rival][0]):.1e}",
        )
    table.notes.append(
        f"Merging in a step: all merges and the backward passes through them, of the gradients of "
        f"{options.models} batches (preset official: two a task), without the network. Step: with "
        f"forward and backward of the network, batches of {BATCH} x {LENGTH} tokens. The authors' "
        f"code merges anew for every batch."
    )
    table.notes.append(
        f"Medians of {options.turns} processes in turns, {options.steps} steps each. Memory: peak "
        f"of allocated (anonymous) memory with Python and torch; pymerge maps its checkpoints "
        f"({(options.models + 1) * size / 1e6:.0f} MB), the others hold them. Apart: largest "
        f"difference of a coefficient after {options.steps} steps."
    )
    table.show()
    records = [{"side": side, "runs": found} for side, found in runs.items()]
    for record in records:
        for run in record["runs"]:
            del run["coefficients"], run["layers"]
    save("adamerging", {"adamerging": table}, records, options.results)


if __name__ == "__main__":
    main()
