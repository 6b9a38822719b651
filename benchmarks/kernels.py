"""Benchmark of the CPU kernels: data in memory, bf16, K = 4, every instruction set that runs here.

Each row of the case table (tests/cases.py) is timed in turns with a loop that reads the same
arrays, writes the same output and computes nothing. What was timed is compared with the reference
before its number is shown.

    python -m benchmarks.kernels --elements 8Mi --cases linear,ties_mean
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import pymerge._ops  # noqa: F401  declares torch.ops.pymerge
from benchmarks.eager import EAGER
from benchmarks.measure import Timing, WrongResult, interleave
from benchmarks.tables import Table, console, save
from pymerge.backends import cpu
from pymerge.backends.reference import HOT_CHUNK
from pymerge.methods import METHODS
from pymerge.sizes import parse_size
from tests.case import Case, Inputs
from tests.case_sums import CHUNK
from tests.cases import CASES
from tests.packing import CHUNK as PACKED_CHUNK
from tests.packing import part_of

__all__ = ["DEFAULT_CASES", "Measurement", "measure_case", "run", "tables"]

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
# The kernel that writes what each method merges, its statistics given; and what gathers these.
METHOD_CASES = {
    "linear": "linear",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties_mean",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs_ties",
    "breadcrumbs, by rows": "breadcrumbs_rows",
    "della": "della",
    "della_linear": "della_linear",
    "sce": "sce",
    "sce, mask everywhere": "sce_everywhere",
    "emr": "emr",
    "emr, one task": "emr_task",
    "tall_masks": "tall",
    "consensus_ta": "consensus",
    "magmax": "magmax",
    "ram": "ram",
    "nearswap": "nearswap",
    "model_stock, by rows": "row_task_arithmetic",
    "pcb, paper": "pcb_paper",
    "pcb, root and nlp": "pcb_root",
    "pcb, vision": "pcb_vision",
    "pcb, vision_es": "pcb_vision_es",
}
GATHERING_CASES = {
    "histogram of magnitudes": "magnitude_histogram",
    "Gram matrix": "sums_gram.deltas",
    "gradient times task vectors": "sums_dots",
    "least, largest, L1, L2": "sums_statistics",
    "ranks in rows": "row_ranks",
    "an analysis, three densities, some magnitudes": "compare.3.sampled",
    "an analysis, no densities, all magnitudes": "compare.0",
}
MODELS = 4
# Elements for each thread that are worth a thread and stay in its core's cache.
_CACHED = 1 << 16
STRETCHES, STRETCH = 64, 4096
# Elements that the reference works on at once: whole chunks, of 1000 and of 65536 elements, that
# the magnitude kernels count separately.
_TILE = math.lcm(CHUNK, HOT_CHUNK)
_SAMPLE = 1 << 20  # elements made at once, and those that thresholds are taken from


def make_arrays(elements: int, seed: int = 0) -> Inputs:
    """Return a bf16 base (deviation 0.02) and four models (deltas of deviation 0.001)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.empty(elements, dtype=torch.bfloat16)
    models = [torch.empty_like(base) for _ in range(MODELS)]
    for start in range(0, elements, _SAMPLE):
        stop = min(start + _SAMPLE, elements)
        base[start:stop] = torch.randn(stop - start, generator=generator) * 0.02
        origin = base[start:stop].float()
        for model in models:
            model[start:stop] = origin + torch.randn(stop - start, generator=generator) * 1e-3
    return base, models


