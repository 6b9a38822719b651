"""Builds of csrc/cuda for the tests, kept under build/ by a digest of their sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
SHIM = ROOT / "tests" / "cuda_shim"
CACHE = ROOT / "build" / "cuda-tests"

# Sources whose intermediate code the tests read.
PTX = (
    "any",
    "chunk_exp",
    "chunk_pairs",
    "chunk_sums",
    "divergence",
    "magnitudes",
    "packed",
    "pcb_codes",
    "pcb_paper",
    "pointwise_f32",
    "sparse_f32",
    "sums",
    "ties_f32",
)

HOST_FLAGS = [
    "-std=c++17",
    "-O1",
    "-g0",
    "-fPIC",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    # A GPU faults if an address is not a multiple of the size of the access.
    "-fsanitize=alignment,bounds,shift",
    "-fsanitize-undefined-trap-on-error",
    # Launches with few records and kernels for few models, so that small cases exceed both limits.
    "-DPYMERGE_CUDA_TABLE_BYTES=4096",
    "-DPYMERGE_CUDA_UNROLLED=8",
    f"-I{SHIM}",
    f"-I{ROOT / 'csrc'}",
]


def build_module() -> SimpleNamespace:
    """Return the definitions of csrc/cuda/build.py."""
    return SimpleNamespace(**runpy.run_path(str(CUDA / "build.py")))


def compiler() -> str | None:
    """Return the C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "g++")


def abi() -> str:
    """Return the hash that a library must have to be loaded: the value of PYMERGE_ABI."""
    return str(runpy.run_path(str(ROOT / "csrc" / "abi.py"))["abi"]())


def _digest(*settings: str) -> str:
    # Only the sources of the CPU kernels have no influence.
    sources = [
        path for path in (ROOT / "csrc").rglob("*") if path.parent.name not in ("cpu", "bind")
    ]
    found = hashlib.sha256(repr(settings).encode())
    for path in sorted([*sources, *SHIM.rglob("*")]):
        if path.suffix in (".h", ".cpp", ".cu", ".def", ".py", ".map"):
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let only one process at a time build in a folder, because pytest-xdist has several."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kept(kind: str, digest: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of a build; it is made once, and older ones of the kind are removed."""
    folder = CACHE / f"{kind}-{digest}"
    with _locked(folder):
        if not (folder / "done").exists():
            make(folder)
            (folder / "done").touch()
            for other in CACHE.glob(f"{kind}-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
    return folder


def build_for_host() -> Path:
    """Return the kernels as a library that runs on the CPU, thread by thread."""
    command = compiler()
    assert command is not None

    def make(folder: Path) -> None:
        units = [(unit.name, unit.source, unit.definitions) for unit in build_module().units()]
        units.append(("shim", SHIM / "shim.cpp", ()))
        objects = [folder / f"{name}.o" for name, _, _ in units]

        def compile_one(source: Path, definitions: tuple[str, ...], target: Path) -> None:
            flags = [*HOST_FLAGS, f"-DPYMERGE_ABI={abi()}", *definitions]
            call = [command, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
            done = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            sources, definitions = [unit[1] for unit in units], [unit[2] for unit in units]
            list(pool.map(compile_one, sources, definitions, objects))
        link = [command, "-shared", "-o", str(folder / "host.so"), *map(str, objects)]
        subprocess.run(link, check=True)

    return _kept("host", _digest(command, *HOST_FLAGS), make) / "host.so"


def build_for_device(arch: str) -> tuple[Path, dict[str, str]]:
    """Return the library for one architecture, and the compiler's output for each source."""
    module = build_module()
    nvcc = module.find_nvcc()

    def make(folder: Path) -> None:
        cores = len(os.sched_getaffinity(0))
        module.build(folder / "_cuda.so", folder, archs=arch, jobs=cores, nvcc=nvcc)
        for unit in module.units():
            if unit.name in PTX:
                flags = [*module.FLAGS, *unit.definitions, f"-arch=sm_{arch}", "-ptx"]
                target = folder / f"{unit.name}.ptx"
                subprocess.run([nvcc, *flags, str(unit.source), "-o", str(target)], check=True)

    folder = _kept(f"sm_{arch}", _digest(nvcc, arch), make)
    logs = {path.stem: path.read_text() for path in folder.glob("*.log")}
    return folder / "_cuda.so", logs
