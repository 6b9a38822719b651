"""One command for a machine with a GPU: builds, tests, measures, and keeps what it has found.

    python -m benchmarks.gpu_check OUT_DIR

It needs torch, triton, nvcc and a C++ compiler, and nothing of what merging files needs. After
every step OUT_DIR/gpu.json holds all results so far; OUT_DIR/gpu.md is the table. `--dry-run` goes
through the same steps on small sizes without a GPU: the CPU kernels, and Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTS = (2, 4, 8, 16)
DTYPES = ("bf16", "f32")
ROWS = (
    "linear",
    "task_arithmetic",
    "ties_mean",
    "ties_mergekit",
    "ties_mean_signs",
    "ties_signs",
    "magnitude_histogram",
    "magnitude_equal_counts",
)
OFFLINE = ("--no-deps", "--no-build-isolation", "--break-system-packages")
ISSUED_BEFORE = 3  # calls before those that are timed
STRETCHES, STRETCH = 24, 4096


class Log:
    """Everything found so far, on disk after every step."""

    def __init__(self, folder: Path, minutes: float, dry: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.end = time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {
            "date": date.today().isoformat(),
            "dry_run": dry,
            "steps": [],
            "rows": [],
        }

    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a step; a failure is written down and does not end the rest."""
        began = time.monotonic()
        print(f"== {name} ({self.left():.0f} s left)", flush=True)
        try:
            result, problem = function(), None
        except Exception as error:
            result, problem = None, f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self.found["steps"].append(
            {
                "step": name,
                "seconds": round(time.monotonic() - began, 2),
                "failed": problem,
                "result": result,
            }
        )
        self.save()
        return result

    def save(self) -> None:
        path = self.folder / "gpu.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        (self.folder / "gpu.md").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        lines = [f"GPU check, {self.found['date']}: {self.found.get('device', 'no device')}", ""]
        copy = self.found.get("copy_bandwidth")
        if copy:
            lines += [f"Copy: {copy / 1e9:.0f} GB/s (read and written).", ""]
        lines += [
            "| op | K | dtype | backend | ms | spread | GB/s | of copy |",
            "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in self.found["rows"]:
            share = f"{row['bandwidth'] / copy:.0%}" if copy else ""
            lines.append(
                f"| {row['op']} | {row['models']} | {row['dtype']} | {row['backend']} | "
                f"{row['seconds'] * 1e3:.2f} | {row['spread']:.0%} | "
                f"{row['bandwidth'] / 1e9:.0f} | {share} |"
            )
        return "\n".join(lines) + "\n"


def run(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run a program in the project's folder; return its code and the end of what it said."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, seconds),
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = 124, (error.stdout or b"").decode(errors="replace")
    print(said[-1500:], flush=True)
    if code != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}: {said[-3000:]}")
    return {"code": code, "said": said[-3000:]}


def build(log: Log, dry: bool) -> Any:
    """Install in place, without what merging files needs; both libraries, for this device alone."""
    if dry:
        return "left out"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", *OFFLINE, "-e", "."],
        log.left(),
        PYMERGE_CUDA="1",
        PYMERGE_CUDA_ARCHS=f"{major}{minor}",
    )


def tests(log: Log, dry: bool) -> Any:
    """Run the tests of both GPU backends, on the device."""
    files = ["tests/test_cuda.py", "tests/test_triton.py"]
    required = "cuda,triton"
    if dry:
        files, required = ["tests/test_array.py"], "cpu"
    quiet = ("-q", "-o", "filterwarnings=", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *quiet, *files]
    return run(command, min(240.0, log.left() - 60), PYMERGE_REQUIRE=required)


