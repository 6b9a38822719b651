"""Side by side with mergekit: the same checkpoints, the same configurations, in one run.

mergekit runs from its own environment: PYMERGE_PEERS_PYTHON, or `.venv-peers`, which
`make bench-peers` sets up. Repetitions of pymerge run before and after mergekit's run, which for
TIES takes minutes. Outputs are compared, and pymerge's is checked, before a number is shown.

    python -m benchmarks.peers --small --skip-ties
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import checkpoints, checks
from benchmarks.checkpoints import CheckpointSet
from benchmarks.checks import Reader
from benchmarks.engine import METHODS, Merge, check_again, make_config, merge_once
from benchmarks.measure import ProcessRun, WrongResult, in_threads, run_process
from benchmarks.tables import Table, console, save

__all__ = ["Agreement", "compare", "find_peer", "run"]

_PEER_METHODS = ("linear", "task_arithmetic", "ties_tensor")
_TILE = 1 << 18
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def find_peer() -> tuple[Path, str]:
    """Return the Python that has mergekit, and mergekit's version.

    Raises:
        RuntimeError: there is none, or it does not work.
    """
    root = Path(__file__).resolve().parent.parent
    named = os.environ.get("PYMERGE_PEERS_PYTHON")
    python = Path(named) if named else root / ".venv-peers" / "bin" / "python"
    if not python.is_file():
        raise RuntimeError(
            f"no mergekit: {python} does not exist. `make bench-peers` sets it up; "
            "PYMERGE_PEERS_PYTHON names another Python that has it"
        )
    code = "from importlib.metadata import version; print(version('mergekit'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise RuntimeError(f"{python} has no mergekit: {found.stderr.strip()}")
    return python, found.stdout.strip()


def run_mergekit(python: Path, config: Path, out: Path) -> ProcessRun:
    """Merge with mergekit's own command on the CPU, with its default options."""
    shutil.rmtree(out, ignore_errors=True)
    code = "from mergekit.scripts.run_yaml import main; main()"
    return run_process([str(python), "-c", code, str(config), str(out), "--quiet"], _OFFLINE)


@dataclass(frozen=True)
class Agreement:
    """How far two checkpoints agree: equal elements (bit for bit) of all, largest difference."""

    tensors: int
    elements: int
    equal: int
    largest: float

    @property
    def share(self) -> float:
        return self.equal / max(1, self.elements)


def compare(first: Path, second: Path) -> Agreement:
    """Compare two checkpoint directories tensor by tensor.

    Raises:
        WrongResult: their tensors differ in name, dtype or length.
    """
    left, right = Reader(first), Reader(second)
    checks.check_same_names(left, right)

    def tensor(name: str) -> tuple[int, int, float]:
        a, b = left.get(name), right.get(name)
        if a.dtype != b.dtype or a.numel() != b.numel():
            raise WrongResult(f"{name}: {a.dtype}[{a.numel()}] and {b.dtype}[{b.numel()}]")
        unequal, largest = 0, 0.0
        for x, y in zip(a.split(_TILE), b.split(_TILE), strict=True):
            unequal += int(torch.count_nonzero(x != y))
            largest = max(largest, float(x.float().sub_(y.float()).abs_().max()))
        return a.numel(), a.numel() - unequal, largest

    elements, equal, largest = zip(*in_threads(tensor, left.names), strict=True)
    return Agreement(len(left.names), sum(elements), sum(equal), max(largest))


def _write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _agreement_float32(root: Path, python: Path) -> tuple[Table, list[dict[str, Any]]]:
    """Merge small float32 models with distinct magnitudes on both sides; they must agree.

    Raises:
        WrongResult: linear differs by more than 1e-6, or another method in any element.
    """
    paths = checkpoints.make_distinct_checkpoints(root, checkpoints.LLAMA_TINY)
    table = Table(
        "Agreement with mergekit, dtype: float32", ["method", "equal", "largest difference"]
    )
    records = []
    for method in _PEER_METHODS:
        config = _write_config(root / f"{method}.yml", make_config(method, paths, "float32"))
        merge_once(method, config, root / "out")
        run_mergekit(python, config, root / "out-mergekit")
        found = compare(root / "out", root / "out-mergekit")
        if found.largest > 1e-6 or (method != "linear" and found.equal != found.elements):
            raise WrongResult(
                f"{method}, float32: {found.elements - found.equal} of {found.elements} elements "
                f"differ from mergekit's, by up to {found.largest:.2g}"
            )
        table.add(METHODS[method], f"{found.share:.2%}", f"{found.largest:.2g}")
        records.append({"agreement": "float32", "method": method, **asdict(found)})
    table.notes = [
        f"{paths.shape.parameters:,} parameters, deltas of distinct magnitudes, the same files."
    ]
    return table, records


