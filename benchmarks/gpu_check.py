"""One command for a machine with a GPU: builds, tests, measures, and stores the results.

    python -m benchmarks.gpu_check OUT_DIR

It needs torch, nvcc and a C++ compiler, and Triton for Triton's rows. Only the step that merges
files needs pydantic, pyyaml, rich and safetensors; it is left out if they are missing. After every
step OUT_DIR/gpu.json holds all results so far; OUT_DIR/gpu.md is the table. `--dry-run` goes
through the same steps with small sizes and no GPU: the CPU kernels, and Triton's interpreter.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.eager import EAGER
from benchmarks.gpu_rows import MAIN, REST, TARGETS, Bench

ROOT = Path(__file__).resolve().parent.parent
COUNTS = (2, 4, 8, 16)
DTYPES = ("bf16", "f32")
OFFLINE = ("--no-deps", "--no-build-isolation", "--break-system-packages")


class Log:
    """All results so far, written to disk after every step."""

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
        """Run a step; a failure is recorded and does not stop the rest."""
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
            "| op | K | dtype | backend | ms | spread | GB/s | of copy | aim |",
            "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in self.found["rows"]:
            share = f"{row['bandwidth'] / copy:.0%}" if copy else ""
            lines.append(
                f"| {row['op']} | {row['models']} | {row['dtype']} | {row['backend']} | "
                f"{row['seconds'] * 1e3:.2f} | {row['spread']:.0%} | "
                f"{row['bandwidth'] / 1e9:.0f} | {share} | {aim(row['op'])} |"
            )
        for name, merge in self.found.get("files", {}).items():
            if isinstance(merge, dict):
                lines += [
                    "",
                    f"Files, {name}: {merge['wall']:.2f} s, {merge['seconds']:.2f} inside",
                ]
        return "\n".join(lines) + "\n"


def aim(op: str) -> str:
    """Return the targeted share of a copy's bandwidth."""
    return next((f"{share:.0%}" for start, share in TARGETS.items() if op.startswith(start)), "")


def run(command: Sequence[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run a program in the project's folder; return its exit code and the end of its output."""
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
    """Install in place, without the packages for merging files; both libraries, only for this
    device."""
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
    files = ["tests/test_cuda.py"]
    if has("triton"):
        files.append("tests/test_triton.py")
    if has("pydantic"):
        files.append("tests/test_cuda_merge.py")
    required = "cuda,triton" if has("triton") else "cuda"
    if dry:
        files, required = ["tests/test_array.py"], "cpu"
    quiet = ["-q", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    if has("xdist") and not dry:
        quiet += ["-n", "8"]
    command = [sys.executable, "-m", "pytest", *quiet, *files]
    return run(command, min(180.0, log.left() - 60), PYMERGE_REQUIRE=required)


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


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def merge_files(log: Log, dry: bool) -> Any:
    """Merge files in memory by the command, on the device and on the processor; bytes must be
    equal."""
    missing = [name for name in ("pydantic", "yaml", "rich", "safetensors") if not has(name)]
    if missing:
        return f"left out: {', '.join(missing)} not installed"
    from benchmarks.checkpoints import LLAMA_057B, LLAMA_TINY, make_checkpoints, workspace

    shape = LLAMA_TINY if dry else LLAMA_057B
    other = "thread" if dry else "cuda"  # the one compared with the processor
    need = 8 * 2 * shape.parameters
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > need:
        os.environ.setdefault("PYMERGE_BENCH_DIR", str(memory))
    found: dict[str, Any] = {"parameters": shape.parameters}
    with workspace(need) as root:
        paths = make_checkpoints(root / "in", shape, models=3)
        found["place"] = str(root)
        for method, more in (("linear", {}), ("ties", {"density": 0.2}), ("pcb", {})):
            models = [
                {"model": str(p), "parameters": {"weight": 0.5, **more}} for p in paths.models
            ]
            config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
            if method != "linear":
                config["base_model"] = str(paths.base)
            file = root / f"{method}.yml"
            file.write_text(json.dumps(config))  # which is YAML, too
            for device in ("cpu", other):
                if log.left() < 20:
                    return found
                how = ["--device", "cpu" if dry else device]
                if device == "thread":
                    how += ["--threads", "1"]
                out = root / device
                merge = ["merge", str(file), str(out), "--quiet", *how]
                began = time.monotonic()
                run([sys.executable, "-m", "pymerge", *merge], min(120.0, log.left()))
                wall = time.monotonic() - began
                report = json.loads((out / "pymerge_report.json").read_text())
                names = ("seconds", "peak_anonymous", "peak_device", "backends")
                found[f"{method} {device}"] = {"wall": wall, **{n: report.get(n) for n in names}}
            first, second = root / "cpu", root / other
            names = sorted(path.name for path in first.glob("*.safetensors"))
            same, *apart = filecmp.cmpfiles(first, second, names, shallow=False)
            if sorted(same) != names or any(apart):
                raise AssertionError(f"{method}: files differ: {apart}")
            shutil.rmtree(first)
            shutil.rmtree(second)
            log.found["files"] = found
    return found


def rows(log: Log, dry: bool, gigabytes: float) -> None:
    """Measure the main rows on every backend, then the others in one size."""
    bench = Bench(log, dry, 1 << 16 if dry else int(gigabytes * 1e9))
    log.step("copy", bench.copy)
    backends = ["cpu"] if dry else ["cuda"]
    if has("triton"):
        backends.append("triton")

    def measure(name: str, count: int, dtype: str, backend: str) -> None:
        if log.left() > 5:
            log.step(
                f"{name} {count} {dtype} {backend}",
                lambda: bench.row(name, dtype, backend),
            )

    # The most important come first: our own kernels, then plain torch, then everything else.
    for backend in backends:
        for dtype in DTYPES:
            for count in (2,) if dry else COUNTS:
                log.step(f"inputs {count} {dtype}", lambda c=count, d=dtype: bench.make(c, d))
                for name in MAIN:
                    measure(name, count, dtype, backend)
                for compiled in (False, True):
                    wanted = backend == backends[0] and count == 4 and log.left() > 60
                    if dry and backend == backends[0]:
                        wanted = not compiled
                    for name in EAGER if wanted else ():
                        log.step(
                            f"{name} {count} {dtype} torch{'.compile' if compiled else ''}",
                            lambda n=name, d=dtype, c=compiled: bench.eager(n, d, c),
                        )
        count = 3 if dry else 4
        log.step(f"inputs {count} bf16", lambda c=count: bench.make(c, "bf16"))
        for name in REST:
            measure(name, count, "bf16", backend)


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
    log.step("files", lambda: merge_files(log, dry))
    log.step("rows", lambda: rows(log, dry, options.gigabytes))
    print(log.table())
    failed = [step for step in log.found["steps"] if step["failed"]]
    for step in failed:
        print(f"FAILED {step['step']}: {step['failed'][:500]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
