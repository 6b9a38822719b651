"""Measures the rows of the case table on a GPU: each checked against the reference, then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["MAIN", "REST", "TARGETS", "Bench"]

# Measured for every dtype and number of models; the others for only one.
MAIN = (
    "linear",
    "task_arithmetic",
    "ties_mean",
    "ties_mergekit",
    "ties_mean_signs",
    "ties_signs",
    "magnitude_histogram",
    "magnitude_equal_counts",
    "dare_linear",
    "dare_ties",
    "breadcrumbs_ties",
    "sums_gram.deltas",
    "pcb_paper",
    "pcb_vision",
)
REST = (
    "linear_unnormalized",
    "ties_sum",
    "ties_max",
    "ties_peft",
    "ties_sd_mecha",
    "breadcrumbs",
    "sparse_all",
    "della",
    "della_linear",
    "breadcrumbs_rows",
    "nearswap",
    "ram",
    "magmax",
    "consensus_ta",
    "tall_masks",
    "emr",
    "emr_task",
    "variance",
    "sce",
    "sce_everywhere",
    "sums_sparse",
    "sums_sparse.ranked",
    "sums_gram",
    "sums_gram.rows",
    "sums_dots",
    "packed_sum",
    "packed_dots",
    "sums_statistics",
    "sums_statistics.rows",
    "sums_ram_counts",
    "sums_emr",
    "sums_sce",
    "sums_pcb_extremes",
    "sums_pcb_exp",
    "pcb_root",
    "pcb_vision_es",
    "pcb_paper_scores",
    "pcb_root_scores",
    "pcb_vision_scores",
    "row_weighted_sum",
    "row_task_arithmetic",
    "row_ranks",
    "divergence_all.rows",
    "row_importance",
    "arcee_fusion",
)
# The targeted share of the bandwidth of a copy, by the beginning of a name.
TARGETS = {"linear": 0.9, "task_arithmetic": 0.9, "ties": 0.85, "pcb": 0.6}

ISSUED_BEFORE = 3  # calls before the timed ones
STRETCH = 4096  # elements compared at a time: whole chunks and whole rows
STRETCHES = 12
COLUMNS = 1024  # of ops over rows
SAMPLE = 1 << 16  # elements from which thresholds are taken


class Keeps(Protocol):
    """The receiver of rows."""

    found: dict[str, Any]


class Bench:
    """Measures one op after another, on `device`."""

    def __init__(self, log: Keeps, dry: bool, nbytes: int) -> None:
        import torch

        import pymerge.ops.contract  # noqa: F401  declares torch.ops.pymerge
        from tests.cases import GPU_CASES

        self.torch = torch
        self.log = log
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.nbytes = nbytes
        self.cases = {case.name: case for case in GPU_CASES}
        self.dtypes = {"bf16": torch.bfloat16, "f32": torch.float32}
        self.base: Any = None
        self.models: list[Any] = []

    def time(self, call: Callable[[], object], seconds: float = 0.2) -> tuple[float, float]:
        """Return the median seconds of a call and the spread (quartiles) around it."""
        torch = self.torch
        for _ in range(1 if self.dry else ISSUED_BEFORE):
            call()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < 5 or (time.monotonic() - began < seconds and len(times) < 50):
            if self.dry:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
                if len(times) == 2:
                    break
                continue
            first = torch.cuda.Event(enable_timing=True)
            last = torch.cuda.Event(enable_timing=True)
            first.record()
            call()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        median = statistics.median(times)
        return median, (high - low) / median

    def copy(self) -> float:
        """Return the bandwidth of a copy, in bytes read and written per second."""
        torch = self.torch
        source = torch.ones(self.nbytes // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds, _ = self.time(lambda: target.copy_(source))
        self.log.found["copy_bandwidth"] = 2 * source.nbytes / seconds
        return self.log.found["copy_bandwidth"]

    def make(self, count: int, dtype: str) -> int:
        """Create a base (deviation 0.02) and models (deltas of deviation 0.001) on the device."""
        torch = self.torch
        kind = self.dtypes[dtype]
        numel = self.nbytes // ((count + 2) * kind.itemsize) // STRETCH * STRETCH
        generator = torch.Generator(self.device).manual_seed(count)

        def draw(scale: float) -> Any:
            return torch.randn(numel, generator=generator, device=self.device) * scale

        self.base, self.models = None, []  # frees the memory of the previous ones
        self.base = draw(0.02).to(kind)
        for _ in range(count):
            self.models.append((self.base.float() + draw(1e-3)).to(kind))
        return numel

    def arguments(self, case: Any) -> dict[str, Any]:
        """Return a case's arguments, with thresholds from a sample; tensors as long as the inputs
        are on the device."""
        torch, base, models = self.torch, self.base, self.models
        if case.op.startswith("packed"):  # nothing in them comes from a sample
            return case.arguments(base, models)
        sample = slice(0, SAMPLE)
        given = case.arguments(base[sample].cpu(), [model[sample].cpu() for model in models])
        if given.get("base") is not None:
            given["base"] = base
        if "model" in given:
            given["model"] = models[0]
        if "models" in given:
            own = len(given["models"])  # one of them, or one more: the gradient for dot products
            given["models"] = models[:own] if own <= len(models) else [*models, models[0]]
        if given.get("columns"):
            given["columns"] = COLUMNS
        if "chances" in given:
            given["chances"] = [
                0.6 / COLUMNS if i % 2 else p for i, p in enumerate(given["chances"])
            ]
        if "ranks" in given:
            room = torch.zeros(len(models), base.numel(), dtype=torch.int32, device=self.device)
            backend = "cpu" if self.dry else "cuda"
            torch.ops.pymerge.row_ranks_(room, base, models, COLUMNS, backend=backend)
            given["ranks"] = room
            if not given.get("chances"):
                given["lo"], given["last"] = [300] * len(models), [1000] * len(models)
        if "weights" in given and isinstance(given["weights"], torch.Tensor):
            rows = base.numel() // COLUMNS
            table = torch.arange(len(models) * rows, dtype=torch.float64, device=self.device)
            given["weights"] = (table.view(len(models), rows) % 7 + 1) / 8
        if "divergences" in given:
            rows = torch.arange(base.numel() // COLUMNS, dtype=torch.float64, device=self.device)
            given["divergences"] = 1e-3 + 1e-4 * (rows % 5)
        return given

    def outputs(self, case: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays to which a case writes, on the device."""
        from pymerge.ops.arguments import sums_shape

        torch, base, count = self.torch, self.base, len(self.models)
        numel = base.numel()
        made = case.outputs(base[:SAMPLE].cpu(), [m[:1].cpu() for m in self.models], base.dtype)
        if "masks" in given and "partials" in made:
            shape = sums_shape("dots", count + 1, numel, 0)
            made["partials"] = torch.zeros(shape, dtype=torch.float64)
        elif "partials" in made:
            models = len(given["models"])
            shape = sums_shape(given["kind"], models, numel, given.get("columns", 0))
            made["partials"] = torch.zeros(shape, dtype=torch.float64)
        if "table" in made:
            made["table"] = torch.zeros(len(made["table"]), numel // COLUMNS, dtype=torch.float64)
        if "hot_chunks" in made:
            made["hot_chunks"] = torch.zeros(count, -(-numel // 65536), dtype=torch.int32)
        elif "counts" in made:
            made["counts"] = torch.zeros(-(-numel // given["chunk"]), dtype=torch.int64)
        found = {name: tensor.to(self.device) for name, tensor in made.items() if name != "out"}
        for name in ("scores", "ranks"):
            if name in found:
                found[name] = torch.zeros(count, numel, dtype=made[name].dtype, device=self.device)
        return found if "out" not in made else {"out": torch.full_like(base, torch.nan), **found}

    def row(self, name: str, dtype: str, backend: str) -> None:
        """Check and time one op on one backend."""
        case = self.cases[name]
        given = self.arguments(case)
        outputs = self.outputs(case, given)
        case.call(outputs, given, backend)
        self.check(case, given, outputs)
        seconds, spread = self.time(lambda: case.call(outputs, given, backend))
        names = ("base", "model", "ranks", "weights", "gradient")
        read = [given[key] for key in names if key in given]
        for key in ("models", "masks", "values", "offsets"):
            read += given.get(key, [])
        tensors = [t for t in read if hasattr(t, "nbytes")]
        long = [outputs[key] for key in ("out", "scores", "ranks") if key in outputs]
        nbytes = sum(tensor.nbytes for tensor in [*tensors, *long])
        self.note(name, dtype, backend, seconds, spread, nbytes)

    def note(
        self, name: str, dtype: str, backend: str, seconds: float, spread: float, nbytes: int
    ) -> None:
        self.log.found["rows"].append(
            {
                "op": name,
                "models": len(self.models),
                "dtype": dtype,
                "backend": backend,
                "elements": self.base.numel(),
                "seconds": seconds,
                "spread": spread,
                "bandwidth": nbytes / seconds,
            }
        )

    def check(self, case: Any, given: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Raise unless stretches of the outputs equal the reference's, bit by bit, and all elements
        have been counted."""
        numel = self.base.numel()
        if "counts" in outputs:
            counts = outputs["counts"]
            if counts.dim() == 3 and int(counts.sum()) != numel * len(self.models):
                raise AssertionError(f"{case.name}: {int(counts.sum())} elements were counted")
            return
        last = numel - STRETCH
        starts = {last * k // (STRETCHES - 1) // STRETCH * STRETCH for k in range(STRETCHES)}
        for start in sorted(starts):
            part = slice(start, start + STRETCH)
            own = self.part(given, part)
            models = [own["model"]] if "model" in own else own.get("models", own.get("values"))
            expected = case.outputs(self.base[part].cpu(), models, self.base.dtype)
            if "partials" in expected:
                shape = STRETCH // (given.get("columns") or 1024)
                rows = outputs["partials"].shape[0]
                expected["partials"] = self.torch.zeros(rows, shape, dtype=self.torch.float64)
            if "table" in expected:
                shape = len(expected["table"]), STRETCH // COLUMNS
                expected["table"] = self.torch.zeros(shape, dtype=self.torch.float64)
            case.call(expected, own, "reference")
            for name, wanted in expected.items():
                if name == "stats":
                    continue
                columns = slice(start // 1024, (start + STRETCH) // 1024)
                got = outputs[name][..., columns if name in ("partials", "table") else part].cpu()
                if not self.torch.equal(got, wanted[..., : got.shape[-1]]):
                    raise AssertionError(f"{case.name}: wrong {name} from element {start} on")

    def part(self, given: dict[str, Any], part: slice) -> dict[str, Any]:
        """Return the arguments of a stretch of the inputs, on the processor."""
        from tests.packing import part_of

        own = dict(given)
        for name in ("base", "model", "gradient"):
            if own.get(name) is not None:
                own[name] = own[name][part].cpu()
        if "masks" in own:
            kept = part_of(own, part.start, part.stop)
            own |= {key: [tensor.cpu() for tensor in tensors] for key, tensors in kept.items()}
        if "models" in own:
            own["models"] = [model[part].cpu() for model in own["models"]]
        if "ranks" in own:
            own["ranks"] = own["ranks"][:, part].cpu()
        if "columns" in own and isinstance(own.get("weights"), self.torch.Tensor):
            rows = slice(part.start // COLUMNS, part.stop // COLUMNS)
            own["weights"] = own["weights"][:, rows].cpu()
        if "divergences" in own:
            rows = slice(part.start // COLUMNS, part.stop // COLUMNS)
            own["divergences"] = own["divergences"][rows].cpu()
        if "start" in own:
            own["start"] += part.start
        return own

    def eager(self, name: str, dtype: str, compiled: bool) -> None:
        """Time plain torch, or torch.compile, on the same work."""
        from benchmarks.eager import EAGER

        case = self.cases[name]
        given = self.arguments(case)
        function = self.torch.compile(EAGER[name]) if compiled else EAGER[name]
        seconds, spread = self.time(lambda: function(given))
        nbytes = sum(t.nbytes for t in [*self.models, *([self.base] if "base" in given else [])])
        backend = "torch.compile" if compiled else "torch"
        self.note(name, dtype, backend, seconds, spread, nbytes + self.base.nbytes)