def _measure(
    root: Path, paths: CheckpointSet, python: Path, method: str, repetitions: int
) -> tuple[list[Merge], ProcessRun, Agreement]:
    config = _write_config(root / f"{method}.yml", make_config(method, paths))
    digests: dict[str, str] = {}

    def merge() -> Merge:
        done = merge_once(method, config, root / "out")
        check_again(method, root / "out", paths, digests)
        return done

    ours = [merge() for _ in range(repetitions - repetitions // 2)]
    console.print(
        f"  {method}: pymerge {ours[-1].process.wall:.2f} s; mergekit...", highlight=False
    )
    theirs = run_mergekit(python, config, root / "out-mergekit")
    ours += [merge() for _ in range(repetitions // 2)]
    found = compare(root / "out", root / "out-mergekit")
    console.print(
        f"  {method}: mergekit {theirs.wall:.1f} s, pymerge {ours[-1].process.wall:.2f} s",
        highlight=False,
    )
    return ours, theirs, found


def run(options: argparse.Namespace) -> dict[str, Table]:
    """Measure, compare, show and save."""
    python, version = find_peer()
    shape = checkpoints.LLAMA_SMALL if options.small else checkpoints.LLAMA_057B
    methods = [m for m in _PEER_METHODS if not (options.skip_ties and m.startswith("ties"))]
    columns = ["method", "mergekit", "pymerge", "faster", "CPU seconds", "memory, MB", "equal"]
    billions = shape.parameters / 1e9
    title = f"pymerge and mergekit {version}, 4 models of {billions:.2f} B parameters, wall seconds"
    table = Table(title, columns)
    records: list[dict[str, Any]] = []
    with checkpoints.workspace(shape.parameters * 2 * 8, keep=options.keep) as root:
        (root / "float32").mkdir()
        agreement, records = _agreement_float32(root / "float32", python)
        agreement.show()
        console.print(f"peers: making checkpoints in {root}")
        paths = checkpoints.make_checkpoints(root / "inputs", shape)
        checkpoints.warm(paths)
        for method in methods:
            ours, theirs, found = _measure(
                root / "inputs", paths, python, method, options.repetitions
            )
            wall = statistics.median(merge.process.wall for merge in ours)
            seconds = statistics.median(merge.process.cpu for merge in ours)
            peak = max(merge.peak_anonymous for merge in ours)
            resident = max(merge.process.peak_resident for merge in ours)
            table.add(
                METHODS[method],
                f"{theirs.wall:.1f}",
                f"{wall:.2f}",
                f"{theirs.wall / wall:.1f}x",
                f"{theirs.cpu:.1f} / {seconds:.2f}",
                f"{theirs.peak_anonymous / 1e6:.0f} / {peak / 1e6:.0f}",
                f"{found.share:.3%}",
            )
            records.append(
                {
                    "method": method,
                    "mergekit": asdict(theirs),
                    "pymerge": [asdict(merge) for merge in ours],
                    "pymerge_peak_resident": resident,
                    "agreement": asdict(found),
                }
            )
    table.notes = [
        f"mergekit once, pymerge the median of {options.repetitions} runs around it; interpreter "
        "start included on both sides, warm page cache, mergekit's default options on the CPU.",
        "CPU seconds and memory: mergekit / pymerge. Memory: peak of allocated (anonymous) memory, "
        "without mapped files.",
        "Equal: share of equal bf16 elements of the two outputs. pymerge computes in float32 and "
        "rounds once; mergekit computes task arithmetic and TIES in bf16. With dtype: float32 they "
        "agree (the table of agreement).",
    ]
    made = {"peers": table, "agreement": agreement}
    table.show()
    save("peers", made, records, options.results)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison from the command line."""
    from benchmarks.run import parser

    made = parser(__doc__ or "")
    made.add_argument("--small", action="store_true", help="small models, for a quick look")
    made.add_argument("--skip-ties", action="store_true", help="leave out TIES (4 minutes)")
    made.add_argument("--repetitions", type=int, default=5, help="of pymerge (default 5)")
    made.add_argument("--keep", action="store_true", help="keep the checkpoints")
    torch.set_grad_enabled(False)
    run(made.parse_args(arguments))


if __name__ == "__main__":
    main()