def machine(log: Log, dry: bool) -> Any:
    import torch

    found = {"torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    log.found["device"] = "the processor (dry run)" if dry else torch.cuda.get_device_name()
    return found


class Bench:
    """Measures one op after the other, on `device`."""

    def __init__(self, log: Log, dry: bool, nbytes: int) -> None:
        import torch

        import pymerge._ops  # noqa: F401  declares torch.ops.pymerge
        from tests.cases import CASES

        self.torch = torch
        self.log = log
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.nbytes = nbytes
        self.cases = {case.name: case for case in CASES}
        self.dtypes = {"bf16": torch.bfloat16, "f32": torch.float32}
        self.base: Any = None
        self.models: list[Any] = []

    def time(self, call: Callable[[], object], seconds: float = 0.4) -> tuple[float, float]:
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
        """Return the bandwidth of a copy, bytes read and written a second."""
        torch = self.torch
        source = torch.ones(self.nbytes // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds, _ = self.time(lambda: target.copy_(source))
        self.log.found["copy_bandwidth"] = 2 * source.nbytes / seconds
        return self.log.found["copy_bandwidth"]

    def make(self, count: int, dtype: str) -> int:
        """Make a base (deviation 0.02) and models (deltas of deviation 0.001) on the device."""
        torch = self.torch
        kind = self.dtypes[dtype]
        numel = self.nbytes // ((count + 2) * kind.itemsize) // 1024 * 1024
        generator = torch.Generator(self.device).manual_seed(count)

        def draw(scale: float) -> Any:
            return torch.randn(numel, generator=generator, device=self.device) * scale

        self.base, self.models = draw(0.02).to(kind), []
        for _ in range(count):
            self.models.append((self.base.float() + draw(1e-3)).to(kind))
        return numel

    def row(self, name: str, dtype: str, backend: str) -> None:
        """Check and time one op on one backend."""
        torch, base, models = self.torch, self.base, self.models
        case = self.cases[name]
        sample = slice(0, 1 << 16)
        small = base[sample].cpu(), [model[sample].cpu() for model in models]
        arguments = case.arguments(*small)
        whole = {"base": base, "models": models, "model": models[0]}
        given = {key: whole.get(key, value) for key, value in arguments.items()}
        outputs = {
            key: value.to(self.device)
            for key, value in case.outputs(base, models, base.dtype).items()
        }
        op = getattr(torch.ops.pymerge, case.op)
        op(**outputs, **given, backend=backend)
        self.check(case, arguments, base, models, outputs)
        seconds, spread = self.time(lambda: op(**outputs, **given, backend=backend))
        read = [given[key] for key in ("base", "model") if key in given] + given.get("models", [])
        nbytes = sum(tensor.nbytes for tensor in read)
        nbytes += outputs["out"].nbytes if case.streams_out else 0
        self.log.found["rows"].append(
            {
                "op": name,
                "models": len(models),
                "dtype": dtype,
                "backend": backend,
                "elements": base.numel(),
                "seconds": seconds,
                "spread": spread,
                "bandwidth": nbytes / seconds,
            }
        )

    def check(self, case: Any, arguments: Any, base: Any, models: Any, outputs: Any) -> None:
        """Raise unless stretches of the output are the reference's, bit by bit."""
        if not case.streams_out:
            return
        torch = self.torch
        numel = base.numel()
        starts = {0, max(0, numel - STRETCH)}
        starts |= {numel * k // STRETCHES // 8 * 8 + k for k in range(1, STRETCHES)}
        for start in sorted(starts):
            part = slice(start, min(start + STRETCH, numel))
            own = base[part].cpu(), [model[part].cpu() for model in models]
            given = dict(arguments)
            replaced = {"base": own[0], "models": own[1], "model": own[1][0]}
            given = {key: replaced.get(key, value) for key, value in given.items()}
            expected = case.outputs(*own, base.dtype)
            getattr(torch.ops.pymerge, case.op)(**expected, **given, backend="reference")
            if not torch.equal(outputs["out"][part].cpu(), expected["out"]):
                raise AssertionError(f"{case.name}: wrong bits from element {start} on")

    def eager(self, name: str, dtype: str, compiled: bool) -> None:
        """Time plain torch, or torch.compile, on the same work."""
        from benchmarks.eager import EAGER

        base, models = self.base, self.models
        if name not in EAGER:
            return
        case = self.cases[name]
        sample = slice(0, 1 << 16)
        arguments = case.arguments(base[sample].cpu(), [model[sample].cpu() for model in models])
        whole = {"base": base, "models": models, "model": models[0]}
        given = {key: whole.get(key, value) for key, value in arguments.items()}
        function = self.torch.compile(EAGER[name]) if compiled else EAGER[name]
        seconds, spread = self.time(lambda: function(given), seconds=0.2)
        nbytes = sum(tensor.nbytes for tensor in [*models, *([base] if "base" in given else [])])
        nbytes += base.nbytes
        self.log.found["rows"].append(
            {
                "op": name,
                "models": len(models),
                "dtype": dtype,
                "backend": "torch.compile" if compiled else "torch",
                "elements": base.numel(),
                "seconds": seconds,
                "spread": spread,
                "bandwidth": nbytes / seconds,
            }
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; exit code 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for gpu.json and gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, small sizes")
    parser.add_argument("--minutes", type=float, default=7.5, help="most time to take")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="data of each measurement")
    options = parser.parse_args(arguments)
    dry: bool = options.dry_run
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    log = Log(options.out, options.minutes, dry)
    log.step("machine", lambda: machine(log, dry))
    log.step("build", lambda: build(log, dry))
    log.step("tests", lambda: tests(log, dry))
    nbytes = 1 << 18 if dry else int(options.gigabytes * 1e9)
    bench = Bench(log, dry, nbytes)
    log.step("copy", bench.copy)
    backends = ("cpu", "triton") if dry else ("cuda", "triton")
    counts = (2,) if dry else COUNTS
    for dtype in DTYPES:
        for count in counts:
            if not log.step(f"inputs {count} {dtype}", lambda c=count, d=dtype: bench.make(c, d)):
                continue
            for name in ROWS:
                for backend in backends:
                    if log.left() < 5:
                        continue
                    log.step(
                        f"{name} {count} {dtype} {backend}",
                        lambda n=name, b=backend, d=dtype: bench.row(n, d, b),
                    )
                for compiled in (False, True):
                    if log.left() > 60 and count == 4 and not (dry and compiled):
                        log.step(
                            f"{name} {count} {dtype} torch{'.compile' if compiled else ''}",
                            lambda n=name, d=dtype, c=compiled: bench.eager(n, d, c),
                        )
    print(log.table())
    failed = [step for step in log.found["steps"] if step["failed"]]
    for step in failed:
        print(f"FAILED {step['step']}: {step['failed'][:500]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
