"""Benchmark of the CPU kernels: data in memory, bf16, K = 4, every instruction set that runs here.

Each row of the case table (tests/cases.py) is timed in turns with a loop that reads the same
arrays, writes the same output and computes nothing. What was timed is compared with the reference
before its number is shown.

    python -m benchmarks.kernels --elements 8Mi --cases linear,ties_mean
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
from benchmarks.eager import EAGER
from benchmarks.kernel_checks import (
    MODELS,
    Expected,
    arguments_of,
    check,
    check_floor,
    expect,
    make_arrays,
)
from benchmarks.kernel_tables import (
    GATHERING_CASES,
    METHOD_CASES,
    Measurement,
    methods_table,
    tables,
)
from benchmarks.measure import Timing, WrongResult, interleave
from benchmarks.tables import Table, console, save
from pymerge.byte_sizes import parse_size
from pymerge.ops.native import marshal as cpu
from tests.case import Case, Inputs
from tests.cases import CASES

__all__ = ["DEFAULT_CASES", "measure_case", "run"]

DEFAULT_CASES = (
    "linear",
    "task_arithmetic",
    "ties_mean",
    "ties_mergekit",
    "ties_mean_signs",
    "ties_signs",
    "magnitude_histogram",
    "magnitude_equal_counts",
)
# Elements for each thread that are worth a thread and stay in its core's cache.
_CACHED = 1 << 16


def packed_bytes(arguments: dict[str, Any]) -> int:
    """Return the bytes that a kernel reads of trimmed task vectors, base and gradient."""
    whole = [arguments[name] for name in ("base", "gradient") if name in arguments]
    parts = [one for name in ("masks", "values", "offsets") for one in arguments[name]]
    return sum(tensor.nbytes for tensor in (*whole, *parts))


def measure_case(
    case: Case,
    inputs: Inputs,
    isas: Sequence[str],
    thread_counts: Sequence[int],
    *,
    seconds: float = 1.0,
    eager: bool = True,
) -> list[Measurement]:
    """Time one case on each instruction set and number of threads, and check what was timed.

    Raises:
        WrongResult: a kernel, the streaming loop or plain torch gave something wrong.
    """
    base, models = inputs
    arguments = arguments_of(case, inputs)
    expected = expect(case, inputs, arguments)
    outputs = case.outputs(base, models, base.dtype)
    if "counts" in outputs and outputs["counts"].dim() == 3:
        shape = (max(2, *thread_counts), *outputs["counts"].shape[1:])
        outputs["counts"] = outputs["counts"].new_zeros(shape)
    out = outputs["out"] if case.streams_out else torch.empty_like(base)
    floor_base = arguments.get("base")
    # The loop reads whole models where the kernel reads what they keep.
    floor_models = arguments.get("models", models)
    if "model" in arguments:
        floor_models = [arguments["model"]]
    read = [*floor_models, *([] if floor_base is None else [floor_base])]
    read_bytes = sum(tensor.nbytes for tensor in read)
    nbytes = packed_bytes(arguments) if "masks" in arguments else read_bytes
    nbytes += out.nbytes if case.streams_out else 0
    # Ranks are read, or written, beside them.
    nbytes += sum(t.nbytes for t in (arguments.get("ranks"), outputs.get("ranks")) if t is not None)
    op = getattr(torch.ops.pymerge, case.op)

    def kernel() -> None:
        cpu.use_isa(isa)
        for name in outputs.keys() - {"out", "table"}:  # a table is read, too
            outputs[name].zero_()
        op(**outputs, **arguments, backend="cpu")

    def floor() -> None:
        cpu.use_isa(isas[-1])
        cpu.streaming_floor(out, floor_base, floor_models, threads)

    results = []
    with _settings_kept():
        for threads in thread_counts:
            cpu.set_threads(threads)
            torch.set_num_threads(threads)
            eager_seconds = None
            if eager and case.name in EAGER and threads == max(thread_counts):
                eager_seconds = _time_eager(case.name, arguments, expected).median
            for isa in isas:
                # The kernel comes last: the output then holds its result over the loop's.
                times = interleave({"floor": floor, "kernel": kernel}, seconds=seconds)
                label = f"{case.name} on {isa}, {threads} threads"
                check(label, expected, outputs, base.numel())
                floor()
                check_floor(out, read)
                # Each call beside the loop just before it: what slows both leaves the ratio alone.
                pairs = zip(times["floor"].seconds, times["kernel"].seconds, strict=True)
                ratio = statistics.median(before / after for before, after in pairs)
                results.append(
                    Measurement(
                        case.name,
                        isa,
                        threads,
                        base.numel(),
                        nbytes,
                        times["kernel"].median,
                        times["kernel"].spread,
                        len(times["kernel"].seconds),
                        times["floor"].median,
                        ratio * nbytes / (read_bytes + out.nbytes),
                        eager_seconds,
                    )
                )
    return results


def vector_scaling(inputs: Inputs, isa: str, threads: int) -> float:
    """Return how many times the vector work of one thread so many threads do together.

    Measured with a kernel that computes and whose data stay in the cache, at twice the elements
    for twice the threads. Cores that are two threads of one real core share its vector units: 1.0.
    """
    case = next(case for case in CASES if case.name == "pcb_vision_es")

    def work(count: int) -> Callable[[], object]:
        part = (inputs[0][:count], [model[:count] for model in inputs[1]])
        arguments = arguments_of(case, part)
        outputs = case.outputs(part[0], part[1], part[0].dtype)
        op = getattr(torch.ops.pymerge, case.op)

        def call() -> None:
            cpu.set_threads(max(1, count // _CACHED))
            op(**outputs, **arguments, backend="cpu")

        return call

    with _settings_kept():
        cpu.use_isa(isa)
        functions = {"one": work(_CACHED), "all": work(threads * _CACHED)}
        times = interleave(functions, seconds=0.5, most=200)
    pairs = zip(times["one"].seconds, times["all"].seconds, strict=True)
    return threads * statistics.median(one / both for one, both in pairs)


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Put threads and instruction set back at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        cpu.use_isa(os.environ.get("PYMERGE_CPU_ISA") or "auto")
        cpu.set_threads(None)


def _time_eager(name: str, arguments: dict[str, Any], expected: Expected) -> Timing:
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept[:] = [EAGER[name](arguments)]

    timing = interleave({"eager": call}, seconds=0.0, least=3)["eager"]
    for start, values in expected.stretches:
        found = kept[0][start : start + values.numel()]
        if found.dtype != values.dtype or not torch.allclose(found, values, rtol=2**-7, atol=1e-6):
            raise WrongResult(f"{name}: plain torch computes something else")
    return timing


def run(options: argparse.Namespace) -> dict[str, Table]:
    """Measure, show and save."""
    reason = cpu.reason()
    if reason is not None:
        raise RuntimeError(f"backend cpu: {reason}")
    names = [case.name for case in CASES] if options.cases == "all" else options.cases.split(",")
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--cases: unknown {', '.join(unknown)}; known: all, {', '.join(known)}")
    isas = options.isa.split(",") if options.isa else cpu.supported_isas()
    thread_counts = sorted({1, options.threads or cpu.threads()})
    console.print(f"kernels: making {MODELS + 1} arrays of {options.elements:,} elements")
    inputs = make_arrays(options.elements)
    measurements: list[Measurement] = []
    for name in names:
        measurements += measure_case(
            known[name],
            inputs,
            isas,
            thread_counts,
            seconds=options.seconds,
            eager=not options.no_eager,
        )
        last = measurements[-1]
        console.print(
            f"  {name}: {last.rate / 1e9:.1f} GB/s, {last.share:.0%} of streaming "
            f"({last.isa}, {last.threads} threads)",
            highlight=False,
        )
    scaling = 1.0
    if thread_counts[-1] > 1:
        scaling = vector_scaling(inputs, isas[-1], thread_counts[-1])
    made = tables(measurements, scaling)
    made["kernels-all"].show()
    if options.cases == ",".join(DEFAULT_CASES):
        measured: dict[str, Measurement] = {}
        for name, case in (METHOD_CASES | GATHERING_CASES).items():
            settings = {"seconds": options.seconds, "eager": False}
            (found,) = measure_case(known[case], inputs, isas[-1:], thread_counts[-1:], **settings)
            measured[name] = found
            console.print(f"  {name}: {found.share:.0%} of streaming", highlight=False)
        made["methods"] = methods_table(measured, isas[-1], thread_counts[-1])
        made["methods"].show()
        measurements += measured.values()
    save("kernels", made, [asdict(m) for m in measurements], options.results)
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    group = parser.add_argument_group("kernels")
    group.add_argument(
        "--elements",
        type=lambda text: parse_size(text.removesuffix("B") + "B", "elements"),
        default=64 << 20,
        metavar="N",
        help="elements of each array (default 64Mi)",
    )
    group.add_argument("--cases", default=",".join(DEFAULT_CASES), help="rows, or 'all'")
    group.add_argument("--isa", default="", help="instruction sets (default: all that run here)")
    group.add_argument("--threads", type=int, help="besides 1 (default: all cores)")
    group.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    group.add_argument("--no-eager", action="store_true", help="leave plain torch out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    from benchmarks.run import parser

    made = parser(__doc__ or "")
    add_options(made)
    run(made.parse_args(arguments))


if __name__ == "__main__":
    main()
