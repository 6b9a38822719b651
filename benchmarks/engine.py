"""Benchmark of whole merges: generated checkpoints through the command line, one process each.

0.57 B parameters (Llama shapes), bf16, sharded, base + 4 models, warm page cache. Outputs are
compared with an independent computation (benchmarks/checks.py) before a number is shown. Then comes
the proof that memory does not grow: a model twice as large, and twice as many models.

    python -m benchmarks.engine --small
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import checkpoints, checks
from benchmarks.checkpoints import CheckpointSet
from benchmarks.checks import Reader
from benchmarks.measure import ProcessRun, WrongResult, run_process
from benchmarks.tables import Table, console, save

__all__ = ["METHODS", "Merge", "check_output", "merge_once", "run"]

WEIGHTS = (1.0, 0.75, 0.5, 0.25)
SCALE = 0.6
DENSITY = 0.2
_GROWTH = 64_000_000  # bytes; more than that is growth, not noise
METHODS = {
    "linear": "linear",
    "task_arithmetic": "task arithmetic",
    "ties_tensor": "TIES, per tensor (mergekit)",
    "ties_global": "TIES, whole model (official)",
}


def make_config(method: str, paths: CheckpointSet, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the configuration of one of METHODS, in mergekit's format."""
    weights = [WEIGHTS[number % len(WEIGHTS)] for number in range(len(paths.models))]
    models: list[dict[str, Any]] = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(paths.models, weights, strict=True)
    ]
    config: dict[str, Any] = {"models": models, "dtype": dtype}
    if method == "linear":
        return {"merge_method": "linear", **config}
    config["base_model"] = str(paths.base)
    if method == "task_arithmetic":
        return {"merge_method": method, "parameters": {"lambda": SCALE}, **config}
    for model in models:
        model["parameters"]["density"] = DENSITY
    if method == "ties_global":
        for model in models:
            del model["parameters"]["weight"]
        return {"merge_method": "ties", "parameters": {"semantics": "official"}, **config}
    return {"merge_method": "ties", **config}


@dataclass(frozen=True)
class Merge:
    """One merge: its process observed from outside, and its own report."""

    method: str
    process: ProcessRun
    inside: float
    phases: dict[str, float]
    peak_anonymous: int
    input_bytes: int


def merge_once(method: str, config: Path, out: Path, threads: int | None = None) -> Merge:
    """Run `pymerge merge` and return its measurements; the output stays."""
    shutil.rmtree(out, ignore_errors=True)
    report_path = config.with_suffix(".report.json")
    command = [sys.executable, "-m", "pymerge", "merge", str(config), str(out), "--quiet"]
    command += ["--report", str(report_path)]
    if threads is not None:
        command += ["--threads", str(threads)]
    process = run_process(command)
    report = json.loads(report_path.read_text())
    if report["peak_anonymous"] < 0.8 * process.peak_anonymous:
        raise WrongResult(
            f"{method}: the report says {report['peak_anonymous'] / 1e6:.0f} MB of memory, seen "
            f"from outside were {process.peak_anonymous / 1e6:.0f} MB"
        )
    phases = {name: phase["seconds"] for name, phase in report["phases"].items()}
    read = sum(file["bytes"] for model in report["inputs"] for file in model["files"])
    peak = max(report["peak_anonymous"], process.peak_anonymous)
    return Merge(method, process, report["seconds"], phases, peak, read)


def check_output(
    method: str, out: Path, paths: CheckpointSet, thresholds: Sequence[float] | None = None
) -> None:
    """Compare an output with an independent computation.

    Args:
        method: one of METHODS.
        out: the output directory.
        paths: the merged checkpoints, with the weights of `make_config`.
        thresholds: for ties_global: the task vectors' thresholds, to check only some tensors; None
            computes them and checks all tensors.

    Raises:
        WrongResult: it is wrong.
    """
    result, base = Reader(out), Reader(paths.base)
    models = [Reader(path) for path in paths.models]
    weights = [WEIGHTS[number % len(WEIGHTS)] for number in range(len(models))]
    names = checks.sample_names(base)
    checks.check_same_names(result, base)
    if method == "linear":
        checks.check_linear(result, models, weights, names)
    elif method == "task_arithmetic":
        checks.check_task_arithmetic(result, base, models, weights, SCALE, names)
    elif method == "ties_tensor":
        checks.check_ties_tensor(result, base, models, weights, DENSITY, names)
    else:
        if thresholds is None:
            names = base.names
            thresholds = checks.official_thresholds(base, models, DENSITY)
        checks.check_ties_official(result, base, models, thresholds, names)


