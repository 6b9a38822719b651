"""Measurements of kernels, and the tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernel_checks import MODELS, STRETCH, STRETCHES
from benchmarks.tables import Table
from pymerge.methods import METHODS

__all__ = ["GATHERING_CASES", "METHOD_CASES", "Measurement", "methods_table", "tables"]

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
