"""Benchmark of PCB-Merging, compared with the authors' algorithm in torch: time, memory, agreement.

`official` below computes what pcb-merging.py (duguodong7/pcb-merging, 5897888) computes, rewritten
from its formulas: whole task vectors in memory, sorted for every quantile. Both sides run in
separate processes, in turns, on the same vectors in bfloat16; results are compared before a number
is shown.

    python -m benchmarks.pcb [--numel 16Mi] [--models 4] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import WrongResult, run_process
from benchmarks.run import parser
from benchmarks.tables import Table, console, save

__all__ = ["main", "official"]

RATIO = 0.1
_CLIP = 1e-4
_SIDES = {"official": "authors' algorithm, torch", "pymerge": "pymerge, variant root"}


def make_inputs(numel: int, models: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models whose task vectors are normal, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(numel, generator=generator) * 0.02).bfloat16()

    def tuned() -> torch.Tensor:
        return (base + torch.randn(numel, generator=generator) * 1e-3).bfloat16()

    return base, [tuned() for _ in range(models)]


def _minmax(rows: torch.Tensor) -> torch.Tensor:
    least, most = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    return (rows - least) / (most - least)


def _clipped(rows: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clip each row to two of its order statistics."""
    ordered = rows.sort(dim=1).values
    size = rows.shape[1]
    bottom, top = ordered[:, int(size * low)], ordered[:, int(size * (1 - high) - 1)]
    return rows.clamp(bottom.unsqueeze(1), top.unsqueeze(1))


def official(base: torch.Tensor, models: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the authors' merge (pcb-merging.py) in float32."""
    origin = base.float()
    taus = torch.stack([model.float() - origin for model in models])
    magnitudes = _clipped(taus.abs(), _CLIP, _CLIP)
    clipped = taus.sign() * magnitudes
    intra = torch.exp(len(models) * _minmax(magnitudes) ** 2)
    inter = torch.tanh(taus * taus.sum(dim=0))
    scores = _minmax(_clipped(intra * inter, 1 - RATIO, 0.0))
    merged = (clipped * scores).sum(dim=0) / scores.sum(dim=0).clamp(min=1e-12)
    return origin + merged


def _side(side: str, numel: int, models: int, out: Path) -> None:
    """Merge once, in a separate process; store the seconds and the result."""
    base, tuned = make_inputs(numel, models)
    if side == "official":
        begin = time.perf_counter()
        merged = official(base, tuned)
        seconds = time.perf_counter() - begin
    else:
        import pymerge

        # Load everything that is loaded at first use, so that it is not timed.
        pymerge.pcb_merge(base[:4096], [model[:4096] for model in tuned], variant="root")
        begin = time.perf_counter()
        merged = pymerge.pcb_merge(
            base, tuned, variant="root", ratio=RATIO, dtype=torch.float32, backend="cpu"
        )
        seconds = time.perf_counter() - begin
    torch.save(merged, out / f"{side}.pt")
    (out / f"{side}.json").write_text(json.dumps({"seconds": seconds}))


def _check(out: Path) -> float:
    """Return the largest difference, as a share of the largest change."""
    first, second = (torch.load(out / f"{side}.pt", weights_only=True) for side in _SIDES)
    apart = (first - second).abs()
    # Elements next to a threshold may be kept by one side and not by the other.
    share = float((apart > 1e-6).float().mean())
    if share > 1e-5:
        raise WrongResult(f"pcb: {share:.2%} of the elements differ by more than 1e-6")
    return share


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both sides in turns and show them."""
    made = parser(__doc__ or "")
    made.add_argument("--numel", type=int, default=16 << 20, help="elements of a task vector")
    made.add_argument("--models", type=int, default=4)
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--side", choices=list(_SIDES), help=argparse.SUPPRESS)
    made.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    if options.side:
        _side(options.side, options.numel, options.models, options.out)
        return
    size = options.numel, options.models
    with tempfile.TemporaryDirectory(prefix="pymerge-pcb-") as folder:
        out = Path(folder)
        command = [sys.executable, "-m", "benchmarks.pcb", "--out", str(out)]
        command += ["--numel", str(size[0]), "--models", str(size[1]), "--side"]
        seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
        memory: dict[str, int] = dict.fromkeys(_SIDES, 0)
        apart = 0.0
        for turn in range(options.repetitions):
            for side in _SIDES:
                console.print(f"  {turn + 1} of {options.repetitions}: {_SIDES[side]}", style="dim")
                process = run_process([*command, side])
                seconds[side].append(json.loads((out / f"{side}.json").read_text())["seconds"])
                memory[side] = max(memory[side], process.peak_anonymous)
            apart = max(apart, _check(out))
        inputs = (size[1] + 1) * size[0] * 2
        title = f"PCB-Merging, {size[0] / 2**20:.0f} Mi parameters, K = {size[1]}, bf16 inputs"
        table = Table(title, ["", "seconds", "ratio", "peak memory, GB"])
        median = {side: statistics.median(values) for side, values in seconds.items()}
        for side, name in _SIDES.items():
            ratio = median["official"] / median[side]
            table.add(name, f"{median[side]:.2f}", f"{ratio:.1f}x", f"{memory[side] / 1e9:.2f}")
        table.notes.append(
            f"Whole scope, ratio {RATIO}, tensors in memory, 2 threads, medians of "
            f"{options.repetitions} in turns. Peak memory is that of the process, torch, the "
            f"inputs ({inputs / 1e9:.2f} GB) and the result ({size[0] * 4 / 1e9:.2f} GB) included."
        )
        table.notes.append(
            f"All but {apart:.1e} of the elements agree within 1e-6: the others' scores are next "
            "to the threshold."
        )
        table.show()
        records = [
            {"side": side, "seconds": seconds[side], "peak_anonymous": memory[side]}
            for side in _SIDES
        ]
        save("pcb", {"pcb": table}, records, options.results)


if __name__ == "__main__":
    main()
