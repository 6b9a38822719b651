"""Benchmark of repeated merging: the merges of a search, in which only coefficients change.

For each method it times writing a merge (`merge_checkpoints`, which a search would call if nothing
were kept), the first merge in memory, and the following merges, with other weights and with another
density or ratio. All run in turns, in one process, with inputs in the page cache. A timed merge is
compared bit for bit with the one written for the same configuration. Last, it shows why task
vectors are not kept: task arithmetic of checkpoints in memory and of their float32 task vectors.

    python -m benchmarks.search [--repetitions 5] [--quick]
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.checkpoints import (
    LLAMA_SMALL,
    CheckpointSet,
    LlamaShape,
    make_checkpoints,
    warm,
    workspace,
)
from benchmarks.measure import WrongResult
from benchmarks.run import parser
from benchmarks.tables import Table, console, save
from pymerge import merge_checkpoints
from pymerge.ops import contract as contract  # declares the ops
from pymerge.search import Merged, Remerger

__all__ = ["main"]

_MEDIUM = LlamaShape(1024, 2816, 8, 16000, 16, 4)

# label, method, parameters, what else may change
_CASES: tuple[tuple[str, str, dict[str, Any], dict[str, Any] | None], ...] = (
    ("linear", "linear", {}, None),
    ("task arithmetic", "task_arithmetic", {"lambda": 0.4}, None),
    ("TIES, per tensor (mergekit)", "ties", {"density": 0.2}, {"density": 0.3}),
    (
        "TIES, whole model (official)",
        "ties",
        {"semantics": "official", "density": 0.2},
        {"density": 0.3},
    ),
    ("PCB, paper", "pcb", {"ratio": 0.1}, {"ratio": 0.2}),
    ("PCB, code (root)", "pcb", {"variant": "root", "ratio": 0.1}, {"ratio": 0.2}),
    ("multislerp", "multislerp", {}, None),
)


def _config(
    inputs: CheckpointSet, method: str, parameters: dict[str, Any], step: int
) -> dict[str, Any]:
    """Return a merge whose weights are those of a step of a search."""
    models = [
        {"model": str(path), "parameters": {"weight": 0.5 + 0.125 * ((step + number) % 5)}}
        for number, path in enumerate(inputs.models)
    ]
    made = {"merge_method": method, "models": models, "parameters": parameters}
    if method != "linear":
        made["base_model"] = str(inputs.base)
    return made


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Return wall seconds, and CPU seconds of all threads, which other programs affect less."""
    started, used = time.perf_counter(), time.process_time()
    function(*arguments)
    return time.perf_counter() - started, time.process_time() - used