def check_again(
    method: str,
    out: Path,
    paths: CheckpointSet,
    digests: dict[str, str],
    thresholds: Sequence[float] | None = None,
) -> None:
    """Check a method's first output as `check_output` does; later ones must have the same bytes.

    Raises:
        WrongResult: it is wrong.
    """
    found = checks.digest(out)
    if method not in digests:
        check_output(method, out, paths, thresholds)
        digests[method] = found
    elif digests[method] != found:
        raise WrongResult(f"{method}: a repetition wrote other bytes than the first run")


def _write_configs(root: Path, paths: CheckpointSet, methods: Sequence[str]) -> dict[str, Path]:
    files = {}
    for method in methods:
        files[method] = root / f"{method}.yml"
        files[method].write_text(yaml.safe_dump(make_config(method, paths), sort_keys=False))
    return files


def _write_blocks(target: Path, nbytes: int, flags: int) -> None:
    block = mmap.mmap(-1, 16 << 20)  # starts at a page, as direct writes require
    block.write(os.urandom(1 << 16) * (len(block) >> 16))
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600)
    try:
        for _ in range(max(1, nbytes // len(block))):
            os.write(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        block.close()


def _io_floor(root: Path, paths: CheckpointSet) -> tuple[float, float]:
    """Return seconds to add up all inputs from the page cache, and to write and sync an output."""
    started = time.perf_counter()
    for directory in (paths.base, *paths.models):
        for file in directory.glob("*.safetensors"):
            size = file.stat().st_size // 8
            mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.int64)
            mapped.sum()
    read = time.perf_counter() - started
    target = root / "floor.bin"
    try:
        started = time.perf_counter()
        _write_blocks(target, paths.nbytes, getattr(os, "O_DIRECT", 0))
    except OSError:  # the file system has no direct writes
        started = time.perf_counter()
        _write_blocks(target, paths.nbytes, 0)
    write = time.perf_counter() - started
    target.unlink()
    return read, write


def _speed(
    root: Path, paths: CheckpointSet, repetitions: int
) -> tuple[Table, list[dict[str, Any]], list[float]]:
    configs = _write_configs(root, paths, list(METHODS))
    readers = Reader(paths.base), [Reader(path) for path in paths.models]
    thresholds = checks.official_thresholds(*readers, DENSITY)
    merges: dict[str, list[Merge]] = {method: [] for method in METHODS}
    floors: list[tuple[float, float]] = []
    digests: dict[str, str] = {}
    for repetition in range(repetitions):
        floors.append(_io_floor(root, paths))
        for method, config in configs.items():
            merges[method].append(merge_once(method, config, root / "out"))
            check_again(method, root / "out", paths, digests, thresholds)
        console.print(f"  repetition {repetition + 1} of {repetitions}: {_line(merges)}")
    shutil.rmtree(root / "out", ignore_errors=True)
    read, write = (statistics.median(values) for values in zip(*floors, strict=True))
    billions = paths.shape.parameters / 1e9
    title = f"Merging {len(paths.models)} models of {billions:.2f} B parameters (bf16, warm cache)"
    table = Table(
        title, ["method", "wall, s", "range", "inside, s", "CPU, s", "GB/s", "memory, MB"]
    )
    records: list[dict[str, Any]] = []
    for method, runs in merges.items():
        walls = [run.process.wall for run in runs]
        inside = statistics.median(run.inside for run in runs)
        table.add(
            METHODS[method],
            f"{statistics.median(walls):.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            f"{inside:.2f}",
            f"{statistics.median(run.process.cpu for run in runs):.2f}",
            f"{runs[0].input_bytes / inside / 1e9:.1f}",
            f"{max(run.peak_anonymous for run in runs) / 1e6:.0f}",
        )
        records += [asdict(run) for run in runs]
    table.notes = [
        f"Median of {repetitions}. Wall: with starting Python; inside: "
        "without. GB/s: bytes of the inputs per second inside (TIES reads them twice). Memory: "
        "peak of allocated (anonymous) memory.",
        f"In the same run, doing nothing else: adding up all inputs takes {read:.2f} s, writing "
        f"and syncing the output's {paths.nbytes / 1e9:.2f} GB {write:.2f} s.",
        "Every run was checked: the first against independent torch code (sampled tensors, TIES "
        "bit for bit), the others by having written the same bytes.",
    ]
    records.append({"io_floor": {"read": read, "write": write}})
    return table, records, thresholds


def _line(merges: Mapping[str, Sequence[Merge]]) -> str:
    return ", ".join(f"{method} {runs[-1].process.wall:.2f} s" for method, runs in merges.items())


def _growth(
    root: Path, paths: CheckpointSet, thresholds: Sequence[float], small: bool
) -> tuple[Table, list[dict[str, Any]]]:
    """Merge the model, twice as many models, and one twice as large; report the memory of each."""
    methods = ["linear", "task_arithmetic", "ties_tensor", "ties_global"]
    table = Table("Peak allocated memory, MB", ["inputs", *(METHODS[method] for method in methods)])
    records: list[dict[str, Any]] = []
    first: list[int] = []

    def row(
        label: str, inputs: CheckpointSet, directory: Path, thresholds: Sequence[float]
    ) -> None:
        peaks = []
        for method, config in _write_configs(directory, inputs, methods).items():
            merge = merge_once(method, config, directory / "out")
            check_output(method, directory / "out", inputs, thresholds)
            shutil.rmtree(directory / "out", ignore_errors=True)
            peaks.append(merge.peak_anonymous)
            records.append({"inputs": label, **asdict(merge)})
        first.extend([] if first else peaks)
        for method, peak, before in zip(methods, peaks, first, strict=True):
            if peak > before + _GROWTH:
                raise WrongResult(
                    f"{method}, {label}: memory grew from {before / 1e6:.0f} to {peak / 1e6:.0f} MB"
                )
        cells = [f"{peak / 1e6:.0f}" for peak in peaks]
        size = inputs.nbytes * (len(inputs.models) + 1) / 1e9
        table.add(f"{label}: {size:.1f} GB", *cells)
        console.print(f"  memory, {label}: {', '.join(cells)} MB")

    row(
        f"{len(paths.models)} models of {paths.shape.parameters / 1e9:.2f} B",
        paths,
        root,
        thresholds,
    )
    more = root / "more"
    more.mkdir()
    count = 2 * len(paths.models)
    linked = [
        checkpoints.link_checkpoint(paths.models[number % len(paths.models)], more / f"m{number}")
        for number in range(count)
    ]
    many = CheckpointSet(paths.base, tuple(linked), paths.shape, paths.nbytes)
    row(
        f"{count} models of {paths.shape.parameters / 1e9:.2f} B",
        many,
        more,
        [*thresholds, *thresholds],
    )
    large = root / "large"
    shape = checkpoints.LLAMA_SMALL_TWICE if small else checkpoints.LLAMA_114B
    large_set = checkpoints.make_checkpoints(large, shape, models=4, distinct=2)
    readers = Reader(large_set.base), [Reader(path) for path in large_set.models[:2]]
    own = checks.official_thresholds(*readers, DENSITY)  # the other two models are links to these
    row(f"4 models of {shape.parameters / 1e9:.2f} B", large_set, large, [*own, *own])
    shutil.rmtree(large)
    table.notes = [
        "Inputs are memory-mapped and belong to the page cache; they are not counted. In the "
        "larger sets some models are hard links to others. Differences are blocks of 16 MiB that "
        "wait to be written, as many as timing asks for. The benchmark fails where a larger set "
        "takes more "
        f"than {_GROWTH / 1e6:.0f} MB above the first."
    ]
    return table, records


def _check_whole_model(root: Path) -> None:
    """Compare every tensor of a small merge with the official algorithm."""
    paths = checkpoints.make_checkpoints(root, checkpoints.LLAMA_TINY)
    config = _write_configs(root, paths, ["ties_global"])["ties_global"]
    merge_once("ties_global", config, root / "out")
    check_output("ties_global", root / "out", paths)


def run(options: argparse.Namespace) -> dict[str, Table]:
    """Measure, show and save."""
    shape = checkpoints.LLAMA_SMALL if options.small else checkpoints.LLAMA_057B
    nbytes = shape.parameters * 2
    with checkpoints.workspace(int(nbytes * 14), keep=options.keep) as root:
        (root / "tiny").mkdir()
        _check_whole_model(root / "tiny")
        console.print(f"engine: making checkpoints in {root}")
        inputs = root / "inputs"
        paths = checkpoints.make_checkpoints(inputs, shape)
        checkpoints.warm(paths)
        speed, records, thresholds = _speed(inputs, paths, options.repetitions)
        made = {"engine": speed}
        speed.show()
        if not options.no_growth:
            growth, more = _growth(inputs, paths, thresholds, options.small)
            growth.show()
            made["memory"] = growth
            records += more
    save("engine", made, records, options.results)
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    group = parser.add_argument_group("engine")
    group.add_argument("--small", action="store_true", help="small models, for a quick look")
    group.add_argument("--repetitions", type=int, default=3, help="of each merge (default 3)")
    group.add_argument("--no-growth", action="store_true", help="leave the proof of memory out")
    group.add_argument("--keep", action="store_true", help="keep the checkpoints")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    from benchmarks.run import parser

    made = parser(__doc__ or "")
    add_options(made)
    run(made.parse_args(arguments))


if __name__ == "__main__":
    main()
