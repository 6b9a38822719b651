"""Benchmark of `pymerge analyze`, compared with a linear merge of the same files.

Both read base and models (the merge does not need the base), in separate processes, in turns, from
a warm page cache. The merge also writes its output, once to the disk and once to memory (/dev/shm),
where writing is cheapest. The analysis' results for some tensors are compared with float64 before a
number is shown.

    python -m benchmarks.analysis [--small] [--repetitions 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks.checkpoints import CheckpointSet
from benchmarks.checks import Reader
from benchmarks.engine import make_config
from benchmarks.measure import ProcessRun, WrongResult, run_process
from benchmarks.run import parser
from benchmarks.tables import Table, console, save

__all__ = ["check_analysis", "main"]

_MEMORY = Path("/dev/shm")
_CHECKED = 4  # tensors
_TOLERANCE = 1e-6
SIDES = {
    "linear": "linear merge",
    "linear_memory": "linear merge, output to memory",
    "analyze": "analyze",
    "analyze_plain": "analyze, no densities",
    "analyze_exact": "analyze, exact thresholds",
}
_OPTIONS = {"analyze_plain": ["--densities", ""], "analyze_exact": ["--thresholds", "exact"]}


def check_analysis(found: Mapping[str, Any], paths: CheckpointSet) -> None:
    """Compare the statistics of some tensors with float64.

    Raises:
        WrongResult: one of them differs.
    """
    base, models = Reader(paths.base), [Reader(path) for path in paths.models]
    groups = {group["name"]: group for group in found["tensors"]}
    names = sorted(groups)
    for name in names[:: max(1, len(names) // _CHECKED)]:
        own = groups[name]
        origin = base.get(name).float()
        tau = [(model.get(name).float() - origin).double() for model in models]
        pairs = [(i, j) for i in range(len(tau)) for j in range(i + 1, len(tau))]
        _same(name, "l1", own["l1"], [float(t.abs().sum()) for t in tau])
        _same(name, "l2", own["l2"], [float(t.norm()) for t in tau])
        _same(name, "unchanged", own["unchanged"], [float((t == 0).double().mean()) for t in tau])
        for i, j in pairs:
            a, b = tau[i], tau[j]
            both = (a != 0) & (b != 0)
            expected = {
                "dot": float(a @ b),
                "l1_distance": float((a - b).abs().sum()),
                "equal": float((a == b).double().mean()),
                "sign_conflict": _share(both & (a.sign() != b.sign()), int(both.sum())),
            }
            for key, value in expected.items():
                scale = own["l2"][i] * own["l2"][j] if key == "dot" else None
                _same(name, key, [own[key][i][j]], [value], scale)
            for trimmed in own["trimmed"]:
                limits = trimmed["threshold"]
                kept = [t.abs() >= limit for t, limit in zip(tau, limits, strict=True)]
                fewest = min(int(kept[i].sum()), int(kept[j].sum()))
                overlap = _share(kept[i] & kept[j], fewest)
                _same(name, "overlap", [trimmed["overlap"][i][j]], [overlap])
                whole = float(a @ a)
                norm = float((a[kept[i]] ** 2).sum()) / whole if whole > 0 else None
                _same(name, "kept_norm", [trimmed["kept_norm"][i]], [norm])


def _share(chosen: torch.Tensor, of: int) -> float | None:
    return int(chosen.sum()) / of if of > 0 else None


def _same(
    name: str,
    what: str,
    got: Sequence[float | None],
    expected: Sequence[float | None],
    scale: float | None = None,
) -> None:
    """Compare numbers; None stands for an undefined value: a share of nothing."""
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            near = a is b
        else:
            near = abs(a - b) <= _TOLERANCE * (abs(b) if scale is None else scale)
        if not near:
            raise WrongResult(f"{name}: {what} is {a}, expected {b}")


def _command(side: str, root: Path, paths: CheckpointSet, memory: Path) -> list[str]:
    program = [sys.executable, "-m", "pymerge"]
    if side.startswith("linear"):
        out = memory if side == "linear_memory" else root
        config = root / "linear.json"
        config.write_text(json.dumps(make_config("linear", paths)))  # JSON is YAML
        report = root / f"{side}.json"
        command = [*program, "merge", str(config), str(out / "merged"), "--force", "--quiet"]
        return [*command, "--report", str(report)]
    command = [*program, "analyze", str(paths.base), *map(str, paths.models), "--no-html"]
    command += ["--out", str(root / side), "--force", "--quiet"]
    return command + _OPTIONS.get(side, [])


def _seconds_inside(side: str, root: Path) -> float:
    """Return how long a run took by its own account, without starting Python."""
    if side.startswith("linear"):
        return float(json.loads((root / f"{side}.json").read_text())["seconds"])
    found = json.loads((root / side / "analysis.json").read_text())
    return float(found["facts"]["seconds"])


def measure(
    root: Path, paths: CheckpointSet, repetitions: int
) -> tuple[Table, list[dict[str, Any]]]:
    """Run all sides in turns."""
    runs: dict[str, list[tuple[ProcessRun, float]]] = {side: [] for side in SIDES}
    memory = _MEMORY / root.name if _MEMORY.is_dir() else root / "memory"
    memory.mkdir()
    try:
        for turn in range(repetitions):
            for side in SIDES:
                process = run_process(_command(side, root, paths, memory))
                runs[side].append((process, _seconds_inside(side, root)))
            console.print(
                f"  {turn + 1} of {repetitions}: "
                + ", ".join(f"{SIDES[side]} {own[-1][0].wall:.2f} s" for side, own in runs.items()),
                style="dim",
            )
    finally:
        shutil.rmtree(memory)
    for side in SIDES:
        if side.startswith("analyze"):
            check_analysis(json.loads((root / side / "analysis.json").read_text()), paths)
    size = paths.nbytes / 2  # bf16
    table = Table(
        f"Analysis beside a linear merge, {size / 1e9:.2f} B parameters, K = {len(paths.models)}, "
        "bf16, warm cache",
        ["", "wall, s", "inside, s", "CPU, s", "of linear", "inside", "memory, MB"],
    )
    for side, own in runs.items():
        wall = statistics.median(process.wall for process, _ in own)
        inside = statistics.median(seconds for _, seconds in own)
        # Each run beside the merge of its own turn: the ratio is unaffected by what slows both.
        turns = list(zip(own, runs["linear"], strict=True))
        ratio = statistics.median(a[0].wall / b[0].wall for a, b in turns)
        ratio_inside = statistics.median(a[1] / b[1] for a, b in turns)
        table.add(
            SIDES[side],
            f"{wall:.2f}",
            f"{inside:.2f}",
            f"{statistics.median(process.cpu for process, _ in own):.2f}",
            f"{ratio:.2f}x",
            f"{ratio_inside:.2f}x",
            f"{max(process.peak_anonymous for process, _ in own) / 1e6:.0f}",
        )
    read = paths.nbytes * (len(paths.models) + 1) / 1e9
    table.notes = [
        f"Medians of {repetitions} in turns; ratios are medians of those within a turn. Wall: with "
        "starting Python; inside: without. Memory: peak of allocated (anonymous) memory. The "
        f"analysis reads {read:.2f} GB, the merge {read - paths.nbytes / 1e9:.2f} GB, and writes "
        f"{paths.nbytes / 1e9:.2f} GB.",
        f"Norms, dot products, distances, shares and overlaps of every {_CHECKED}th of the tensors "
        f"agree with float64 within {_TOLERANCE:g} of their size.",
    ]
    records = [
        {"side": side, "inside": inside, **asdict(process)}
        for side, own in runs.items()
        for process, inside in own
    ]
    return table, records


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show and save."""
    made = parser(__doc__ or "")
    made.add_argument("--small", action="store_true", help="a small model, for a quick look")
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    shape = checkpoints.LLAMA_SMALL if options.small else checkpoints.LLAMA_057B
    torch.set_num_threads(1)
    with checkpoints.workspace(shape.parameters * 16) as root:
        if options.inputs is None:
            console.print(f"analysis: making checkpoints in {root}")
            paths = checkpoints.make_checkpoints(root / "inputs", shape)
        else:
            models = tuple(options.inputs / f"model-{number}" for number in range(1, 5))
            files = (options.inputs / "base").glob("*.safetensors")
            nbytes = sum(file.stat().st_size for file in files)
            paths = CheckpointSet(options.inputs / "base", models, shape, nbytes)
        checkpoints.warm(paths)
        table, records = measure(root, paths, options.repetitions)
    table.show()
    save("analysis", {"analysis": table}, records, options.results)


if __name__ == "__main__":
    main()