def _check(label: str, merged: Merged, written: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    for path in written.glob("*.safetensors"):
        found |= load_file(path)
    if sorted(found) != sorted(merged.tensors):
        raise WrongResult(f"{label}: other tensors than a fresh merge writes")
    for name, tensor in found.items():
        # compared as bytes: 0 is not -0
        ours = merged.tensors[name].view(torch.uint8)
        if not torch.equal(ours, tensor.view(torch.uint8)):
            raise WrongResult(f"{label}: {name} differs from a fresh merge")


def _measure(
    case: tuple[str, str, dict[str, Any], dict[str, Any] | None],
    inputs: CheckpointSet,
    root: Path,
    repetitions: int,
) -> dict[str, Any]:
    label, method, parameters, change = case
    kinds = ("written", "first", "weights", "other")
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    out = root / "out"
    with Remerger(_config(inputs, method, parameters, 0)) as kept:
        merged = kept.merge()  # memory is first touched here
        for turn in range(repetitions):
            config = _config(inputs, method, parameters, 1 + turn)
            shutil.rmtree(out, ignore_errors=True)
            seconds["written"].append(_timed(merge_checkpoints, config, out))
            with Remerger(config) as fresh:
                memory = fresh.memory_for()
                for tensor in memory.tensors.values():
                    tensor.view(torch.uint8).zero_()
                seconds["first"].append(_timed(fresh.merge, config, memory))
            _check(label, memory, out)
            seconds["weights"].append(_timed(kept.merge, config, merged))
            _check(label, merged, out)
            if change is None:
                continue
            # one not seen before
            name, value = next(iter(change.items()))
            other = {**parameters, name: value + 0.01 * turn}
            config = _config(inputs, method, other, 1 + turn)
            seconds["other"].append(_timed(kept.merge, config, merged))
            shutil.rmtree(out)
            merge_checkpoints(config, out)
            _check(label, merged, out)
    return {"label": label, "method": method, "parameters": parameters, "seconds": seconds}


def _kept_vectors(repetitions: int, elements: int, models: int) -> dict[str, Any]:
    """Time task arithmetic of bf16 models, and of task vectors kept in float32."""
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(elements, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    origin = base.float()
    tuned = [
        (origin + torch.empty_like(origin).normal_(0, 1e-3, generator=generator)).bfloat16()
        for _ in range(models)
    ]
    vectors = [model.float() - origin for model in tuned]
    weights = [0.1 * (1 + number) for number in range(models)]
    formed, kept = torch.empty_like(base), torch.empty_like(base)

    def form() -> None:
        stats = torch.zeros(3, dtype=torch.int64)
        torch.ops.pymerge.task_arithmetic_(formed, stats, base, tuned, weights, 1.0, 1.0)

    def keep() -> None:
        stats = torch.zeros(3, dtype=torch.int64)
        torch.ops.pymerge.weighted_sum_(kept, stats, [origin, *vectors], [1.0, *weights], 1.0)

    seconds: dict[str, list[float]] = {"formed": [], "kept": []}
    for turn in range(repetitions + 1):
        for key, function in (("formed", form), ("kept", keep)):
            took, _ = _timed(function)
            if turn:  # memory is first touched before
                seconds[key].append(took)
    # sums begin at the base in one case and end at it in the other, so roundings differ
    near = torch.allclose(kept.float(), formed.float(), rtol=2**-7, atol=1e-5)
    if not near:
        raise WrongResult("task vectors that were kept give another merge")
    return {"label": "task vectors kept", "elements": elements, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show and save."""
    made = parser(__doc__ or "")
    made.add_argument("--models", type=int, default=4)
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--quick", action="store_true", help="small models: a trial of the program")
    options = made.parse_args(arguments)
    shape = LLAMA_SMALL if options.quick else _MEDIUM
    size = shape.parameters * 2
    records = []
    with workspace(size * (options.models + 4)) as root:
        inputs = make_checkpoints(root, shape, models=options.models)
        warm(inputs)
        for case in _CASES:
            console.print(f"  {case[0]}", style="dim")
            records.append(_measure(case, inputs, root, options.repetitions))
    kept = _kept_vectors(options.repetitions, shape.parameters, options.models)
    millions = shape.parameters / 1e6
    table = Table(
        f"Merging again, {options.models} models of {millions:.0f} M parameters, bf16, CPU seconds",
        ["method", "written", "first", "other weights", "of first", "other density", "of first"],
    )
    for record in records:
        median = {
            key: statistics.median(used for _, used in values)
            for key, values in record["seconds"].items()
            if values
        }
        cells = [f"{median[key]:.3f}" for key in ("written", "first", "weights")]
        cells.append(f"{median['weights'] / median['first']:.0%}")
        if "other" in median:
            cells += [f"{median['other']:.3f}", f"{median['other'] / median['first']:.0%}"]
        else:
            cells += ["", ""]
        table.add(record["label"], *cells)
    table.notes += [
        "Written: merge_checkpoints, with planning and a file. First: in memory, files opened. "
        "Other density: one not seen before; of PCB, the ratio.",
        f"CPU seconds of all threads, medians of {options.repetitions} in turns; wall seconds are "
        "in the results' JSON. Every merge that was timed was equal, bit for bit, to what "
        "merge_checkpoints writes for its configuration.",
    ]
    formed, other = (statistics.median(kept["seconds"][key]) for key in ("formed", "kept"))
    table.notes.append(
        "Task vectors kept in float32 would not help: their weighted sum takes "
        f"{other / formed:.1f} times as long as that of the bf16 checkpoints ({other * 1e3:.0f} "
        f"and {formed * 1e3:.0f} ms of wall time), and they take twice the memory."
    )
    records.append(kept)
    table.show()
    save("search", {"search": table}, records, options.results)


if __name__ == "__main__":
    main()
