"""Tables of kernels, from pytest-benchmark's JSON of `benchmarks/test_kernels.py`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernel_checks import MODELS, STRETCH, STRETCHES
from benchmarks.tables import Table
from pymerge.methods import METHODS

__all__ = [
    "GATHERING_CASES",
    "MAIN_CASES",
    "METHOD_CASES",
    "Measurement",
    "Measurements",
    "all_kernels",
    "tables",
]

# Measured on each instruction set, by one thread and by all.
MAIN_CASES = (
    "linear",
    "task_arithmetic",
    "ties_mean",
    "ties_mergekit",
    "ties_mean_signs",
    "ties_signs",
    "magnitude_histogram",
    "magnitude_equal_counts",
)
# The kernel that writes the merge of each method, given its statistics; and those that gather them.
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
    "tall_masks": "tall_masks",
    "consensus_ta": "consensus_ta",
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

    name: the benchmark's, by which runs are compared; nbytes: read and written per call; share:
    speed relative to the streaming loop, in bytes per second.
    """

    name: str
    case: str
    isa: str
    threads: int
    elements: int
    nbytes: int
    seconds: float
    spread: float
    share: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Measurement:
        """Return the measurement in one of the benchmarks of the JSON."""
        stats, more = record["stats"], record["extra_info"]
        return cls(
            record["fullname"],
            **record["params"],
            elements=more["elements"],
            nbytes=more["bytes"],
            seconds=stats["median"],
            spread=stats["iqr"] / stats["median"],
            share=more["of_streaming"],
        )

    @property
    def rate(self) -> float:
        """Return bytes per second."""
        return self.nbytes / self.seconds


class Measurements:
    """The benchmarks of one run.

    kernels: in the order in which they were measured.
    torch: median seconds of plain torch, by case and threads.
    scaling: vector work of all threads relative to that of one; None: not measured.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], isas: Sequence[str]) -> None:
        """records: "benchmarks" of the JSON; isas: of its machine, the widest last."""
        self.kernels: list[Measurement] = []
        self.torch: dict[tuple[str, int], float] = {}
        self.scaling: float | None = None
        for record in records:
            function = record["name"].partition("[")[0]
            if function == "test_kernel":
                self.kernels.append(Measurement.of(record))
            elif function == "test_plain_torch":
                params = record["params"]
                self.torch[params["case"], params["threads"]] = record["stats"]["median"]
            elif function == "test_vector_units":
                self.scaling = record["extra_info"]["times_one_thread"]
        self.threads = max((m.threads for m in self.kernels), default=1)
        measured = {m.isa for m in self.kernels}
        self.isa = next((isa for isa in reversed(isas) if isa in measured), "")

    def fastest(self) -> dict[str, Measurement]:
        """Return the measurements of the widest instruction set and all threads, by case."""
        return {m.case: m for m in self.kernels if m.isa == self.isa and m.threads == self.threads}


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Return the tables of a run's JSON, by the names used in documents; only complete ones.

    So a run of some kernels removes no row from a document.
    """
    isas = result["machine_info"]["isa"]
    found = Measurements(result["benchmarks"], isas)
    fastest = found.fastest() if found.isa == isas[-1] else {}
    measured = {(m.case, m.isa, m.threads) for m in found.kernels}
    made: dict[str, Table] = {}
    if fastest.keys() >= set(MAIN_CASES):
        made["kernels"] = _short(found, [fastest[case] for case in MAIN_CASES])
    if measured >= set(itertools.product(MAIN_CASES, isas, {1, found.threads})):
        main = [m for m in found.kernels if m.case in MAIN_CASES]
        made["kernels-all"] = all_kernels(found, main)
    if fastest.keys() >= {*METHOD_CASES.values(), *GATHERING_CASES.values()}:
        made["methods"] = _methods(found, fastest)
    return made


def _title(kernels: Sequence[Measurement]) -> str:
    return f"CPU kernels, {kernels[0].elements / 2**20:g} Mi elements, bf16, K = {MODELS}"


def _notes(found: Measurements) -> list[str]:
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
    if found.scaling is not None:
        notes.append(
            f"Vector units: with data in the cache, {found.threads} threads of this machine do "
            f"{found.scaling:.2f} times the work of one; a kernel that computes gains no more than "
            "this by threads, while the streaming loop gains what the memory has."
        )
    return notes


def all_kernels(
    found: Measurements, kernels: Sequence[Measurement], before: Mapping[str, float] | None = None
) -> Table:
    """Return the table of some kernels.

    before: shares of streaming in another run, by the benchmark's name.
    """
    columns = ["kernel", "ISA", "threads", "ms", "spread", "GB/s", "B/param", "of streaming"]
    table = Table(_title(kernels), [*columns, "torch, ms"], notes=_notes(found))
    if before is not None:
        table.columns.append("before")
        table.notes.append("Before: of streaming, in the run that this one is compared with.")
    top = max(m.threads for m in kernels)
    for m in kernels:
        seconds = found.torch.get((m.case, m.threads)) if m.threads == top else None
        cells = [
            m.case,
            m.isa,
            str(m.threads),
            f"{m.seconds * 1e3:.1f}",
            f"{m.spread:.0%}",
            f"{m.rate / 1e9:.1f}",
            f"{m.nbytes / m.elements:.3g}",
            f"{m.share:.0%}",
            "" if seconds is None else f"{seconds * 1e3:.0f}",
        ]
        if before is not None:
            cells.append(f"{before[m.name]:.0%}" if m.name in before else "")
        table.add(*cells)
    return table


def _short(found: Measurements, kernels: Sequence[Measurement]) -> Table:
    """Return the table of the widest instruction set and all threads."""
    title = f"{_title(kernels)}, {found.isa}, {found.threads} threads"
    columns = ["kernel", "ms", "GB/s", "of streaming", "plain torch"]
    table = Table(title, columns, notes=_notes(found))
    for m in kernels:
        seconds = found.torch.get((m.case, m.threads))
        versus = "" if seconds is None else f"{seconds * 1e3:.0f} ms ({seconds / m.seconds:.0f}x)"
        table.add(m.case, f"{m.seconds * 1e3:.1f}", f"{m.rate / 1e9:.1f}", f"{m.share:.0%}", versus)
    return table


def _methods(found: Measurements, fastest: Mapping[str, Measurement]) -> Table:
    """Return the table of all methods' kernels."""
    first = next(iter(fastest.values()))
    table = Table(
        f"Kernels of the methods, {first.elements / 2**20:g} Mi elements, bf16, K = {MODELS}, "
        f"{found.isa}, {found.threads} threads",
        ["method", "passes over the inputs", "ms", "GB/s", "B/param", "of streaming", "loop, GB/s"],
        notes=[
            "The kernel that writes the result, given thresholds, sums and ranks; below, those "
            "that find these. Ranks are counted among the bytes (4 for each element of each "
            "model). Measured and checked as above. Loop: what the streaming loop beside it did, "
            "which differs where other users of the machine's memory come and go; the share of a "
            "kernel that computes is larger where the memory is slow."
        ],
    )
    for name, case in (METHOD_CASES | GATHERING_CASES).items():
        spec, m = METHODS.get(name.partition(",")[0]), fastest[case]
        table.add(
            name,
            spec.passes.partition(" (")[0] if spec else "",
            f"{m.seconds * 1e3:.1f}",
            f"{m.rate / 1e9:.1f}",
            f"{m.nbytes / m.elements:.3g}",
            f"{m.share:.0%}",
            f"{m.rate / m.share / 1e9:.0f}",
        )
    return table