def arguments_of(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Return the case's arguments over the whole arrays, with thresholds from their first part."""
    base, models = inputs
    if case.op.startswith("packed"):  # nothing in them is taken from a sample
        return case.arguments(base, models)
    arguments = case.arguments(base[:_SAMPLE], [model[:_SAMPLE] for model in models])
    whole: dict[str, Any] = {"base": base, "model": models[0]}
    # Some take one model, and dot products a gradient more.
    whole["models"] = (models * 2)[: len(arguments.get("models", ()))]
    if arguments.get("base", base) is None:
        whole["base"] = None
    repeats = max(1, base.numel() // _SAMPLE)
    if arguments.get("ranks") is not None:  # [models, elements]
        whole["ranks"] = arguments["ranks"].repeat(1, repeats)
    if isinstance(arguments.get("weights"), torch.Tensor):  # [models, rows]
        whole["weights"] = arguments["weights"].repeat(1, repeats)
    if "divergences" in arguments:  # [rows]
        whole["divergences"] = arguments["divergences"].repeat(repeats)
    return {name: whole.get(name, value) for name, value in arguments.items()}


def _part(arguments: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    part = dict(arguments)
    for name in ("base", "model", "gradient"):
        if part.get(name) is not None:
            part[name] = part[name][start:stop]
    if "masks" in part:
        part |= part_of(part, start, stop)
    if "start" in part:  # the hash of a random mask sees the index
        part["start"] += start
    if "models" in part:
        part["models"] = [model[start:stop] for model in part["models"]]
    if part.get("ranks") is not None:
        part["ranks"] = part["ranks"][:, start:stop]
    if isinstance(part.get("weights"), torch.Tensor):
        columns = part["columns"]
        part["weights"] = part["weights"][:, start // columns : stop // columns]
    if "divergences" in part:
        columns = part["columns"]
        part["divergences"] = part["divergences"][start // columns : stop // columns]
    return part


@dataclass
class Expected:
    """What the reference gives: the output in stretches (start, values), and counters."""

    stretches: list[tuple[int, torch.Tensor]]
    counters: dict[str, torch.Tensor]


def expect(case: Case, inputs: Inputs, arguments: dict[str, Any], seed: int = 0) -> Expected:
    """Run the reference: on random stretches, and over everything for counters of everything."""
    base, models = inputs
    numel = base.numel()

    def reference(start: int, stop: int) -> dict[str, torch.Tensor]:
        part = base[start:stop], [model[start:stop] for model in models]
        outputs = case.outputs(*part, base.dtype)
        op = getattr(torch.ops.pymerge, case.op)
        op(**outputs, **_part(arguments, start, stop), backend="reference")
        return outputs

    expected = Expected([], {})
    if case.streams_out:
        # Whole rows, or whole chunks.
        unit = arguments.get("columns", PACKED_CHUNK if "masks" in arguments else 1)
        stretch = max(unit, STRETCH // unit * unit)
        places = range(0, max(0, numel - stretch) + 1, unit)
        drawn = random.Random(seed).sample(places, min(STRETCHES - 2, len(places)))
        for start in sorted({0, places[-1], *drawn}):
            stop = min(start + stretch, numel)
            expected.stretches.append((start, reference(start, stop)["out"]))
    if "masks" in arguments and case.streams_out:
        return expected
    if case.streams_out and not arguments.get("want_signs"):
        expected.counters["stats"] = torch.zeros(3, dtype=torch.int64)
        return expected
    tiles = [reference(start, min(start + _TILE, numel)) for start in range(0, numel, _TILE)]
    for name in tiles[0].keys() - {"out"}:
        values = [tile[name] for tile in tiles]
        per_chunk = name in ("hot_chunks", "partials", "sums", "table", "scores", "ranks")
        chunk_counts = case.op == "magnitude_equal_counts_"
        per_chunk = per_chunk or (name == "counts" and chunk_counts)
        if per_chunk:
            expected.counters[name] = torch.cat(values, dim=-1)
        else:
            expected.counters[name] = torch.stack(values).sum(dim=0)
    return expected


def check(name: str, expected: Expected, outputs: dict[str, torch.Tensor], numel: int) -> None:
    """Raise WrongResult unless what a kernel wrote is what the reference writes, bit for bit."""
    for start, values in expected.stretches:
        found = outputs["out"][start : start + values.numel()]
        if not torch.equal(found, values):
            index = int((found != values).nonzero()[0])
            raise WrongResult(
                f"{name}: at {start + index} the kernel wrote {found[index]}, the reference "
                f"{values[index]}"
            )
    for key, values in expected.counters.items():
        found = outputs[key]
        if found.dim() == 3:  # [slots, models, bins]
            found, values = found.sum(dim=0), values.sum(dim=0)
        if key in ("scores", "ranks"):  # rows have room for a multiple of 64
            found, values = found[:, :numel], values[:, :numel]
        kind = torch.float64 if values.is_floating_point() else torch.int64
        if not torch.equal(found.to(kind), values.to(kind)):
            raise WrongResult(f"{name}: {key} differs from the reference's")


@dataclass(frozen=True)
class Measurement:
    """One case on one instruction set and number of threads.

    nbytes: read and written per call; share: speed relative to the streaming loop, in bytes per
    second; eager: median seconds of plain torch, where there is such a version.
    """

    case: str
    isa: str
    threads: int
    elements: int
    nbytes: int
    seconds: float
    spread: float
    repetitions: int
    floor_seconds: float
    share: float
    eager_seconds: float | None

    @property
    def rate(self) -> float:
        return self.nbytes / self.seconds


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
                _check_floor(out, read)
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


def _check_floor(out: torch.Tensor, read: Sequence[torch.Tensor]) -> None:
    """The streaming loop combines the bits of all inputs, so that none of them can be left out."""
    for start in range(0, out.numel(), max(1, out.numel() // STRETCHES)):
        bits = torch.zeros_like(out[start : start + STRETCH].view(torch.int16))
        for tensor in read:
            bits |= tensor[start : start + STRETCH].view(torch.int16)
        if not torch.equal(out[start : start + STRETCH].view(torch.int16), bits):
            raise WrongResult(f"streaming loop: wrong bits from {start} on")


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


def tables(measurements: Sequence[Measurement], scaling: float) -> dict[str, Table]:
    """Return the tables: all of it, and the widest instruction set on all threads.

    scaling: what vector_scaling found.
    """
    first = measurements[0]
    title = f"CPU kernels, {first.elements / 2**20:g} Mi elements, bf16, K = {MODELS}"
    notes = [
        "GB/s: bytes read and written per second. Of streaming: relative, in bytes per second, to "
        "a loop over the same arrays that combines bits and writes them (widest instruction set, "
        "the same threads), timed in turns with the kernel: each call beside the loop before it, "
        "the median of these. ties_signs and magnitude_* only read; "
        "the loop that they are compared with also writes.",
        "Medians; spread is the distance between the quartiles. Each timed result was equal, bit "
        f"for bit, to the reference backend's: outputs on {STRETCHES} random stretches of "
        f"{STRETCH} elements, counters as a whole. Plain torch: the same in eager operators.",
    ]
    top = max(m.threads for m in measurements)
    if top > 1:
        notes.append(
            f"Vector units: with data in the cache, {top} threads of this machine do "
            f"{scaling:.2f} times the work of one; a kernel that computes gains no more than this "
            "by threads, while the streaming loop gains what the memory has."
        )
    columns = ["kernel", "ISA", "threads", "ms", "spread", "GB/s", "B/param", "of streaming"]
    everything = Table(title, [*columns, "torch, ms"], notes=notes)
    short = Table(title, ["kernel", "ms", "GB/s", "of streaming", "plain torch"], notes=notes)
    widest = [m.isa for m in measurements][-1]
    for m in measurements:
        eager = "" if m.eager_seconds is None else f"{m.eager_seconds * 1e3:.0f}"
        everything.add(
            m.case,
            m.isa,
            str(m.threads),
            f"{m.seconds * 1e3:.1f}",
            f"{m.spread:.0%}",
            f"{m.rate / 1e9:.1f}",
            f"{m.nbytes / m.elements:g}",
            f"{m.share:.0%}",
            eager,
        )
        if m.threads == top and m.isa == widest:
            versus = eager and f"{eager} ms ({(m.eager_seconds or 0) / m.seconds:.0f}x)"
            short.add(
                m.case, f"{m.seconds * 1e3:.1f}", f"{m.rate / 1e9:.1f}", f"{m.share:.0%}", versus
            )
    short.title += f", {widest}, {top} threads"
    return {"kernels": short, "kernels-all": everything}


def methods_table(measured: dict[str, Measurement], isa: str, threads: int) -> Table:
    """Return the table of all methods' kernels."""
    first = next(iter(measured.values()))
    table = Table(
        f"Kernels of the methods, {first.elements / 2**20:g} Mi elements, bf16, K = {MODELS}, "
        f"{isa}, {threads} threads",
        ["method", "passes over the inputs", "ms", "GB/s", "B/param", "of streaming", "loop, GB/s"],
        notes=[
            "The kernel that writes the result, given thresholds, sums and ranks; below, those "
            "that find these. Ranks are counted among the bytes (4 for each element of each "
            "model). Measured and checked as above. Loop: what the streaming loop beside it did, "
            "which differs where other users of the machine's memory come and go; the share of a "
            "kernel that computes is larger where the memory is slow."
        ],
    )
    for name, m in measured.items():
        spec = METHODS.get(name.partition(",")[0])
        table.add(
            name,
            spec.passes.partition(" (")[0] if spec else "",
            f"{m.seconds * 1e3:.1f}",
            f"{m.rate / 1e9:.1f}",
            f"{m.nbytes / m.elements:g}",
            f"{m.share:.0%}",
            f"{m.rate / m.share / 1e9:.0f}",
        )
    return table


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
